"""Low-rank branches in a traced graph: the same inputs, files and stored factors that drawn decoders have (``decoder/branches.py``).

A branch stands beside every product with a weight that is a linear's and nothing else: behind its bias, so that the product and its bias
still become one node of the weight's format afterwards. Convolutions, tables and what the graph rearranges have no place for one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qlora_tools.export.decoder.branches import Branching, Place, fixed_names
from qlora_tools.export.decoder.matrices import Matrix
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.nodes import Nodes
from qlora_tools.export.traced.layout import Kind, Weight, uses_of
from qlora_tools.export.traced.rewrite import bias_of
from qlora_tools.models.decoder import Piece

_PRODUCTS = frozenset({Kind.MULTIPLY, Kind.MULTIPLY_TURNED})


def traced_places(graph: ir.Graph, empty: Mapping[str, ir.Value], weights: Mapping[str, Weight]) -> dict[str, list[Place]]:
    """Module path in the checkpoint -> its place, for every linear of ``graph``; each is a matrix of its own, of the module's name."""
    found: dict[str, list[Place]] = {}
    for weight in dict.fromkeys(weights.values()):
        uses = [use for live in weight.live if live in empty for use in uses_of(empty[live], graph)]
        if len(weight.shape) == 2 and weight.name.endswith(".weight") and uses and all(use.kind in _PRODUCTS for use in uses):
            turned = uses[0].kind is Kind.MULTIPLY_TURNED
            columns, rows = weight.shape if turned else weight.shape[::-1]
            module = weight.name.removesuffix(".weight")
            form = weight.form or Dense(weight.dtype, weight.dtype)
            found[module] = [Place(Matrix(module, form, (Piece(module, 0, rows, rows),), columns, (False,)), 0, rows)]
    return found


def live_places(places: Mapping[str, list[Place]], weights: Mapping[str, Weight]) -> dict[str, list[Place]]:
    """The same by the paths of the live model."""
    return {live.removesuffix(".weight"): places[module] for live, weight in weights.items() if (module := weight.name.removesuffix(".weight")) in places}


def matrices_at(places: Mapping[str, list[Place]]) -> list[Matrix]:
    """The matrices of ``places``."""
    return [place.matrix for several in places.values() for place in several]


def put_branches(
    model: ir.Model, nodes: Nodes, places: Mapping[str, list[Place]], weights: Mapping[str, Weight], empty: Mapping[str, ir.Value], kept: Iterable[str]
) -> None:
    """Add to every product what its branches give; in place. To be done while the weights are still as they were traced, so before ``put_weights``."""
    graph, branching = model.graph, Branching(frozenset(kept))
    vectors = {value: weights[live].name for live, value in empty.items() if len(weights[live].shape) == 1}
    order = {node: number for number, node in enumerate(graph)}
    products = [(use.node, places[module][0].matrix) for module, value in _branched(places, weights, empty, nodes, kept) for use in uses_of(value, graph)]
    for node, matrix in sorted(products, key=lambda pair: order[pair[0]]):
        x, last = node.inputs[0], node
        assert x is not None
        if len(node.inputs) < 3 and (added := bias_of(node.outputs[0], matrix.total_rows, vectors)) is not None:
            last = added[1]
        first, old = len(nodes.nodes), last.outputs[0]
        users = list(old.uses())
        with nodes.scope(matrix.name):
            new = branching.add(nodes, matrix, x, old)
        made = nodes.nodes[first:]
        new.shape, new.type = old.shape, old.type
        for user, index in users:
            user.replace_input_with(index, new)
        if old.is_graph_output():
            graph.outputs[list(graph.outputs).index(old)] = new
            old.name, new.name = f"{old.name}/without branches", old.name
        graph.insert_after(last, made)
    for value in branching.inputs:
        graph.inputs.append(value)
        graph.register_initializer(value)


def _branched(
    places: Mapping[str, list[Place]], weights: Mapping[str, Weight], empty: Mapping[str, ir.Value], nodes: Nodes, kept: Iterable[str]
) -> Iterable[tuple[str, ir.Value]]:
    """(module, initializer) of the weights that have a branch."""
    wanted = set(kept)
    for live, value in empty.items():
        module = weights[live].name.removesuffix(".weight")
        if module in places and (module in wanted or nodes.holds(fixed_names(module)[0])):
            yield module, value
