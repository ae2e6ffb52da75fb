"""One format's nodes in a graph of their own, run by ONNX Runtime."""

import onnx_ir as ir
import onnxruntime as ort
import torch

from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.dialects import dialect_of
from qlora_tools.export.external import ExternalWriter
from qlora_tools.export.formats.standard_blocks import StandardBlocks
from qlora_tools.export.nodes import CONTRIB, Nodes
from qlora_tools.export.target import CPU


def padded(parts, rows, stored, form, columns):
    """``parts`` with rows of zeros behind them, for formats that store more rows than the weight has."""
    if stored == rows:
        return parts
    zeros = form.encode("w", torch.zeros(stored - rows, columns))
    return {name: torch.cat([tensor, zeros[name]]) for name, tensor in parts.items()}


def draw_format(folder, form, w_OI: torch.Tensor, *, looked_up=False, bias_O=None, target=CPU):
    """``one.onnx`` and its data in ``folder``: input ``x`` (activations in the target's dtype, or ids), one output; and the weight it carries, fp32 [O, I]."""
    folder.mkdir(exist_ok=True)
    rows, columns = w_OI.shape
    specs = form.parts("w", rows, columns)
    parts = form.encode("w", w_OI)
    carried = form.decode("w", parts, columns, looked_up=looked_up)
    (folder / DATA_FILE).unlink(missing_ok=True)
    with ExternalWriter(folder / DATA_FILE, specs) as writer:
        for name, tensor in padded(parts, rows, rows if isinstance(form, StandardBlocks) else specs[0].shape[0], form, columns).items():
            writer.write(name, tensor)
    nodes = Nodes({spec.name: spec for spec in specs}, writer.offsets, DATA_FILE, target)
    if not looked_up:
        given = ir.Value(name="x", shape=ir.Shape(("T", columns)), type=ir.TensorType(target.float_type))
        bias = None if bias_O is None else nodes.constant(bias_O, target.float_type.numpy())
        result = form.multiply(nodes, given, "w", rows, columns, bias)
    else:
        given = ir.Value(name="x", shape=ir.Shape(("T",)), type=ir.TensorType(ir.DataType.INT64))
        result = form.gather(nodes, given, "w", columns)
    result.shape, result.type = ir.Shape(("T", None)), ir.TensorType(target.float_type)
    dialect = dialect_of(target)
    imports = dialect.domains() | ({} if target.standard else {CONTRIB: 1})
    graph = ir.Graph([given], [result], nodes=nodes.nodes, initializers=nodes.initializers, opset_imports=imports, name="one")
    model = ir.Model(graph, ir_version=dialect.ir_version)
    ir.save(model, folder / "one.onnx")
    return model, carried


def open_graph(path, **settings):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for name, value in settings.items():
        setattr(options, name, value)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_format(folder, form, w_OI: torch.Tensor, *, x_TI=None, ids_T=None, bias_O=None, target=CPU):
    """``x @ w.T (+ bias)`` or the looked-up rows, by the format's own nodes; and the weight it carries, fp32 [O, I]."""
    _, carried = draw_format(folder, form, w_OI, looked_up=ids_T is not None, bias_O=bias_O, target=target)
    session = open_graph(folder / "one.onnx")
    return session.run(None, {"x": x_TI if ids_T is None else ids_T})[0], carried
