"""Detection finds bitsandbytes' parts wherever they lie, and refuses what it cannot read, before reading it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.errors import CorruptError, QltError, UnsupportedError
from qlora_tools.quant.codec import Codec, Stored, detect
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4, STATE_SUFFIX
from qlora_tools.specs import TensorSpec, spec_of

W = "layers.0.q.weight"
SPEC = TensorSpec(W, "BF16", (6, 40))


def dense():
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def detect_in(tensors, **options):
    return detect({name: spec_of(name, tensor) for name, tensor in tensors.items()}, tensors.__getitem__, **options)


@pytest.mark.parametrize("codec", [NF4(), NF4(double_quant=False), NF4(128), Int8()], ids=repr)
def test_what_a_codec_writes_is_detected_and_decodes(codec: Codec):
    parts = codec.encode(SPEC, dense())
    found = detect_in({"norm.weight": torch.ones(4), **parts})
    assert found == {W: Stored(codec, SPEC, found[W].parts)} and set(found[W].parts) == set(parts)
    assert torch.equal(found[W].codec.decode(found[W].spec, parts), codec.decode(SPEC, parts))
    assert codec.describe()["quant_method"] == "bitsandbytes"


def test_a_dense_checkpoint_has_nothing_to_detect_and_nothing_is_read():
    assert detect({"a.weight": SPEC, "a.bias": TensorSpec("a.bias", "F32", (3,))}, pytest.fail) == {}


def test_only_small_parts_are_read():
    parts = NF4().encode(SPEC, dense()) | Int8().encode(TensorSpec("b.weight", "BF16", (6, 40)), dense())
    read = []
    detect({name: spec_of(name, tensor) for name, tensor in parts.items()}, lambda name: read.append(name) or parts[name])
    assert read and all(parts[name].nbytes < 4096 for name in read) and W not in read


def test_int8_decodes_to_the_dtype_of_the_config():
    parts = Int8().encode(SPEC, dense())
    assert detect_in(parts, default_dtype="F16")[W].spec.dtype == "F16"


def test_int8_of_old_checkpoints_without_a_layout_is_read():
    parts = {name: tensor for name, tensor in Int8().encode(SPEC, dense()).items() if not name.endswith("weight_format")}
    found = detect_in(parts)[W]
    assert torch.equal(found.codec.decode(found.spec, parts), Int8().decode(SPEC, parts))


def test_packed_bytes_under_another_dtype_are_recognised():
    parts = NF4().encode(SPEC, dense())
    parts[W] = parts[W].view(-1).view(torch.bfloat16).unsqueeze(1)
    assert detect_in(parts)[W].spec == SPEC


@pytest.mark.parametrize("codec", [NF4(), NF4(double_quant=False), Int8()], ids=repr)
def test_any_missing_part_is_noticed(codec):
    parts = codec.encode(SPEC, dense())
    for missing in parts:
        if missing.endswith("weight_format"):
            continue
        with pytest.raises(CorruptError, match="missing|without|quant_state"):
            detect_in({name: tensor for name, tensor in parts.items() if name != missing})


def test_sizes_that_contradict_the_state_are_listed():
    parts = NF4().encode(SPEC, dense())
    parts[W + ".absmax"] = parts[W + ".absmax"][:-1]
    parts[W] = parts[W][:-3]
    with pytest.raises(CorruptError, match=r"packed bytes 117 \(expected 120\), absmax 3 \(expected 4\)"):
        detect_in(parts)
    parts = NF4(double_quant=False).encode(SPEC, dense())
    parts[W + ".absmax"] = parts[W + ".absmax"].to(torch.uint8)
    with pytest.raises(CorruptError, match="absmax U8 without double"):
        detect_in(parts)


def test_an_oversized_state_is_refused_unread():
    stored = {part.name: part for part in NF4().part_specs(SPEC)}
    stored[W + STATE_SUFFIX] = TensorSpec(W + STATE_SUFFIX, "U8", (1 << 30,))
    with pytest.raises(CorruptError, match="at most 4096"):
        detect(stored, pytest.fail)


def test_a_state_that_promises_a_huge_tensor_is_refused():
    parts = NF4().encode(SPEC, dense())
    state = json.loads(bytes(parts[W + STATE_SUFFIX].tolist())) | {"shape": [1 << 20, 1 << 20]}
    parts[W + STATE_SUFFIX] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(CorruptError, match="expected 549755813888"):
        detect_in(parts)


def test_int8_parts_that_do_not_fit_are_refused():
    good = Int8().encode(SPEC, dense())
    scb, layout = "layers.0.q.SCB", "layers.0.q.weight_format"
    for change in ({scb: good[scb][:-1]}, {scb: good[scb].to(torch.int32)}, {W: good[W].view(-1)}, {W: good[W].to(torch.uint8)}, {layout: torch.zeros(2)}):
        with pytest.raises(CorruptError):
            detect_in(good | change)
    with pytest.raises(UnsupportedError, match="layout number 2"):
        detect_in(good | {layout: torch.tensor(2, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (W + ".quant_state.bitsandbytes__fp4", "fp4"),
        ("layers.0.q.qweight", "GPTQ"),
        ("layers.0.q.weight_packed", "compressed-tensors"),
        ("layers.0.q.weight_scale_inv", "block fp8"),
        ("layers.0.mlp.experts.down_proj_scales", "MXFP4"),
    ],
)
def test_other_formats_are_unsupported_by_name(name, kind):
    with pytest.raises(UnsupportedError, match=kind) as caught:
        detect_in({W: dense(), name: torch.zeros(4, dtype=torch.uint8)})
    assert "dequantize" in caught.value.hint


def test_messages_begin_with_the_place():
    with pytest.raises(UnsupportedError, match="^folder/x: layers"):
        detect_in({"layers.0.q.qweight": torch.zeros(4)}, where="folder/x")


@given(blob=st.binary(min_size=2, max_size=300), dtype=st.sampled_from(["U8", "I8", "F32"]), rows=st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_hostile_bytes_raise_only_our_errors(blob, dtype, rows):
    parts = NF4().encode(SPEC, dense())
    stored = {name: spec_of(name, tensor) for name, tensor in parts.items()} | {W: TensorSpec(W, dtype, (rows, 1))}
    parts[W + STATE_SUFFIX] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    stored[W + STATE_SUFFIX] = spec_of(W + STATE_SUFFIX, parts[W + STATE_SUFFIX])
    with pytest.raises(QltError):
        detect(stored, parts.__getitem__)
