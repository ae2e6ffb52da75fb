"""The same graph in fp32, over the same bytes: what a machine without the provider can run of a 16-bit export.

The CPU has no bf16 kernels and slow fp16 ones. A twin has the nodes of its original, with every 16-bit float turned into fp32: inputs,
outputs and small constants change their dtype, stored tensors stay where they lie and are read through a ``Cast``. So a check of the twin checks
wiring, attributes and every exported byte; what it leaves out is the rounding of activations to 16 bits and the provider's own kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qlora_tools.export.target import Target

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
#: Attributes that hold a dtype.
_DTYPES = ("to", "dtype", "output_dtype", "stash_type")


def runs_here(target: Target) -> bool:
    """Whether this machine has the provider: its library, and a device to run on."""
    if target.provider == "cpu":
        return target.compute == "F32"
    import torch

    return torch.cuda.is_available() and "CUDAExecutionProvider" in ort.get_available_providers()


def twin(model: ir.Model) -> ir.Model:
    """``model`` in fp32; changed in place and returned. Stored tensors keep names, dtypes and places."""
    for graph in _graphs(model.graph):
        for value in _values(graph):
            if value.dtype in NARROW and value.const_value is None:
                value.dtype = ir.DataType.FLOAT
        for node in graph:
            _widen_attributes(node)
        given = set(graph.inputs)
        for value in list(graph.initializers.values()):
            if value.dtype not in NARROW:
                continue
            if value in given or not isinstance(value.const_value, ir.ExternalTensor):
                _widen_constant(value)
            else:
                _cast(graph, value)
    return model


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """``graph`` and those inside its nodes."""
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _graphs(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for inner in attribute.as_graphs():
                    yield from _graphs(inner)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _widen_attributes(node: ir.Node) -> None:
    """Casts to 16 bits become casts to fp32, tensors in attributes are widened."""
    for name, attribute in list(node.attributes.items()):
        if name in _DTYPES and attribute.type == ir.AttributeType.INT and attribute.value in NARROW:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in NARROW:
            node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))


def _widened(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _widen_constant(value: ir.Value) -> None:
    if value.const_value is not None:
        value.const_value = _widened(value.const_value)
    value.dtype = ir.DataType.FLOAT


def _cast(graph: ir.Graph, value: ir.Value) -> None:
    """Everyone who reads the stored tensor ``value`` reads it through a Cast, which comes first in the graph."""
    wide = ir.Value(name=f"{value.name} in fp32", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[wide], name=f"{value.name}/widen")
    for user, index in list(value.uses()):
        if user is not node:
            user.replace_input_with(index, wide)
    first = next(iter(graph), None)
    if first is None:
        graph.append(node)
    else:
        graph.insert_before(first, node)
