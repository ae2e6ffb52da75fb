"""The nodes of a mixture of experts: the router, then all experts in one node, or one after the other over the tokens that chose them.

Scores are softmaxed in fp32, as transformers does. Of experts one by one only those tokens are multiplied that chose them; an expert that nobody
chose multiplies a matrix of no rows.

Legend: T tokens, H hidden, E experts, K experts per token, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qlora_tools.export.decoder.matrices import Feed, Matrix, Mixture
from qlora_tools.export.formats.experts import Stack, experts_node
from qlora_tools.export.nodes import Nodes
from qlora_tools.models.experts import Experts


@dataclass(frozen=True, eq=False)
class Products:
    """How the graph multiplies: by one matrix, and by a whole feed-forward."""

    multiply: Callable[[Matrix, ir.Value], ir.Value]
    feed: Callable[[Feed, ir.Value], ir.Value]


def draw_mixture(nodes: Nodes, mixture: Mixture, experts: Experts, x_TH: ir.Value, products: Products) -> ir.Value:
    """[T, H] -> [T, H]."""
    scores_TE = products.multiply(mixture.router, x_TH)
    with nodes.scope("experts"):
        draw = _together if mixture.together else _one_by_one
        y_TH = draw(nodes, mixture, experts, x_TH, scores_TE, products)
    if mixture.shared is None:
        return y_TH
    with nodes.scope("shared"):
        shared_TH = products.feed(mixture.shared, x_TH)
        if mixture.shared_scale is not None:
            shared_TH = nodes.op("Mul", nodes.op("Sigmoid", products.multiply(mixture.shared_scale, x_TH)), shared_TH)
        return nodes.op("Add", y_TH, shared_TH)


def _softmax(nodes: Nodes, scores_TE: ir.Value) -> ir.Value:
    """In fp32, whatever the graph computes in."""
    if nodes.target.compute == "F32":
        return nodes.op("Softmax", scores_TE, axis=-1)
    return nodes.op("Softmax", nodes.op("Cast", scores_TE, to=ir.DataType.FLOAT), axis=-1)


def _computed(nodes: Nodes, x: ir.Value) -> ir.Value:
    """From fp32 to what the graph computes in."""
    return x if nodes.target.compute == "F32" else nodes.op("Cast", x, to=nodes.target.float_type)


def _together(nodes: Nodes, mixture: Mixture, experts: Experts, x_TH: ir.Value, scores_TE: ir.Value, products: Products) -> ir.Value:
    (feed,) = mixture.experts
    (gate_up,) = feed.into
    stacks = [Stack(matrix.name, matrix.format, experts.count, matrix.total_rows // experts.count, matrix.columns) for matrix in (gate_up, feed.down)]
    weights_TE = _computed(nodes, _softmax(nodes, scores_TE))
    y_TH: ir.Value = experts_node(nodes, x_TH, scores_TE, weights_TE, *stacks, per_token=experts.per_token, normalized=experts.normalized)
    return y_TH


def _one_by_one(nodes: Nodes, mixture: Mixture, experts: Experts, x_TH: ir.Value, scores_TE: ir.Value, products: Products) -> ir.Value:
    """Each expert's rows are picked out, multiplied, weighed and added back at their place."""
    best_TK, chosen_TK = nodes.op("TopK", _softmax(nodes, scores_TE), nodes.constant([experts.per_token]), axis=-1, outputs=2)
    if experts.normalized:
        best_TK = nodes.op("Div", best_TK, nodes.op("ReduceSum", best_TK, nodes.constant([1]), keepdims=1))
    best_TK = _computed(nodes, best_TK)
    y_TH = nodes.op("Mul", x_TH, nodes.number(0.0))
    for number, feed in enumerate(mixture.experts):
        with nodes.scope(str(number)):
            hits_2N = nodes.op("NonZero", nodes.op("Equal", chosen_TK, nodes.constant(number)))
            tokens_1N = nodes.op("Slice", hits_2N, nodes.constant([0]), nodes.constant([1]), nodes.constant([0]))
            tokens_N1 = nodes.op("Transpose", tokens_1N, perm=[1, 0])
            found_NH = products.feed(feed, nodes.op("GatherND", x_TH, tokens_N1))
            weight_N1 = nodes.op("Unsqueeze", nodes.op("GatherND", best_TK, nodes.op("Transpose", hits_2N, perm=[1, 0])), nodes.constant([1]))
            y_TH = nodes.op("ScatterND", y_TH, tokens_N1, nodes.op("Mul", found_NH, weight_N1), reduction="add")
    return y_TH
