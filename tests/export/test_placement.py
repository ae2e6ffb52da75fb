"""Where nodes run: read off sessions on the CPU, as it would be for any provider."""

import json

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qlora_tools.errors import CorruptError
from qlora_tools.export.placement import RECORD, Placed, assigned, crossings, host_nodes, profiled, strays
from qlora_tools.export.target import Target
from tests.export.decoder.families import MODELS
from tests.export.tiny_decoders import build, export

CPU_PROVIDER = "CPUExecutionProvider"


def session_of(path, **settings):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(*RECORD)
    for name, value in settings.items():
        setattr(options, name, value)
    return ort.InferenceSession(path, options, providers=[CPU_PROVIDER])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placed")
    export(build("llama", num_hidden_layers=1), folder, "int4", Target("cuda", "F16"))
    return folder / "model.onnx"


def test_every_node_of_a_session_on_the_cpu_is_on_the_cpu(exported):
    nodes = assigned(session_of(exported))
    kinds = {node.kind for node in nodes}
    assert {"MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization"} <= kinds
    assert {node.provider for node in nodes} == {CPU_PROVIDER}
    assert strays(nodes, "cpu") == ()


def test_shape_arithmetic_belongs_to_the_host_and_nothing_else_does(exported):
    model = ir.load(exported)
    host = host_nodes(model)
    kinds = {node.name: node.op_type for node in model.graph}
    assert {"Shape", "Concat", "Mod", "Min", "Sub"} <= {kinds[name] for name in host}
    assert not {"MatMulNBits", "GroupQueryAttention", "Reshape", "Add", "ReduceSum"} & {kinds[name] for name in host}


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma3-scaled-rope", "phi3-longrope-long", "gpt2", "mistral-window"])
def test_graphs_for_cuda_need_no_copies_between_host_and_device(name, standard, tmp_path):
    family, changes = MODELS[name]
    export(build(family, **changes), tmp_path, "int4", Target("cuda", "F16", standard))
    assert crossings(ir.load(tmp_path / "model.onnx")) == ()


def test_a_value_on_the_wrong_side_is_foretold():
    ids = ir.Value(name="ids", shape=ir.Shape((2, "S")), type=ir.TensorType(ir.DataType.INT64))
    length = ir.node("Shape", [ids], name="length")
    added = ir.node("Add", [ids, length.outputs[0]], name="added")
    shaped = ir.node("Reshape", [ids, added.outputs[0]], name="shaped")
    lifted = ir.node("Range", [length.outputs[0]] * 3, name="lifted")
    after = ir.node("Add", [ids, lifted.outputs[0]], name="after")
    graph = ir.Graph([ids], [shaped.outputs[0], after.outputs[0]], nodes=[length, added, shaped, lifted, after], opset_imports={"": 17}, name="g")
    assert crossings(ir.Model(graph, ir_version=8)) == ("added reads length", "shaped reads added")


def test_nodes_that_fell_back_are_named(exported):
    nodes, host = assigned(session_of(exported)), host_nodes(ir.load(exported))
    found = strays(nodes, "cuda", host)
    assert {node.kind for node in found} >= {"MatMulNBits", "GroupQueryAttention"} and not {node.name for node in found} & host
    products = [node for node in nodes if node.kind == "MatMulNBits"]
    fallen = [str(node) for node in strays(products, "cuda", host)]
    assert len(fallen) == len(products) and any(name.startswith("MatMulNBits `head/") and name.endswith("on CPUExecutionProvider") for name in fallen)


def test_copies_are_strays_wherever_they_run():
    copy = Placed("CUDAExecutionProvider", "Memcpy_token_1", "MemcpyFromHost")
    fine = Placed("CUDAExecutionProvider", "layers.0/down/MatMulNBits_9", "MatMulNBits")
    assert strays([fine, copy], "cuda") == (copy,)


def test_a_profile_names_the_nodes_that_ran(exported, tmp_path):
    session = session_of(exported, enable_profiling=True, profile_file_prefix=str(tmp_path / "run"))
    past = np.zeros((1, 2, 0, 16), np.float16)
    session.run(
        None,
        {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.ones((1, 3), np.int64), "past_key_values.0.key": past, "past_key_values.0.value": past},
    )
    ran = profiled(tmp_path / session.end_profiling())
    named = {node for node in ran if node.kind in ("MatMulNBits", "GroupQueryAttention", "SkipSimplifiedLayerNormalization")}
    assert named == {node for node in assigned(session) if node.kind in {node.kind for node in named}} and len(named) > 5


def test_what_is_no_profile_is_refused(tmp_path):
    for text in ("[", json.dumps({"a": 1}), json.dumps([1])):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(CorruptError, match="no profile"):
            profiled(tmp_path / "p.json")
