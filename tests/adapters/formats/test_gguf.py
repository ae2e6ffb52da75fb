"""GGUF adapters against the ``gguf`` package both ways, and against the runtime's own rule for scales in float64."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import torch

from qlora_tools.adapters.formats import gguf, gguf_file
from qlora_tools.adapters.formats.rope_order import halves_to_pairs, pairs_to_halves
from qlora_tools.adapters.portable import CONV, Layer, Portable
from qlora_tools.adapters.stored import Hints
from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, NonFiniteError, QltError, UnsupportedError, UsageError
from qlora_tools.models.family import family_of
from tests.adapters.formats.references import HEADS, KV_HEADS, LLAMA, LLAMA_MODULES, delta, portable, random, worst

Q = "model.layers.1.self_attn.q_proj"
ALPHA = "adapter.lora.alpha"


def written(adapter: Portable, folder: Path, base=LLAMA, **options) -> Path:
    gguf.write(adapter, folder / "adapter.gguf", base_config=base, **options)
    return folder / "adapter.gguf"


def read_back(path: Path, base=LLAMA, modules=LLAMA_MODULES) -> Portable:
    values, tensors = gguf.load(path)
    assert gguf.recognise(tensors.keys(), values)
    return gguf.read(tensors, values, Hints(modules=modules, base_config=base))


def runtime_deltas(path: Path) -> dict[str, np.ndarray]:
    """What the runtime adds to each of its own weights, in float64: alpha over the rank of the tensor, alpha 0 meaning 1."""
    reader = gguf_package.GGUFReader(path)
    field = reader.get_field(ALPHA)
    alpha = float(field.contents()) if field is not None else 0.0
    tensors = {tensor.name: floats(tensor) for tensor in reader.tensors}
    found = {}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0
        found[name] = scale * (a @ b.T if name == "token_embd.weight" else b @ a)
    return found


def floats(tensor) -> np.ndarray:
    if tensor.tensor_type == gguf_package.GGMLQuantizationType.BF16:
        raw = np.ascontiguousarray(tensor.data).view(np.uint16).astype(np.uint32) << 16
        return raw.view(np.float32).astype(np.float64).reshape(tuple(int(size) for size in reversed(tensor.shape)))
    return np.asarray(tensor.data, dtype=np.float64)


def llama_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as the converter of the llama architecture puts them: first halves and second halves of each head, interleaved."""
    out = np.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for row in range(size // 2):
            out[head * size + 2 * row] = weight[head * size + row]
            out[head * size + 2 * row + 1] = weight[head * size + row + size // 2]
    return out


def expected_in_runtime(adapter: Portable, llama: bool = True) -> dict[str, np.ndarray]:
    names = {
        "embed_tokens": "token_embd",
        "lm_head": "output",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    found = {}
    for module, layer in adapter.layers.items():
        leaf, parts = names[module.rpartition(".")[2]], module.split(".")
        weight = delta(layer).numpy()
        if llama and leaf in ("attn_q", "attn_k"):
            weight = llama_order(weight, HEADS if leaf == "attn_q" else KV_HEADS)
        found[f"blk.{parts[2]}.{leaf}.weight" if "layers" in parts else f"{leaf}.weight"] = weight
    return found


def assert_runtime_agrees(path: Path, adapter: Portable, tolerance: float = 1e-6, llama: bool = True) -> None:
    found, expected = runtime_deltas(path), expected_in_runtime(adapter, llama)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=tolerance, atol=tolerance * max(abs(weight).max(), 1e-30), err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_means_the_same_to_the_runtime_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = portable(LLAMA_MODULES, dtype=dtype)
    path = written(adapter, tmp_path)
    assert_runtime_agrees(path, adapter)
    assert worst(read_back(path), adapter) == 0
    assert {tensor.dtype for tensor in gguf.load(path)[1].values()} == {dtype}


def test_a_rank_pattern_with_one_alpha_needs_no_baking(tmp_path: Path) -> None:
    ranks = {module: 1 + position % 5 for position, module in enumerate(LLAMA_MODULES)}
    adapter = portable(LLAMA_MODULES, ranks=ranks, scale={module: 12.0 / rank for module, rank in ranks.items()})
    path = written(adapter, tmp_path)
    assert gguf.load(path)[0][ALPHA] == 12.0
    assert_runtime_agrees(path, adapter)
    assert worst(read_back(path), adapter) < 1e-6


def test_rslora_of_one_rank_is_one_alpha(tmp_path: Path) -> None:
    adapter = portable(LLAMA_MODULES, ranks=5, scale=16 / 5**0.5, dtype=torch.bfloat16)
    path = written(adapter, tmp_path)
    assert gguf.load(path)[0][ALPHA] == pytest.approx(16 * 5**0.5)
    assert_runtime_agrees(path, adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_without_a_common_alpha_are_baked_in_without_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    ranks = {module: 1 + position % 5 for position, module in enumerate(LLAMA_MODULES)}
    adapter = portable(LLAMA_MODULES, ranks=ranks, scale={module: 16 / rank**0.5 for module, rank in ranks.items()}, dtype=dtype)
    path = written(adapter, tmp_path)
    assert gguf.load(path)[0][ALPHA] == 0.0
    assert_runtime_agrees(path, adapter)
    assert worst(read_back(path), adapter) < 1e-6


def test_a_scale_of_zero_stays_zero_although_alpha_zero_means_one(tmp_path: Path) -> None:
    adapter = portable({Q: LLAMA_MODULES[Q]}, scale=0.0)
    assert abs(runtime_deltas(written(adapter, tmp_path))["blk.1.attn_q.weight"]).max() == 0


def test_a_chosen_dtype_rounds_once(tmp_path: Path) -> None:
    adapter = portable(LLAMA_MODULES)
    path = written(adapter, tmp_path, dtype="F16")
    assert {tensor.dtype for tensor in gguf.load(path)[1].values()} == {torch.float16}
    assert_runtime_agrees(path, adapter, 2e-3)


def test_numbers_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    adapter = Portable({Q: Layer(random(3, 20), random(24, 3) * 1e6, 1.0)})
    with pytest.raises(NonFiniteError, match="beyond F16"):
        written(adapter, tmp_path, dtype="F16")
    assert_runtime_agrees(written(adapter, tmp_path, dtype="BF16"), adapter, 1e-2)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma3_text"])
def test_other_architectures_keep_the_order_of_rows(tmp_path: Path, model_type: str) -> None:
    adapter = portable(LLAMA_MODULES)
    path = written(adapter, tmp_path, LLAMA | {"model_type": model_type})
    assert_runtime_agrees(path, adapter, llama=False)
    assert worst(read_back(path, LLAMA | {"model_type": model_type}), adapter) == 0


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_factors_go_by_inputs_and_outputs_whichever_way_the_base_stores_them(tmp_path: Path, prefix: str) -> None:
    stored = {f"{prefix}h.0.attn.c_attn": (8, 24), f"{prefix}h.0.attn.c_proj": (8, 8), f"{prefix}h.0.mlp.c_proj": (32, 8)}
    adapter = portable({module: shape[::-1] for module, shape in stored.items()})
    base = {"model_type": "gpt2", "n_head": 2}
    path = written(adapter, tmp_path, base)
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in gguf_package.GGUFReader(path).tensors}
    # The runtime's check: first size of A is the inputs, second size of B the outputs.
    assert shapes["blk.0.attn_qkv.weight.lora_a"] == [8, 3] and shapes["blk.0.attn_qkv.weight.lora_b"] == [3, 24]
    assert shapes["blk.0.ffn_down.weight.lora_a"] == [32, 3] and shapes["blk.0.ffn_down.weight.lora_b"] == [3, 8]
    assert worst(read_back(path, base, stored), adapter) == 0


def test_every_name_is_the_one_that_the_package_maps() -> None:
    architectures = {name: number for number, name in gguf_package.MODEL_ARCH_NAMES.items()}
    for model_type, model in gguf._models().items():
        table = gguf_package.get_tensor_name_map(architectures[model.architecture], 4)
        for module, name in model.names.items():
            mapped = table.get_name(module.format(3))
            assert mapped == name.format(3) or (mapped is None and name == "output" and family_of({"model_type": model_type}).is_tied({})), (model_type, module)


def test_the_header_is_what_the_package_reads(tmp_path: Path) -> None:
    reader = gguf_package.GGUFReader(written(portable(LLAMA_MODULES, base_name="org/model"), tmp_path))
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert said["general.type"] == "adapter" and said["adapter.type"] == "lora" and said["general.architecture"] == "llama"
    assert said[ALPHA] == 6.0 and said["general.base_model.0.name"] == "org/model"
    assert read_back(tmp_path / "adapter.gguf").base_name == "org/model"


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_files_of_the_package_are_read(tmp_path: Path, kind) -> None:
    adapter = portable(LLAMA_MODULES)
    writer = gguf_package.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(ALPHA, 6.0)
    writer.add_array("general.tags", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("flag", True)
    _, tensors = gguf.render(adapter, base_config=LLAMA)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy().astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = gguf.load(tmp_path / "theirs.gguf")[0]
    assert found["general.tags"] == ["a", "b"] and found["numbers"] == [1, 2, 3] and found["flag"] is True
    assert worst(read_back(tmp_path / "theirs.gguf"), adapter) == 0  # the values fit in half precision


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    adapter = portable(LLAMA_MODULES)
    reversed_ = Portable(dict(reversed(adapter.layers.items())))
    assert written(adapter, tmp_path / "a").read_bytes() == written(reversed_, tmp_path / "b").read_bytes()


@pytest.mark.parametrize("rows", [(24,), (24, 5)])
def test_the_two_orders_of_rows_are_inverse(rows: tuple[int, ...]) -> None:
    tensor = random(*rows)
    assert torch.equal(pairs_to_halves(halves_to_pairs(tensor, 4), 4), tensor)
    assert torch.equal(halves_to_pairs(tensor, 4), torch.from_numpy(llama_order(tensor.numpy(), 4)))


@pytest.mark.parametrize(("name", "heads"), [("blk.0.attn_q.weight", HEADS), ("blk.0.attn_k.weight", KV_HEADS)])
def test_rows_come_back_as_transformers_brings_them_back(name: str, heads: int) -> None:
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    stored = random(24, 5).numpy()
    theirs = LlamaTensorProcessor(config=LLAMA).process(stored, name).weights
    assert np.array_equal(pairs_to_halves(torch.from_numpy(stored), heads).numpy(), theirs)


def test_rows_that_do_not_divide_into_heads_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="24 rows"):
        pairs_to_halves(random(24, 2), 5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bias": random(24)}, "biases of"),
        ({"magnitude": random(24)}, "DoRA magnitudes"),
        ({"kind": CONV}, "convolutions"),
    ],
)
def test_what_the_runtime_would_drop_is_refused(tmp_path: Path, change: dict, named: str) -> None:
    layer = Layer(random(3, 20), random(24, 3), 1.0, **change)
    with pytest.raises(UnsupportedError, match=named) as caught:
        written(Portable({Q: layer}), tmp_path)
    assert "qlt merge" in (caught.value.hint or "") and not list(tmp_path.iterdir())


def test_replaced_tensors_and_token_rows_are_refused_by_name(tmp_path: Path) -> None:
    layers = portable({Q: LLAMA_MODULES[Q]}).layers
    with pytest.raises(UnsupportedError, match="model.norm.weight"):
        written(Portable(layers, {"model.norm.weight": random(20)}), tmp_path)
    with pytest.raises(UnsupportedError, match="token rows"):
        written(Portable(layers, token_rows={"model.embed_tokens.weight": ((1,), random(1, 20))}), tmp_path)


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_one_side_of_a_tied_weight_cannot_be_written(tmp_path: Path, module: str) -> None:
    adapter = portable({module: LLAMA_MODULES[module]})
    with pytest.raises(UnsupportedError, match="shares its weight"):
        written(adapter, tmp_path, LLAMA | {"tie_word_embeddings": True})
    tied_by_default = {name: value for name, value in LLAMA.items() if name != "tie_word_embeddings"} | {"model_type": "gemma"}
    with pytest.raises(UnsupportedError, match="shares its weight"):
        written(adapter, tmp_path, tied_by_default)


def test_unknown_models_and_modules_are_refused(tmp_path: Path) -> None:
    adapter = portable({Q: LLAMA_MODULES[Q]})
    with pytest.raises(MissingError, match="architecture"):
        written(adapter, tmp_path, None)
    with pytest.raises(UnsupportedError, match="mamba"):
        written(adapter, tmp_path, {"model_type": "mamba"})
    with pytest.raises(UnsupportedError, match="router"):
        written(portable({"model.layers.0.mlp.router": (4, 20)}), tmp_path)
    with pytest.raises(UnsupportedError, match="no low-rank layers"):
        written(Portable({}), tmp_path)


def test_reading_needs_the_base_where_rows_are_permuted_and_only_there(tmp_path: Path) -> None:
    path = written(portable(LLAMA_MODULES), tmp_path)
    with pytest.raises(MissingError, match="head counts"):
        read_back(path, None, None)
    (tmp_path / "v").mkdir()
    only_v = portable({"model.layers.0.self_attn.v_proj": (12, 20)})
    assert worst(read_back(written(only_v, tmp_path / "v"), None, None), only_v) == 0


def test_the_wrong_base_is_refused(tmp_path: Path) -> None:
    path = written(portable(LLAMA_MODULES), tmp_path)
    with pytest.raises(IncompatibleError, match="`llama`.*`qwen2`"):
        read_back(path, LLAMA | {"model_type": "qwen2"})
    with pytest.raises(IncompatibleError, match=r"updates 24 x 20, the base has \[24, 21\]"):
        read_back(path, modules=LLAMA_MODULES | {Q: (24, 21)})
    with pytest.raises(IncompatibleError, match="no module"):
        read_back(path, modules={module: shape for module, shape in LLAMA_MODULES.items() if module != Q})


def values_and_tensors() -> tuple[dict, dict]:
    values, tensors = gguf.render(portable({Q: LLAMA_MODULES[Q]}), base_config=LLAMA)
    return dict(values), tensors


@pytest.mark.parametrize(
    ("values", "tensors", "error", "named"),
    [
        ({"general.type": "model"}, {}, UnsupportedError, "general.type"),
        ({"adapter.type": "dora"}, {}, UnsupportedError, "adapter.type"),
        ({"adapter.alora.invocation_tokens": [1, 2]}, {}, UnsupportedError, "aLoRA"),
        ({ALPHA: float("nan")}, {}, CorruptError, "alpha"),
        ({ALPHA: "16"}, {}, CorruptError, "alpha"),
        ({}, {"blk.0.attn_norm.weight": random(4)}, IncompatibleError, "blk.0.attn_norm.weight"),
        ({}, {"blk.0.attn_v.weight.lora_a": random(3, 20)}, IncompatibleError, "no lora_b"),
        ({}, {"blk.0.mystery.weight.lora_a": random(3, 20), "blk.0.mystery.weight.lora_b": random(9, 3)}, IncompatibleError, "blk.0.mystery"),
        ({}, {"blk.1.attn_q.weight.lora_b": random(24, 4)}, IncompatibleError, "differ or are zero"),
        ({}, {"blk.1.attn_q.weight.lora_b": torch.full((24, 3), float("inf"))}, NonFiniteError, "infinity"),
    ],
)
def test_hostile_content_is_refused_by_name(values: dict, tensors: dict, error: type, named: str) -> None:
    own_values, own_tensors = values_and_tensors()
    with pytest.raises(error, match=named):
        gguf.read(own_tensors | tensors, own_values | values, Hints(base_config=LLAMA))


def test_an_alpha_that_contradicts_the_file_is_refused() -> None:
    values, tensors = values_and_tensors()
    with pytest.raises(UsageError, match="states alpha 6"):
        gguf.read(tensors, values, Hints(base_config=LLAMA, alpha=16))
    gguf.read(tensors, values, Hints(base_config=LLAMA, alpha=6))


def test_a_file_without_alpha_has_scale_one() -> None:
    values, tensors = values_and_tensors()
    del values[ALPHA]
    assert gguf.read(tensors, values, Hints(base_config=LLAMA)).layers[Q].scale == 1.0


def container(values: bytes = b"", entries: bytes = b"", data: bytes = b"", counts=(0, 0), version=3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + values + entries
    return head + bytes(-len(head) % 32) + data


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word)) + word.encode()


def entry(name: str, sizes=(4, 2), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@pytest.mark.parametrize(
    ("raw", "error", "named"),
    [
        (b"", CorruptError, "ends at byte 0"),
        (b"GGU", CorruptError, "ends"),
        (b"ggla" + bytes(60), UnsupportedError, "ggla"),
        (b"algg" + bytes(60), UnsupportedError, "ggla"),
        (b"PK\3\4" + bytes(60), CorruptError, "expected b'GGUF'"),
        (container(version=1), UnsupportedError, "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big endian"),
        (container(counts=(2**60, 0)), CorruptError, "tensors, at most"),
        (container(counts=(0, 2**60)), CorruptError, "values, at most"),
        (container(counts=(0, 2)), CorruptError, "ends"),
        (container(struct.pack("<Q", 2**62), counts=(0, 1)), CorruptError, "bytes of text"),
        (container(text("k") + struct.pack("<IIQ", 9, 4, 2**61), counts=(0, 1)), CorruptError, "array items"),
        (container(text("k") + struct.pack("<IIQ", 9, 9, 1), counts=(0, 1)), CorruptError, "unknown value type 9"),
        (container(text("k") + struct.pack("<I", 77), counts=(0, 1)), CorruptError, "unknown value type 77"),
        (container(struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1), counts=(0, 1)), CorruptError, "UTF-8"),
        (container((text("k") + struct.pack("<IB", 0, 1)) * 2, counts=(0, 2)), CorruptError, "twice"),
        (container(text("general.alignment") + struct.pack("<II", 4, 3), counts=(0, 1)), CorruptError, "power of two"),
        (container(text("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)), CorruptError, "power of two"),
        (container(entries=entry("x", sizes=()), counts=(1, 0)), CorruptError, "0 axes"),
        (container(entries=entry("x", sizes=(1,) * 9), counts=(1, 0)), CorruptError, "9 axes"),
        (container(entries=entry("x", sizes=(2**40, 2**40)), counts=(1, 0)), CorruptError, "leaves the file"),
        (container(entries=entry("x", sizes=(0, 2)), counts=(1, 0)), CorruptError, "empty"),
        (container(entries=entry("x"), data=bytes(31), counts=(1, 0)), CorruptError, "leaves the file"),
        (container(entries=entry("x", offset=4), data=bytes(64), counts=(1, 0)), CorruptError, "not aligned"),
        (container(entries=entry("x", offset=2**63), data=bytes(64), counts=(1, 0)), CorruptError, "leaves the file"),
        (container(entries=entry("x") + entry("y"), data=bytes(64), counts=(2, 0)), CorruptError, "overlaps"),
        (container(entries=entry("x") + entry("x", offset=32), data=bytes(64), counts=(2, 0)), CorruptError, "lists `x` twice"),
        (container(entries=entry("x", kind=8), data=bytes(64), counts=(1, 0)), UnsupportedError, "GGML type 8"),
    ],
)
def test_hostile_containers_are_refused(tmp_path: Path, raw: bytes, error: type, named: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(error, match=named):
        gguf_file.read_file(path)


def test_every_truncation_and_many_flips_end_in_our_own_errors(tmp_path: Path) -> None:
    whole = written(portable({Q: LLAMA_MODULES[Q]}), tmp_path).read_bytes()
    path = tmp_path / "bad.gguf"
    header = whole.index(b"lora_b") + 40
    broken = [whole[:length] for length in range(0, len(whole) - 32, 7)]
    broken += [whole[:spot] + bytes([whole[spot] ^ 0x85]) + whole[spot + 1 :] for spot in range(header)]
    refused = 0
    for raw in broken:
        path.write_bytes(raw)
        try:
            values, tensors = gguf.load(path)
            gguf.read(tensors, values, Hints(base_config=LLAMA, modules=LLAMA_MODULES))
        except QltError:
            refused += 1
    assert refused > 0.8 * len(broken)


def test_a_missing_file_and_an_existing_output(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        gguf.load(tmp_path / "none.gguf")
    path = written(portable({Q: LLAMA_MODULES[Q]}), tmp_path)
    with pytest.raises(FileExistsError):
        gguf.write(portable({Q: LLAMA_MODULES[Q]}), path, base_config=LLAMA)
