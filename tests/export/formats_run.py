"""One format's nodes in a graph of their own, run by ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.dialects.contrib import Contrib
from qlora_tools.export.external import ExternalWriter
from qlora_tools.export.nodes import CONTRIB, Nodes


def run_format(folder, form, w_OI: torch.Tensor, *, x_TI=None, ids_T=None, bias_O=None):
    """``x @ w.T (+ bias)`` or the looked-up rows, by the format's own nodes; and the weight it carries, fp32 [O, I]."""
    folder.mkdir(exist_ok=True)
    rows, columns = w_OI.shape
    specs = form.parts("w", rows, columns)
    parts = form.encode("w", w_OI)
    (folder / DATA_FILE).unlink(missing_ok=True)
    with ExternalWriter(folder / DATA_FILE, specs) as writer:
        for name, tensor in parts.items():
            writer.write(name, tensor)
    nodes = Nodes({spec.name: spec for spec in specs}, writer.offsets, DATA_FILE)
    if ids_T is None:
        given = ir.Value(name="x", shape=ir.Shape(("T", columns)), type=ir.TensorType(ir.DataType.FLOAT))
        bias = None if bias_O is None else nodes.constant(bias_O, np.float32)
        result = form.multiply(nodes, given, "w", rows, columns, bias)
    else:
        given = ir.Value(name="x", shape=ir.Shape(("T",)), type=ir.TensorType(ir.DataType.INT64))
        result = form.gather(nodes, given, "w", columns)
    result.shape, result.type = ir.Shape(("T", None)), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([given], [result], nodes=nodes.nodes, initializers=nodes.initializers, opset_imports={"": Contrib.opset, CONTRIB: 1}, name="one")
    ir.save(ir.Model(graph, ir_version=Contrib.ir_version), folder / "one.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(folder / "one.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x_TI if ids_T is None else ids_T})[0], form.decode("w", parts, columns, looked_up=ids_T is not None)
