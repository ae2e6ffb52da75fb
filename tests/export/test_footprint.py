"""What a drawn graph is foretold to take, held against what ONNX Runtime says of the same graph."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qlora_tools import api
from qlora_tools.errors import UnsupportedError
from qlora_tools.export.footprint import Seen, Weights, _Plan, decoder_feeds, planned_bytes, values_of, weights_of
from qlora_tools.live.outline import outline
from qlora_tools.verbs.graph_memory import SCHEMES, graph_models
from tests.conftest import build_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def graphs(model):
    checkpoint = outline(model)
    return {graph.setting: graph for graph in graph_models(checkpoint, checkpoint, "cpu")[0]}


@pytest.mark.parametrize("scheme", SCHEMES["cpu"])
def test_every_activation_has_the_size_that_the_runtime_reports(model, graphs, scheme, tmp_path):
    """Two sequences of seven tokens: the profiler tells the bytes that each node gives."""
    made = api.export(model=model, scheme=scheme, output=tmp_path / "export", verify=False, device="cpu")
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix, options.intra_op_num_threads = True, str(tmp_path / "profile"), 1
    session = ort.InferenceSession(made.output / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = decoder_feeds(graphs[scheme].shallow, batch=2, new=7, total=7)
    integers = {"input_ids": np.ones((2, 7), np.int64), "attention_mask": np.ones((2, 7), np.int64), "num_logits_to_keep": np.array([1], np.int64)}
    session.run(None, {name: integers.get(name, np.zeros(seen.shape, np.float32)) for name, seen in feeds.items()})
    events = json.loads(Path(session.end_profiling()).read_text())
    told = {event["args"]["node_name"] if "node_name" in event["args"] else event["name"].removesuffix("_kernel_time"): int(event["args"]["output_size"])
            for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")}  # fmt: skip
    values = values_of(graphs[scheme].shallow, feeds)
    ours = {node.name: sum(values[output.name].nbytes for output in node.outputs if output.name) for node in graphs[scheme].shallow.graph}
    common = set(told) & set(ours)
    assert len(common) > len(ours) * 0.6
    assert {name: told[name] for name in common} == {name: ours[name] for name in common}


def test_more_positions_take_more_room_and_a_single_token_little(graphs):
    model = graphs["int8"].shallow
    one, many, more = (planned_bytes(model, decoder_feeds(model, batch=batch, new=new, total=64)) for batch, new in ((1, 1), (1, 64), (3, 64)))
    assert one < many / 20 and more == pytest.approx(3 * many, rel=0.05)


def test_weights_are_counted_once_and_by_use(graphs):
    for scheme, graph in graphs.items():
        found = graph.weights
        assert found == weights_of(graph.shallow)
        counted, stored = found.packed + found.mapped + sum(found.tables), sum(spec.nbytes for spec in graph.export.plan.outputs)
        assert 0.97 * stored <= counted <= graph.file_bytes, scheme
    assert graphs["fp32"].weights.scales == graphs["fp32"].weights.integers == 0
    assert graphs["int4"].weights.scales > 0
    assert 0 <= graphs["w8a8"].weights.largest <= graphs["w8a8"].weights.integers


def test_tables_come_in_as_far_as_they_are_looked_up():
    table = Weights(tables=(100 << 20,))
    assert table.looked_up(0) == 0
    assert 0.9 * (1 << 21) <= table.looked_up(1) <= 1 << 21
    assert table.looked_up(1 << 20) == pytest.approx(100 << 20)


def test_a_place_is_the_smallest_gap_that_is_free():
    plan = _Plan()
    for name, size in (("a", 1024), ("b", 256), ("c", 512), ("d", 256)):
        plan.take(name, size)
    plan.give_back("a")
    plan.give_back("c")
    plan.take("e", 300)  # fits both gaps; the one of c is the smaller
    assert plan._places["e"] == (1280, 1792) and plan.size == 2048
    plan.take("f", 2000)
    assert plan._places["f"][0] == 2048


def test_a_shape_that_hangs_on_content_is_refused():
    for kind, count in (("Reshape", 2), ("Slice", 3), ("Range", 3), ("ConstantOfShape", 1), ("Unsqueeze", 2)):
        x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
        node = ir.node(kind, [x] * count, outputs=[ir.Value(name="y")], name=f"a/{kind}")
        model = ir.Model(ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 17}), ir_version=8)
        with pytest.raises(UnsupportedError, match=f"a/{kind}.*depends on what runs"):
            planned_bytes(model, {"x": Seen((2,), 8)})


def test_an_operator_nobody_knows_is_named():
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Mystery", [x], outputs=[ir.Value(name="y")])
    model = ir.Model(ir.Graph([x], list(node.outputs), nodes=[node], opset_imports={"": 17}), ir_version=8)
    with pytest.raises(UnsupportedError, match="Mystery"):
        planned_bytes(model, {"x": Seen((2,), 4)})
