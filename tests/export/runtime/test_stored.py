"""Bytes of a graph's weights, beside the package onnx, for graphs of every origin."""

import contextlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qlora_tools.errors import CorruptError
from qlora_tools.export.runtime.stored import initializer_bytes
from tests.export.runtime.small_graphs import held_bytes, summing
from tests.export.tiny_decoders import build, export


def graph(initializers):
    node = helper.make_node("Identity", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    return helper.make_model(helper.make_graph([node], "g", [x], [y], initializer=initializers, doc_string="words"))


def beside(name, location, offset, nbytes, dims=(4,), kind=TensorProto.FLOAT):
    """A tensor of another file. ``nbytes``: ``None`` where the graph leaves it out."""
    made = TensorProto(name=name, dims=dims, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": nbytes}.items():
        if value is not None:
            made.external_data.add(key=key, value=str(value))
    return made


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_an_export_counts_its_tensors_and_not_the_room_between_them(scheme, tmp_path):
    planned = export(build("llama"), tmp_path, scheme)
    found = initializer_bytes(tmp_path / "model.onnx")
    stored = sum(spec.nbytes for spec in planned.plan.outputs)
    assert found == held_bytes(tmp_path / "model.onnx") and 0 <= found - stored < 4096  # what lies in the graph itself
    assert found < (tmp_path / "model.onnx.data").stat().st_size


def test_weights_that_another_tool_put_into_a_file_of_another_name_are_counted(tmp_path):
    values = np.ones((100, 30), np.float32)
    path = tmp_path / "model.onnx"
    onnx.save_model(graph([numpy_helper.from_array(values, "w")]), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    assert (tmp_path / "model.onnx_data").stat().st_size == values.nbytes == initializer_bytes(path)


def test_weights_inside_the_graph_are_counted_in_every_field_that_holds_them(tmp_path):
    tensors = [
        numpy_helper.from_array(np.ones((3, 5), np.float16), "raw"),
        helper.make_tensor("floats", TensorProto.FLOAT, [7], np.ones(7)),
        helper.make_tensor("integers", TensorProto.INT64, [2, 2], [1, 2, 3, 4]),
        helper.make_tensor("halves", TensorProto.BFLOAT16, [5], np.ones(5)),
        TensorProto(name="nibbles", dims=[7], data_type=TensorProto.INT4, int32_data=[1, 2, 3, 4]),
        helper.make_tensor("scalar", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("empty", TensorProto.FLOAT, [0, 4], []),
        helper.make_tensor("words", TensorProto.STRING, [1], [b"abc"]),
    ]
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(tensors).SerializeToString())
    assert initializer_bytes(path) == 30 + 28 + 32 + 10 + 4 + 4
    assert initializer_bytes(summing(tmp_path / "e") / "model.onnx") == held_bytes(tmp_path / "e/model.onnx")


def test_tensors_over_the_same_bytes_of_a_file_count_once(tmp_path):
    tensors = [beside("head", "d", 0, 16), beside("table", "d", 0, 16), beside("other", "d", 16, None), beside("elsewhere", "e", 0, 16)]
    path = tmp_path / "model.onnx"
    path.write_bytes(graph(tensors).SerializeToString())
    assert initializer_bytes(path) == 16 + 16 + 16


@pytest.mark.parametrize("nbytes", ["-5", "many"])
def test_lengths_that_are_none_are_refused(tmp_path, nbytes):
    path = tmp_path / "model.onnx"
    path.write_bytes(graph([beside("w", "d", 0, nbytes)]).SerializeToString())
    with pytest.raises(CorruptError, match=r"model\.onnx is not an ONNX graph"):
        initializer_bytes(path)


@pytest.mark.parametrize("damage", [b"", b"not a graph", b"\x3a\xff\xff\xff\x7f", b"\xff" * 20, b"\x3a\x02\x2a\x09"])
def test_what_is_no_graph_is_refused(tmp_path, damage):
    path = tmp_path / "model.onnx"
    path.write_bytes(damage)
    with pytest.raises(CorruptError, match=r"model\.onnx is not an ONNX graph"):
        initializer_bytes(path)


def test_a_graph_cut_off_anywhere_is_refused_or_counted_and_never_an_accident(tmp_path):
    whole = graph([numpy_helper.from_array(np.ones(9, np.float32), "w"), beside("v", "d", 0, 16)]).SerializeToString()
    path = tmp_path / "model.onnx"
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with contextlib.suppress(CorruptError):
            assert 0 <= initializer_bytes(path) <= 52
