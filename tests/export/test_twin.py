"""Twins: a 16-bit graph in fp32 over the same bytes."""

import hashlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.runtime import DecoderSession
from qlora_tools.export.target import Target
from qlora_tools.export.twin import runs_here, twin
from tests.export.formats_run import open_graph
from tests.export.tiny_decoders import build, carry, export, relative_error, tokens

NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def scored(folder, ids, name="model.onnx"):
    session = DecoderSession(folder, threads=1, file_name=name)
    try:
        return session.score(ids).astype(np.float32)
    finally:
        session.close()


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "nf4"])
def test_a_twin_computes_what_its_fp16_original_computes(scheme, tmp_path):
    tiny = build("llama", tie_word_embeddings=True)
    planned = export(tiny, tmp_path, scheme, Target("cuda", "F16"))
    before = hashlib.sha256((tmp_path / DATA_FILE).read_bytes()).digest()
    ids = tokens(tiny, 2, 11)
    original = scored(tmp_path, ids)
    ir.save(twin(ir.load(tmp_path / "model.onnx")), tmp_path / "twin.onnx")
    found = scored(tmp_path, ids, "twin.onnx")
    assert hashlib.sha256((tmp_path / DATA_FILE).read_bytes()).digest() == before and not (tmp_path / "twin.onnx.data").exists()
    assert relative_error(found, original) < 0.01
    assert relative_error(found, carry(tiny, planned).logits(ids)) < 2e-3


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4", "nf4"])
def test_a_twin_runs_where_bf16_does_not(scheme, tmp_path):
    tiny = build("qwen3", head_dim=16)
    planned = export(tiny, tmp_path, scheme, Target("cuda", "BF16"))
    ir.save(twin(ir.load(tmp_path / "model.onnx")), tmp_path / "twin.onnx")
    ids = tokens(tiny, 2, 11)
    assert relative_error(scored(tmp_path, ids, "twin.onnx"), carry(tiny, planned).logits(ids)) < 0.02


def test_only_stored_tensors_and_their_casts_stay_narrow(tmp_path):
    export(build("llama", attention_bias=True), tmp_path, "int4", Target("cuda", "BF16"))
    ir.save(twin(ir.load(tmp_path / "model.onnx")), tmp_path / "twin.onnx")
    graph = onnx.load(tmp_path / "twin.onnx", load_external_data=False).graph
    assert not any(value.type.tensor_type.elem_type in NARROW for value in (*graph.input, *graph.output))
    narrow = {tensor.name for tensor in graph.initializer if tensor.data_type in NARROW}
    assert narrow and all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer if tensor.name in narrow)
    readers = {node.op_type for node in graph.node for name in node.input if name in narrow}
    assert readers == {"Cast"}


def test_constants_casts_and_optional_inputs_are_widened(tmp_path):
    kind, half = ir.DataType.FLOAT16, np.float16
    x = ir.Value(name="x", shape=ir.Shape((2,)), type=ir.TensorType(kind))
    optional = ir.Value(name="o", shape=ir.Shape((2,)), type=ir.TensorType(kind), const_value=ir.tensor(np.ones(2, half), name="o"))
    constant = ir.Value(name="c", shape=ir.Shape((2,)), type=ir.TensorType(kind), const_value=ir.tensor(np.full(2, 0.5, half), name="c"))
    inner = ir.node("Constant", [], {"value": ir.tensor(np.full(2, 3, half))})
    narrowed = ir.node("Cast", [inner.outputs[0]], {"to": kind})
    nodes = [inner, narrowed]
    total = x
    for other in (optional, constant, narrowed.outputs[0]):
        nodes.append(ir.node("Add", [total, other]))
        total = nodes[-1].outputs[0]
    total.name, total.type, total.shape = "y", ir.TensorType(kind), ir.Shape((2,))
    graph = ir.Graph([x, optional], [total], nodes=nodes, initializers=[optional, constant], opset_imports={"": 17}, name="g")
    ir.save(twin(ir.Model(graph, ir_version=8)), tmp_path / "one.onnx")
    found = open_graph(tmp_path / "one.onnx").run(None, {"x": np.zeros(2, np.float32)})[0]
    assert found.dtype == np.float32 and found.tolist() == [4.5, 4.5]


def test_a_twin_of_a_graph_in_fp32_is_that_graph(tmp_path):
    export(build("llama"), tmp_path, "int4")
    ir.save(ir.load(tmp_path / "model.onnx"), tmp_path / "plain.onnx")
    ir.save(twin(ir.load(tmp_path / "model.onnx")), tmp_path / "twin.onnx")
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "twin.onnx").read_bytes()


def test_fp32_on_the_cpu_always_runs_here():
    assert runs_here(Target())
    if not torch.cuda.is_available():
        assert not runs_here(Target("cuda", "F16"))
