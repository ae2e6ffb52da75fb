"""Puts the carried weights into a traced graph: external initializers in the place of empty ones, the formats' nodes in the place of products and look-ups.

What onnxruntime fuses by itself when it loads a graph is left to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.nodes import CONTRIB, Nodes
from qlora_tools.export.traced.layout import Kind, Use, Weight, uses_of


def put_weights(model: ir.Model, nodes: Nodes, weights: Mapping[str, Weight], empty: Mapping[str, ir.Value], constants: Iterable[str] = ()) -> None:
    """Rewrite ``model`` in place. ``weights``: by live name, for each of the initializers in ``empty``. ``constants``: initializers that are planned
    tensors themselves."""
    graph = model.graph
    for name in constants:
        graph.initializers.pop(name).replace_all_uses_with(nodes.stored(name), replace_graph_outputs=True)
    order = {node: number for number, node in enumerate(graph)}
    formed = [(use, weights[live]) for live, value in empty.items() if weights[live].form is not None for use in uses_of(value, graph)]
    for use, weight in sorted(formed, key=lambda pair: order[pair[0].node]):
        with nodes.scope(weight.name.removesuffix(".weight")):
            (_look_up if use.kind is Kind.LOOKUP else _multiply)(graph, nodes, use, weight, _names(weights, empty))
    for live, value in empty.items():
        if weights[live].form is None:
            _replace_plain(graph, nodes, value, weights[live])
        graph.initializers.pop(str(value.name))
    RemoveUnusedNodesPass()(model)
    for value in nodes.initializers:
        if any(True for _ in value.uses()):
            graph.register_initializer(value)
    if any(node.domain == CONTRIB for node in graph):
        model.opset_imports[CONTRIB] = 1


def _names(weights: Mapping[str, Weight], empty: Mapping[str, ir.Value]) -> dict[ir.Value, str]:
    """Initializer -> name of the planned tensor that takes its place, where that has the same form."""
    return {value: weights[live].name for live, value in empty.items() if weights[live].form is None and not weights[live].turned}


def _replace_plain(graph: ir.Graph, nodes: Nodes, value: ir.Value, weight: Weight) -> None:
    """``value`` by the stored tensor; where that is stored with its axes exchanged, the transposes that did so by the tensor itself."""
    stored = nodes.stored(weight.name)
    if not weight.turned:
        value.replace_all_uses_with(stored, replace_graph_outputs=True)
        return
    for node in list(value.consumers()):
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)


def _look_up(graph: ir.Graph, nodes: Nodes, use: Use, weight: Weight, names: Mapping[ir.Value, str]) -> None:
    assert weight.form is not None
    first, ids, old = len(nodes.nodes), use.node.inputs[1], use.node.outputs[0]
    assert ids is not None
    found = weight.form.gather(nodes, _flat(nodes, ids, [-1]), weight.name, weight.columns)
    if _rank(ids) != 1:
        found = nodes.op("Reshape", found, nodes.op("Concat", nodes.op("Shape", ids), nodes.constant([weight.columns]), axis=0))
    _swap(graph, nodes.nodes[first:], [use.node], old, found)


def _multiply(graph: ir.Graph, nodes: Nodes, use: Use, weight: Weight, names: Mapping[ir.Value, str]) -> None:
    """A product and, where one follows, the addition of its bias."""
    assert weight.form is not None
    first, x, old = len(nodes.nodes), use.node.inputs[0], use.node.outputs[0]
    assert x is not None
    replaced = [use.node]
    bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
    if bias is None and (added := bias_of(old, weight.rows, names)) is not None:
        bias, addition = added
        replaced, old = [use.node, addition], addition.outputs[0]
    known = nodes.stored(names[bias]) if bias is not None and bias in names else bias
    direct = _rank(x) == 2 or (isinstance(weight.form, Blocks) and weight.form.compute == "F32" and weight.form.multiple == 1)
    flat = x if direct else _flat(nodes, x, [-1, weight.columns])
    y = weight.form.multiply(nodes, flat, weight.name, weight.rows, weight.columns, known)
    if not direct:
        lead = nodes.once("lead", x, lambda: (nodes.op("Shape", x, end=-1),))[0]
        y = nodes.op("Reshape", y, nodes.op("Concat", lead, nodes.constant([weight.rows]), axis=0))
    _swap(graph, nodes.nodes[first:], replaced, old, y)


def bias_of(product: ir.Value, rows: int, names: Mapping[ir.Value, str]) -> tuple[ir.Value, ir.Node] | None:
    """The stored vector that is added to ``product`` and to nothing else of it, and the node that adds it."""
    users = list(product.uses())
    if len(users) != 1 or product.is_graph_output() or users[0][0].op_type != "Add":
        return None
    other = users[0][0].inputs[1 - users[0][1]]
    if other not in names or other is None or other.shape is None or list(other.shape) != [rows]:
        return None
    return other, users[0][0]


def _flat(nodes: Nodes, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    if _rank(value) == len(shape):
        return value
    flat: ir.Value = nodes.once(f"flat {list(shape)}", value, lambda: (nodes.op("Reshape", value, nodes.constant(list(shape))),))[0]
    return flat


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _swap(graph: ir.Graph, made: Sequence[ir.Node], replaced: Sequence[ir.Node], old: ir.Value, new: ir.Value) -> None:
    """Nodes ``made`` in the place of ``replaced``, whose result ``old`` is now ``new``."""
    for node in made:
        _to_later_opset(node, graph)
    graph.insert_before(replaced[0], made)
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        old.name, new.name = f"{old.name}/replaced", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(list(reversed(replaced)), safe=True)


def _to_later_opset(node: ir.Node, graph: ir.Graph) -> None:
    """Formats are written for decoder graphs, of opset 17; since 18 maximum and minimum take their axes as an input."""
    if node.op_type in ("ReduceMax", "ReduceMin") and "axes" in node.attributes:
        axes = ir.tensor(list(node.attributes.pop("axes").as_ints()), name=f"{node.name}/axes")
        value = ir.Value(name=axes.name, shape=axes.shape, type=ir.TensorType(axes.dtype), const_value=axes)
        graph.register_initializer(value)
        node.resize_inputs(2)
        node.replace_input_with(1, value)
