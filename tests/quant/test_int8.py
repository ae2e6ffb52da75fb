"""LLM.int8() parts are bitsandbytes' bytes in both directions."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.errors import CorruptError, NonFiniteError, UnsupportedError
from qlora_tools.quant.int8 import Int8, quantize_rows_plain
from qlora_tools.specs import TensorSpec, spec_of

NAME = "model.layers.0.mlp.up_proj.weight"
SCB = "model.layers.0.mlp.up_proj.SCB"
LAYOUT = "model.layers.0.mlp.up_proj.weight_format"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(shape, dtype, seed=0, scale=0.05):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 48), (128, 128), (300, 1024), (2, 4097)], ids=str)
def test_parts_and_decoded_values_equal_bitsandbytes(shape, dtype):
    dense = weights(shape, dtype)
    if shape[0] > 3:
        dense[2] = 0
        dense[3] *= 1e-5  # fp16 subnormals
    spec = spec_of(NAME, dense)
    parts = Int8().encode(spec, dense)
    codes, scales, _ = bnbf.int8_vectorwise_quant(dense.to(torch.float16))
    assert torch.equal(parts[NAME], codes) and torch.equal(parts[SCB], scales) and int(parts[LAYOUT]) == 0
    assert torch.equal(Int8().decode(spec, parts), bnbf.int8_vectorwise_dequant(codes, scales).to(dtype))
    assert {part.name: (part.torch_dtype, part.shape) for part in Int8().part_specs(spec)} == {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()}


@given(rows=st.integers(1, 20), columns=st.integers(1, 70), dtype=st.sampled_from(DTYPES), power=st.integers(-16, 10), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=120, deadline=None)
def test_kernel_equals_its_twin_rows_decode_alike_and_codes_are_idempotent(rows, columns, dtype, power, seed, data):
    dense = weights((rows, columns), dtype, seed, 2.0**power)
    spec = spec_of(NAME, dense)
    parts = Int8().encode(spec, dense)
    codes, scales = quantize_rows_plain(dense.to(torch.float16))
    assert torch.equal(parts[NAME], codes) and torch.equal(parts[SCB], scales)
    whole = Int8().decode(spec, parts)
    low = data.draw(st.integers(0, rows))
    high = data.draw(st.integers(low, rows))
    assert torch.equal(Int8().decode(spec, parts, (low, high)), whole[low:high])
    exact = codes.double() * scales.double().unsqueeze(1) / 127
    torch.testing.assert_close(whole.double(), exact, rtol=torch.finfo(dtype).eps * 0.51 + 1e-6, atol=3.1e-8 if dtype == torch.float16 else 1e-12)
    if dtype != torch.bfloat16 and power > -6:  # bf16 rounds to 8 bits itself, and fp16 subnormals are a coarser grid than int8
        again = Int8().encode(spec, whole)[NAME]
        assert torch.equal(again, parts[NAME])


def test_error_is_at_most_half_a_step_of_the_row():
    dense = weights((40, 96), torch.float16)
    spec = spec_of(NAME, dense)
    restored = Int8().decode(TensorSpec(NAME, "F32", spec.shape), Int8().encode(spec, dense))
    step = dense.float().abs().amax(1, keepdim=True) / 127
    assert bool(((restored - dense.float()).abs() <= step * 0.50001).all())


def test_threads_change_nothing():
    dense = weights((700, 300), torch.bfloat16)
    spec = spec_of(NAME, dense)
    one, three = Int8().encode(spec, dense), Int8(threads=3).encode(spec, dense)
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_a_linear8bitlt_loads_our_parts_and_we_decode_its_own():
    dense = weights((24, 40), torch.float16)
    spec = TensorSpec("weight", "F16", (24, 40))
    layer = bnb.nn.Linear8bitLt(40, 24, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": dense})
    layer.to("cpu")
    saved = layer.state_dict()
    parts = {name.lstrip("."): tensor for name, tensor in Int8().encode(TensorSpec("m.weight", "F16", (24, 40)), dense).items()}
    parts = {name.removeprefix("m."): tensor for name, tensor in parts.items()}
    assert saved.keys() == parts.keys() and all(torch.equal(saved[name], parts[name]) and saved[name].dtype == parts[name].dtype for name in saved)

    other = bnb.nn.Linear8bitLt(40, 24, bias=False, has_fp16_weights=False)
    other.load_state_dict({"weight": torch.zeros(24, 40, dtype=torch.float16)})
    other.to("cpu")
    other.load_state_dict(parts)
    assert torch.equal(other.weight.data, parts["weight"]) and torch.equal(other.weight.SCB, parts["SCB"])
    decoded = Int8().decode(TensorSpec("m.weight", "F16", spec.shape), {"m." + name: tensor for name, tensor in saved.items()})
    assert torch.equal(decoded, bnbf.int8_vectorwise_dequant(saved["weight"], saved["SCB"]).to(torch.float16))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_counted_and_located(value):
    dense = weights((10, 10), torch.bfloat16)
    dense[4, 2] = value
    with pytest.raises(NonFiniteError, match=r"up_proj.weight: 1 of 100 values .* first at index \[4, 2\]"):
        Int8().encode(spec_of(NAME, dense), dense)


@pytest.mark.parametrize("value", [70000.0, -1e20])
def test_values_beyond_fp16_are_refused_with_a_way_out(value):
    dense = weights((10, 10), torch.bfloat16)
    dense[4, 2] = value
    with pytest.raises(NonFiniteError, match="1 values are beyond fp16's largest") as caught:
        Int8().encode(spec_of(NAME, dense), dense)
    assert "nf4" in caught.value.hint


def test_refusals():
    for spec in (TensorSpec("a.weight", "BF16", (3,)), TensorSpec("a.bias", "BF16", (3, 4)), TensorSpec("a.weight", "BF16", (0, 4))):
        with pytest.raises(UnsupportedError, match="module"):
            Int8().part_specs(spec)
    dense = weights((6, 4), torch.bfloat16)
    parts = Int8().encode(spec_of(NAME, dense), dense)
    for change in ({SCB: parts[SCB][:-1]}, {NAME: parts[NAME][:, :-1]}, {NAME: parts[NAME].short()}):
        with pytest.raises(CorruptError):
            Int8().decode(spec_of(NAME, dense), parts | change)
    with pytest.raises(UnsupportedError, match="int64"):
        Int8().encode(TensorSpec(NAME, "I64", (2, 2)), torch.zeros(2, 2, dtype=torch.int64))
