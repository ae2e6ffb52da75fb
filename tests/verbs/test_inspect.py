"""``inspect`` looks at other people's files: what it cannot read it names."""

from __future__ import annotations

import onnx
import pytest

from qlora_tools import api
from qlora_tools.errors import CorruptError, MissingError
from qlora_tools.verbs.inspect import read_graph


@pytest.fixture
def graph(tmp_path):
    """An export's folder as far as `inspect` needs it."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    onnx.save_model(onnx.helper.make_model(onnx.helper.make_graph([], "a graph with a long name", [value], [value])), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_graph_is_read_and_a_part_of_one_is_corrupt(graph):
    assert api.inspect(path=graph.parent).facts["inputs"] == ["x"]
    graph.write_bytes(graph.read_bytes()[:-3])
    with pytest.raises(CorruptError, match=r"model\.onnx is not a whole ONNX graph"):
        api.inspect(path=graph.parent)
    with pytest.raises(MissingError, match="gone.onnx"):
        read_graph(graph.with_name("gone.onnx"))


@pytest.mark.parametrize(("rows", "count"), [("[1, 2]", 2), ("3", 0), ("null", 0)])
def test_a_benchmark_of_whatever_content_is_described(tmp_path, rows, count):
    (tmp_path / "bench.json").write_text(f'{{"schema": "x", "rows": {rows}}}')
    assert api.inspect(path=tmp_path).facts == {"schema": "x", "rows": count}
