"""The external data file: layout, coverage, and offsets beyond 4 GiB."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.dialects.contrib import Contrib
from qlora_tools.export.external import ExternalWriter, place
from qlora_tools.export.nodes import CONTRIB, Nodes
from qlora_tools.specs import TensorSpec

SPECS = (TensorSpec("a", "F32", (3, 5)), TensorSpec("b", "U8", (4097,)), TensorSpec("c", "F32", ()), TensorSpec("d", "I8", (2, 2)))


def test_tensors_lie_in_order_on_pages_of_their_own():
    assert place(SPECS) == ({"a": 0, "b": 4096, "c": 12288, "d": 16384}, 20480)


def test_rows_may_come_in_any_order_and_the_rest_is_zero(tmp_path):
    a = torch.arange(15, dtype=torch.float32).reshape(3, 5)
    with ExternalWriter(tmp_path / "data", SPECS) as writer:
        writer.write("a", a[1:], row=1)
        writer.write("d", torch.tensor([[1, 2], [3, 4]], dtype=torch.int8))
        writer.write("b", torch.full((4097,), 7, dtype=torch.uint8))
        writer.write("c", torch.tensor(2.5))
        writer.write("a", a[:1])
    data = (tmp_path / "data").read_bytes()
    assert len(data) == 20480 and np.array_equal(np.frombuffer(data, np.float32, 15), np.arange(15))
    assert data[60:4096] == bytes(4036) and data[16384:16388] == bytes([1, 2, 3, 4])
    assert (tmp_path / "data").stat().st_nlink == 1 and not (tmp_path / "data").is_symlink()


def test_a_tensor_never_written_is_noticed_on_closing(tmp_path):
    with pytest.raises(AssertionError, match="not written or written twice: b, c, d"), ExternalWriter(tmp_path / "data", SPECS) as writer:
        writer.write("a", torch.zeros(3, 5))


def test_wrong_dtype_shape_or_row_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="planned a F32"), ExternalWriter(tmp_path / "x", SPECS) as writer:
        writer.write("a", torch.zeros(3, 5, dtype=torch.float16))
    with pytest.raises(AssertionError, match="at row 2"), ExternalWriter(tmp_path / "y", SPECS) as writer:
        writer.write("a", torch.zeros(2, 5), row=2)


def test_a_file_that_is_there_is_not_appended_to(tmp_path):
    (tmp_path / "data").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        ExternalWriter(tmp_path / "data", SPECS)
    assert (tmp_path / "data").read_bytes() == b"old"


def test_onnxruntime_reads_weights_beyond_four_gibibytes(tmp_path):
    specs = (TensorSpec("pad", "U8", (5 << 30,)), TensorSpec("w", "F32", (2, 3)))
    offsets, size = place(specs)
    assert offsets["w"] == 5 << 30
    with (tmp_path / DATA_FILE).open("wb") as stream:  # sparse: takes no room on the disk
        stream.truncate(size)
        stream.seek(offsets["w"])
        stream.write(np.arange(6, dtype=np.float32).tobytes())
    nodes = Nodes({spec.name: spec for spec in specs}, offsets, DATA_FILE)
    ids = ir.Value(name="ids", shape=ir.Shape(("T",)), type=ir.TensorType(ir.DataType.INT64))
    rows = nodes.op("Gather", nodes.stored("w"), ids, axis=0, outputs=["rows"])
    rows.shape, rows.type = ir.Shape(("T", 3)), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([ids], [rows], nodes=nodes.nodes, initializers=nodes.initializers, opset_imports={"": Contrib.opset, CONTRIB: 1}, name="far")
    ir.save(ir.Model(graph, ir_version=Contrib.ir_version), tmp_path / "far.onnx")
    session = ort.InferenceSession(tmp_path / "far.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"ids": np.array([1])})[0].tolist() == [[3, 4, 5]]
