"""The decoder's graph, node by node.

Between embedding and logits everything is [B, S, features], as attention wants it, unless an operator on the way takes
tokens in one row only (``Layout.flat``): then it is [T, features] with T = batch * sequence, and attention's inputs and
output are reshaped. Inputs and outputs carry the names that onnxruntime-genai and Optimum look for. ``num_logits_to_keep`` is an input that most callers never see: it has a default (0: all
positions), and a runtime that sets it to 1 gets the logits of the last position only. How norms, activations
and attention are spelt is the dialect's business.

Legend: B batch, S new positions, T = B * S.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from qlora_tools import __version__
from qlora_tools.export.decoder.branches import Branching
from qlora_tools.export.decoder.experts import Products, draw_mixture
from qlora_tools.export.decoder.layout import Layer, Layout
from qlora_tools.export.decoder.matrices import Feed, Matrix, Mixture
from qlora_tools.export.dialects import dialect_of
from qlora_tools.export.dialects.dialect import AttentionCall, Dialect, NormCall, Rotary
from qlora_tools.export.nodes import Nodes
from qlora_tools.export.target import CPU, Target
from qlora_tools.models.decoder import Decoder
from qlora_tools.models.options import GLOBAL
from qlora_tools.specs import TensorSpec

DATA_FILE = "model.onnx.data"
KEEP = "num_logits_to_keep"
#: Metadata entry of graphs that turn at other frequencies once a sequence is longer than this: what was cached before does not fit what comes after.
SWITCH = "rotary_switch"
_END = np.iinfo(np.int64).max


def cache_names(kind: str) -> tuple[str, str]:
    """Stored names of the cosines and sines of the rotation ``kind`` (a key of ``Decoder.ropes``)."""
    base = "rotary" if kind == GLOBAL else f"rotary.{kind}"
    return f"{base}.cos", f"{base}.sin"


def build_graph(
    decoder: Decoder, layout: Layout, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], target: Target = CPU, kept: Collection[str] = ()
) -> ir.Model:
    """The model whose initializers lie at ``offsets`` of :data:`DATA_FILE`. ``kept``: matrices with adapter inputs, see :mod:`.branches`."""
    nodes = Nodes(specs, offsets, DATA_FILE, target)
    dialect = dialect_of(target)
    inputs, pasts = _inputs(decoder, target)
    ids, mask, keep = inputs[0], inputs[1], inputs[-1]
    drawing = _Drawing(nodes, decoder, dialect, dialect.prepare(nodes, ids, mask), Branching(kept), ids, layout.flat)
    stream = _Stream(drawing, _embed(drawing, layout))
    presents: list[ir.Value] = []
    for index, layer in enumerate(layout.layers):
        with nodes.scope(f"layers.{index}"):
            attended, present = _attention(drawing, layer, index, stream.read("norm_before_attention", index), pasts[index])
            presents += present
            stream.add(attended, "norm_after_attention", index)
            stream.add(_feed_forward(drawing, layer.feed, stream.read("norm_before_feed", index)), "norm_after_feed", index)
    normed = stream.read("final_norm")
    logits = _head(drawing, layout.head, normed, keep)
    assert drawing.branches.drawn >= set(kept), "an adapter's matrix was not multiplied by"
    graph = ir.Graph(
        [*inputs, *drawing.branches.inputs],
        [logits, *presents],
        nodes=nodes.nodes,
        initializers=[*nodes.initializers, keep, *drawing.branches.inputs],
        opset_imports=dialect.domains(),
        name=decoder.model_type,
    )
    switches = {rope.switch for rope in decoder.ropes.values() if rope.switch is not None}
    return ir.Model(
        graph,
        ir_version=dialect.ir_version,
        producer_name="qlora-tools",
        producer_version=__version__,
        metadata_props={SWITCH: str(min(switches))} if switches else {},
    )


@dataclass(frozen=True, eq=False)
class _Drawing:
    """What every part of the drawing needs. ``shared`` is the dialect's own; ``flat``: the stream is [T, features]."""

    nodes: Nodes
    decoder: Decoder
    dialect: Dialect
    shared: Any
    branches: Branching
    ids: ir.Value
    flat: bool

    def spread(self, x: ir.Value, features: int) -> ir.Value:
        """[..., features] as [B, S, features]."""
        nodes = self.nodes
        (shape,) = nodes.once(f"shape {features}", self.ids, lambda: (nodes.op("Concat", nodes.op("Shape", self.ids), nodes.constant([features]), axis=0),))
        return nodes.op("Reshape", x, shape)

    def norm(self, module: str) -> NormCall:
        described = self.decoder.norm
        return NormCall(described.kind, f"{module}.weight", f"{module}.bias" if described.biased else None, described.epsilon)

    def scaled(self, x: ir.Value, factor: float) -> ir.Value:
        return x if factor == 1.0 else self.nodes.op("Mul", x, self.nodes.number(factor))

    def capped(self, x: ir.Value, cap: float) -> ir.Value:
        """cap * tanh(x / cap); 0 is no cap."""
        return self.scaled(self.nodes.op("Tanh", self.scaled(x, 1 / cap)), cap) if cap else x


class _Stream:
    """What runs through all layers. A sum that is about to be normalised is left to the norm, which does both in one pass."""

    def __init__(self, drawing: _Drawing, x: ir.Value) -> None:
        self._drawing, self._x = drawing, x
        self._added: ir.Value | None = None

    def add(self, x: ir.Value, norm: str, layer: int) -> None:
        """Add ``x``, after the norm of that role where the family has it."""
        drawing = self._drawing
        if drawing.decoder.has(norm):
            module = drawing.decoder.module(norm, layer)
            with drawing.nodes.scope(module.rpartition(".")[2]):
                x = drawing.dialect.norm(drawing.nodes, x, drawing.norm(module))
        self._added = drawing.scaled(x, drawing.decoder.scales.residual)

    def read(self, norm: str, layer: int | None = None) -> ir.Value:
        """The stream as a half sees it: after the norm of that role, where the family has it. Without a layer it is read for the last time."""
        drawing, added = self._drawing, self._added
        self._added = None
        if not drawing.decoder.has(norm):
            self._x = self._x if added is None else drawing.nodes.op("Add", self._x, added)
            return self._x
        module = drawing.decoder.module(norm, layer)
        with drawing.nodes.scope(module.rpartition(".")[2]):
            if added is None:
                return drawing.dialect.norm(drawing.nodes, self._x, drawing.norm(module))
            normed, self._x = drawing.dialect.skip_norm(drawing.nodes, self._x, added, drawing.norm(module), last=layer is None)
            return normed


def _value(name: str, kind: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def _inputs(decoder: Decoder, target: Target) -> tuple[list[ir.Value], list[tuple[ir.Value, ir.Value]]]:
    """Graph inputs in order, and the past (key, value) of each layer among them."""
    cache = ("batch_size", decoder.kv_heads, "past_sequence_length", decoder.head_size)
    pasts = [
        (_value(f"past_key_values.{i}.key", target.float_type, *cache), _value(f"past_key_values.{i}.value", target.float_type, *cache))
        for i in range(decoder.layers)
    ]
    ids = _value("input_ids", ir.DataType.INT64, "batch_size", "sequence_length")
    mask = _value("attention_mask", ir.DataType.INT64, "batch_size", "total_sequence_length")
    keep = _value(KEEP, ir.DataType.INT64, 1)
    keep.const_value = ir.tensor(np.zeros(1, np.int64), name=KEEP)
    return [ids, mask, *(value for pair in pasts for value in pair), keep], pasts


def _embed(drawing: _Drawing, layout: Layout) -> ir.Value:
    """The looked-up rows, scaled, and the learned positions."""
    nodes, decoder = drawing.nodes, drawing.decoder
    with nodes.scope("embedding"):
        flat = nodes.op("Reshape", drawing.ids, nodes.constant([-1]))
        x = drawing.scaled(layout.embedding.format.gather(nodes, flat, layout.embedding.name, decoder.hidden), decoder.scales.embedding)
        if layout.positions is not None:
            places = nodes.op("Reshape", _positions(drawing), nodes.constant([-1]))
            x = nodes.op("Add", x, layout.positions.format.gather(nodes, places, layout.positions.name, decoder.hidden))
        return x if drawing.flat else drawing.spread(x, decoder.hidden)


def _positions(drawing: _Drawing) -> ir.Value:
    """int64 [B, S]: the number of each new token in its sequence."""
    return drawing.nodes.once("positions", drawing.ids, lambda: (drawing.dialect.positions(drawing.nodes, drawing.shared),))[0]


def _multiply(drawing: _Drawing, matrix: Matrix, x: ir.Value) -> ir.Value:
    nodes = drawing.nodes
    with nodes.scope(matrix.name.rpartition(".")[2]):
        bias = None if matrix.bias is None else nodes.stored(matrix.bias)
        product = matrix.format.multiply(nodes, x, matrix.name, matrix.total_rows, matrix.columns, bias)
        return drawing.branches.add(nodes, matrix, x, product)


def _attention(drawing: _Drawing, layer: Layer, index: int, normed: ir.Value, past: tuple[ir.Value, ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
    """(attention output, presents)."""
    nodes, decoder = drawing.nodes, drawing.decoder
    query, key, value = _queries(drawing, index, _multiply(drawing, layer.qkv, normed))
    call = AttentionCall(
        layer=index,
        query=query,
        key=key,
        value=value,
        past_key=past[0],
        past_value=past[1],
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_size=decoder.head_size,
        scale=decoder.scales.attention,
        softcap=decoder.scales.attention_softcap,
        window=decoder.windows[index],
        rotary=_rotary(drawing, decoder.rotary[index]),
    )
    attended, *presents = drawing.dialect.attention(nodes, call, drawing.shared)
    cache = ("batch_size", decoder.kv_heads, "total_sequence_length", decoder.head_size)
    for present in presents:
        present.shape, present.type = ir.Shape(cache), ir.TensorType(nodes.target.float_type)
    if drawing.flat:
        attended = nodes.op("Reshape", attended, nodes.constant([-1, decoder.query_size]))
    return _multiply(drawing, layer.output, attended), presents


def _rotary(drawing: _Drawing, kind: str | None) -> Rotary | None:
    """The rotation of a layer. Where long inputs turn at other frequencies than short ones, positions point at the rows for the length of the
    longest sequence; it is counted from positions, since the mask of a captured step is as long as the buffer."""
    if kind is None:
        return None
    nodes, rope = drawing.nodes, drawing.decoder.ropes[kind]
    if rope.switch is None:
        return Rotary(*cache_names(kind), rope.size)

    def make() -> tuple[ir.Value, ...]:
        places, limit = _positions(drawing), nodes.constant(rope.switch)
        long = nodes.op("GreaterOrEqual", nodes.op("ReduceMax", places, keepdims=0), limit)
        return (nodes.op("Add", places, nodes.op("Where", long, limit, nodes.constant(0))),)

    return Rotary(*cache_names(kind), rope.size, nodes.once(f"rows of {kind}", drawing.ids, make)[0])


def _queries(drawing: _Drawing, index: int, packed: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """What attention gets as query, key, value, [B, S, features]: all three packed in the first, or apart where queries and keys are normalised."""
    nodes, decoder = drawing.nodes, drawing.decoder
    sizes = (decoder.query_size, decoder.kv_size, decoder.kv_size)
    if not decoder.head_norms:
        return drawing.spread(packed, sum(sizes)) if drawing.flat else packed, None, None
    query, key, value = nodes.op("Split", packed, nodes.constant(sizes), axis=-1, outputs=3)
    by_head = decoder.head_norms == "head"

    def normalise(x: ir.Value, role: str, features: int) -> ir.Value:
        x = nodes.op("Reshape", x, nodes.constant([-1, decoder.head_size])) if by_head else x
        normed = drawing.dialect.norm(nodes, x, drawing.norm(decoder.module(role, index)))
        return drawing.spread(normed, features) if drawing.flat or by_head else normed

    value = drawing.spread(value, decoder.kv_size) if drawing.flat else value
    return normalise(query, "query_norm", decoder.query_size), normalise(key, "key_norm", decoder.kv_size), value


def _feed_forward(drawing: _Drawing, feed: Feed | Mixture, normed: ir.Value) -> ir.Value:
    nodes, decoder = drawing.nodes, drawing.decoder
    if isinstance(feed, Mixture):
        assert decoder.experts is not None
        products = Products(partial(_multiply, drawing), partial(_feed_forward, drawing))
        return draw_mixture(nodes, feed, decoder.experts, normed, products)
    first, *up = (_multiply(drawing, matrix, normed) for matrix in feed.into)
    activated = drawing.dialect.activate(nodes, first, decoder.activation)
    return _multiply(drawing, feed.down, nodes.op("Mul", activated, *up) if up else activated)


def _head(drawing: _Drawing, head: Matrix, normed: ir.Value, keep: ir.Value) -> ir.Value:
    """Logits [B, kept positions, vocab]."""
    nodes, decoder = drawing.nodes, drawing.decoder
    final = nodes.target.logits_type
    with nodes.scope("head"):
        by_row = drawing.spread(normed, decoder.hidden) if drawing.flat else normed
        kept = nodes.op("Slice", by_row, _first_kept(drawing, keep), nodes.constant([_END]), nodes.constant([1]))
        rows = nodes.op("Reshape", kept, nodes.constant([-1, decoder.hidden])) if drawing.flat else kept
        logits = drawing.capped(drawing.scaled(_multiply(drawing, head, rows), decoder.scales.logits), decoder.scales.logit_softcap)
        if drawing.flat:
            lengths = nodes.op("Slice", nodes.op("Shape", kept), nodes.constant([0]), nodes.constant([2]))
            logits = nodes.op("Reshape", logits, nodes.op("Concat", lengths, nodes.constant([decoder.vocab]), axis=0))
        if final != nodes.target.float_type:
            logits = nodes.op("Cast", logits, to=final)
    logits.name, logits.shape, logits.type = "logits", ir.Shape(("batch_size", "logits_length", decoder.vocab)), ir.TensorType(final)
    return logits


def _first_kept(drawing: _Drawing, keep: ir.Value) -> ir.Value:
    """int64 [1]: the first position whose logits are wanted; 0 where ``keep`` is 0.

    On the CPU it is counted from the end. On CUDA it is reckoned from a shape, so that it stays on the host, where ``Slice`` wants it.
    """
    nodes = drawing.nodes
    if nodes.target.provider == "cpu":
        return nodes.op("Neg", keep)
    new = nodes.op("Slice", nodes.op("Shape", drawing.ids), nodes.constant([1]), nodes.constant([2]))
    return nodes.op("Mod", nodes.op("Sub", new, nodes.op("Min", keep, new)), new)
