"""ONNX adapters through the runtime: what it reads, and what a graph with inputs of these names computes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from qlora_tools.adapters.formats import onnx_adapter
from qlora_tools.adapters.portable import CONV, EMBEDDING, Layer, Portable
from qlora_tools.adapters.stored import Hints
from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, UnsupportedError, UsageError
from tests.adapters.formats.references import LLAMA, LLAMA_MODULES, delta, portable, random, worst

Q = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"


def round_trip(adapter: Portable, folder: Path, **options) -> Portable:
    onnx_adapter.write(adapter, folder / "a.onnx_adapter", **options)
    metadata, tensors = onnx_adapter.load(folder / "a.onnx_adapter")
    assert onnx_adapter.recognise(tensors.keys(), metadata)
    return onnx_adapter.read(tensors, hints=Hints(modules=LLAMA_MODULES, base_config=LLAMA))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = portable(LLAMA_MODULES, dtype=dtype)
    assert worst(round_trip(adapter, tmp_path), adapter) == 0
    assert {tensor.dtype for tensor in onnx_adapter.load(tmp_path / "a.onnx_adapter")[1].values()} == {dtype}


def test_scales_are_baked_in_without_rounding(tmp_path: Path) -> None:
    ranks = {module: 1 + position % 5 for position, module in enumerate(LLAMA_MODULES)}
    adapter = portable(LLAMA_MODULES, ranks=ranks, scale={module: 16 / rank**0.5 for module, rank in ranks.items()}, dtype=torch.bfloat16)
    assert worst(round_trip(adapter, tmp_path), adapter) < 1e-6


def test_the_dtype_of_the_graph_can_be_asked_for(tmp_path: Path) -> None:
    adapter = portable(LLAMA_MODULES, scale=1.7)
    assert worst(round_trip(adapter, tmp_path, dtype="F16"), adapter) < 2e-3
    assert {tensor.dtype for tensor in onnx_adapter.load(tmp_path / "a.onnx_adapter")[1].values()} == {torch.float16}


def graph(outputs: int, inputs: int) -> bytes:
    """x W + x A B, with A and B optional inputs that default to rank 0."""
    names = {f"{Q}.lora_A": [inputs, 0], f"{Q}.lora_B": [0, outputs]}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["base"]),
        helper.make_node("MatMul", ["x", f"{Q}.lora_A"], ["down"]),
        helper.make_node("MatMul", ["down", f"{Q}.lora_B"], ["up"]),
        helper.make_node("Add", ["base", "up"], ["y"]),
    ]
    initializers = [helper.make_tensor(name, TensorProto.FLOAT, shape, []) for name, shape in names.items()]
    initializers.append(helper.make_tensor("w", TensorProto.FLOAT, [inputs, outputs], random(inputs, outputs, seed=5).flatten().tolist()))
    free = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [inputs, "r"] if name.endswith("A") else ["r", outputs]) for name, shape in names.items()]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs]), *free],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs])],
        initializers,
    )
    return onnx.helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def test_a_graph_with_inputs_of_these_names_computes_the_adapted_layer(tmp_path: Path) -> None:
    adapter = portable({Q: (24, 20)}, scale=1.3)
    onnx_adapter.write(adapter, tmp_path / "a.onnx_adapter")
    session = onnxruntime.InferenceSession(graph(24, 20), providers=["CPUExecutionProvider"])
    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(tmp_path / "a.onnx_adapter"))
    options.add_active_adapter(loaded)
    x = random(5, 20, seed=8)
    base = (x.double() @ random(20, 24, seed=5).double()).numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], base, rtol=1e-4, atol=1e-4)
    adapted = base + (x.double() @ delta(adapter.layers[Q]).T).numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()}, options)[0], adapted, rtol=1e-4, atol=1e-3)


def test_an_embedding_is_gathered_and_multiplied(tmp_path: Path) -> None:
    adapter = portable({EMBED: LLAMA_MODULES[EMBED]})
    tensors = onnx_adapter.render(adapter)
    rows = tensors[f"{EMBED}.lora_A"][[3, 0]].double() @ tensors[f"{EMBED}.lora_B"].double()
    torch.testing.assert_close(rows, delta(adapter.layers[EMBED])[[3, 0]])
    assert round_trip(adapter, tmp_path).layers[EMBED].kind == EMBEDDING


@pytest.mark.parametrize(("change", "named"), [({"bias": random(24)}, "biases"), ({"magnitude": random(24)}, "DoRA"), ({"kind": CONV}, "convolutions")])
def test_what_a_graph_input_cannot_say_is_refused(tmp_path: Path, change: dict, named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        onnx_adapter.write(Portable({Q: Layer(random(3, 20), random(24, 3), 1.0, **change)}), tmp_path / "a")


def test_other_exporters_names_and_alphas_are_refused() -> None:
    pair = {f"{Q}.lora_A": random(20, 3), f"{Q}.lora_B": random(3, 24)}
    for name in (f"{Q}.lora_A.weight", f"{Q}.lora_A.MatMul.weight"):
        with pytest.raises(UnsupportedError, match="another exporter"):
            onnx_adapter.read({name: random(20, 3)})
    with pytest.raises(UsageError, match="no alpha changes"):
        onnx_adapter.read(pair, hints=Hints(alpha=16))
    with pytest.raises(IncompatibleError, match="mystery"):
        onnx_adapter.read(pair | {"mystery": random(3)})
    with pytest.raises(IncompatibleError, match="no lora_B"):
        onnx_adapter.read({f"{Q}.lora_A": random(20, 3)})


@pytest.fixture
def raw(tmp_path: Path) -> bytes:
    onnx_adapter.write(portable({Q: (24, 20)}), tmp_path / "good")
    return (tmp_path / "good").read_bytes()


def test_broken_files_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bad"
    for content in (b"", b"GGUF", raw[:60], raw[:-30], raw[:8] + b"\xff" * (len(raw) - 8), b"PK\3\4" + raw[4:8] + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(CorruptError):
            onnx_adapter.load(path)
    with pytest.raises(MissingError):
        onnx_adapter.load(tmp_path / "none")


@pytest.mark.parametrize("rows", [4, 7, 10**6, 2**62, -1])
def test_sizes_that_the_data_does_not_have_are_refused(tmp_path: Path, raw: bytes, rows: int) -> None:
    place = raw.find(struct.pack("<qq", 3, 24))
    assert place > 0
    (tmp_path / "bad").write_bytes(raw[:place] + struct.pack("<q", rows) + raw[place + 8 :])
    with pytest.raises(CorruptError):
        onnx_adapter.load(tmp_path / "bad")


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    adapter = onnxruntime.AdapterFormat()
    adapter.set_parameters({f"{Q}.lora_A": onnxruntime.OrtValue.ortvalue_from_numpy(np.ones((2, 2), np.int64))})
    adapter.export_adapter(str(tmp_path / "a"))
    with pytest.raises(UnsupportedError, match="int64"):
        onnx_adapter.load(tmp_path / "a")
