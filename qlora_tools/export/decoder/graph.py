"""The decoder's graph, node by node.

Between embedding and logits everything is two-dimensional, [T, features] with T = batch * sequence; only the
attention operator sees [B, S, features]. Inputs and outputs carry the names that onnxruntime-genai and
Optimum look for. ``num_logits_to_keep`` is an input that most callers never see: it has a default (0: all
positions), and a runtime that sets it to 1 gets the logits of the last position only. How norms, activations
and attention are spelt is the dialect's business.

Legend: B batch, S new positions, P past positions, T = B * S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qlora_tools import __version__
from qlora_tools.export.decoder.layout import Layer, Layout, Matrix
from qlora_tools.export.dialects.contrib import Contrib
from qlora_tools.export.dialects.dialect import AttentionCall, Dialect, NormCall, Rotary
from qlora_tools.export.nodes import Nodes
from qlora_tools.export.target import CPU, Target
from qlora_tools.models.decoder import Decoder
from qlora_tools.specs import TensorSpec

DATA_FILE = "model.onnx.data"
COS, SIN = "rotary.cos", "rotary.sin"
KEEP = "num_logits_to_keep"
_END = np.iinfo(np.int64).max


def dialect_of(target: Target) -> Dialect:
    """The operators that graphs for ``target`` are spelt in."""
    return Contrib()


def build_graph(decoder: Decoder, layout: Layout, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], target: Target = CPU) -> ir.Model:
    """The model whose initializers lie at ``offsets`` of :data:`DATA_FILE`."""
    nodes = Nodes(specs, offsets, DATA_FILE, target)
    dialect = dialect_of(target)
    inputs, pasts = _inputs(decoder, target)
    ids, mask, keep = inputs[0], inputs[1], inputs[-1]
    drawing = _Drawing(nodes, decoder, dialect, dialect.prepare(nodes, ids, mask))
    normed, residual = _embed(drawing, layout, ids)
    presents: list[ir.Value] = []
    for index, layer in enumerate(layout.layers):
        with nodes.scope(f"layers.{index}"):
            attended, present = _attention(drawing, layer, index, normed, pasts[index])
            presents += present
            normed, residual = _skip_norm(drawing, residual, attended, decoder.module("post_norm", index))
            fed = _feed_forward(drawing, layer, normed)
            last = index + 1 == decoder.layers
            normed, residual = _skip_norm(drawing, residual, fed, decoder.module("final_norm") if last else decoder.module("input_norm", index + 1), last)
    logits = _head(drawing, layout.head, normed, ids, keep)
    graph = ir.Graph(
        inputs,
        [logits, *presents],
        nodes=nodes.nodes,
        initializers=[*nodes.initializers, keep],
        opset_imports=dialect.domains(),
        name=decoder.model_type,
    )
    return ir.Model(graph, ir_version=dialect.ir_version, producer_name="qlora-tools", producer_version=__version__)


@dataclass(frozen=True, eq=False)
class _Drawing:
    """What every part of the drawing needs. ``shared`` is the dialect's own."""

    nodes: Nodes
    decoder: Decoder
    dialect: Dialect
    shared: Any

    def norm(self, module: str) -> NormCall:
        return NormCall("rms", f"{module}.weight", None, self.decoder.norm_epsilon)


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


def _embed(drawing: _Drawing, layout: Layout, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(normed, residual), each [T, hidden]."""
    nodes, decoder = drawing.nodes, drawing.decoder
    with nodes.scope("embedding"):
        flat = nodes.op("Reshape", ids, nodes.constant([-1]))
        x = layout.embedding.format.gather(nodes, flat, layout.embedding.name, decoder.hidden)
        return drawing.dialect.norm(nodes, x, drawing.norm(decoder.module("input_norm", 0))), x


def _multiply(drawing: _Drawing, matrix: Matrix, x: ir.Value) -> ir.Value:
    nodes = drawing.nodes
    with nodes.scope(matrix.name.rpartition(".")[2]):
        bias = None if matrix.bias is None else nodes.stored(matrix.bias)
        return matrix.format.multiply(nodes, x, matrix.name, matrix.total_rows, matrix.columns, bias)


def _skip_norm(drawing: _Drawing, residual: ir.Value, added: ir.Value, module: str, last: bool = False) -> tuple[ir.Value, ir.Value]:
    """(norm(residual + added), residual + added); after the last layer nobody needs the second."""
    with drawing.nodes.scope(module.rpartition(".")[2]):
        return drawing.dialect.skip_norm(drawing.nodes, residual, added, drawing.norm(module), last=last)


def _attention(drawing: _Drawing, layer: Layer, index: int, normed: ir.Value, past: tuple[ir.Value, ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
    """(attention output [T, hidden], presents)."""
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
        scale=decoder.head_size**-0.5,
        softcap=0.0,
        window=decoder.windows[index],
        rotary=Rotary(COS, SIN, decoder.rope.size),
    )
    attended, *presents = drawing.dialect.attention(nodes, call, drawing.shared)
    cache = ("batch_size", decoder.kv_heads, "total_sequence_length", decoder.head_size)
    for present in presents:
        present.shape, present.type = ir.Shape(cache), ir.TensorType(nodes.target.float_type)
    return _multiply(drawing, layer.output, attended), presents


def _queries(drawing: _Drawing, index: int, packed: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """What attention gets as query, key, value: all three packed in the first, or normalised per head one by one."""
    nodes, decoder = drawing.nodes, drawing.decoder
    if not decoder.head_norms:
        return packed, None, None
    sizes = (decoder.query_size, decoder.kv_size, decoder.kv_size)
    query, key, value = nodes.op("Split", packed, nodes.constant(sizes), axis=-1, outputs=3)

    def normalise(x: ir.Value, role: str) -> ir.Value:
        heads = nodes.op("Reshape", x, nodes.constant([-1, decoder.head_size]))
        return drawing.dialect.norm(nodes, heads, drawing.norm(decoder.module(role, index)))

    return normalise(query, "query_norm"), normalise(key, "key_norm"), value


def _feed_forward(drawing: _Drawing, layer: Layer, normed: ir.Value) -> ir.Value:
    nodes = drawing.nodes
    if len(layer.feed) == 1:
        gate, up = nodes.op("Split", _multiply(drawing, layer.feed[0], normed), nodes.constant([layer.down.columns] * 2), axis=-1, outputs=2)
    else:
        gate, up = (_multiply(drawing, matrix, normed) for matrix in layer.feed)
    activated = drawing.dialect.activate(nodes, gate, "silu")
    return _multiply(drawing, layer.down, nodes.op("Mul", activated, up))


def _head(drawing: _Drawing, head: Matrix, normed: ir.Value, ids: ir.Value, keep: ir.Value) -> ir.Value:
    """Logits [B, kept positions, vocab]."""
    nodes, decoder = drawing.nodes, drawing.decoder
    with nodes.scope("head"):
        shape = nodes.op("Concat", nodes.op("Shape", ids), nodes.constant([decoder.hidden]), axis=0)
        by_row = nodes.op("Reshape", normed, shape)
        kept = nodes.op("Slice", by_row, nodes.op("Neg", keep), nodes.constant([_END]), nodes.constant([1]))
        flat = nodes.op("Reshape", kept, nodes.constant([-1, decoder.hidden]))
        scores = _multiply(drawing, head, flat)
        back = nodes.op("Concat", nodes.op("Slice", nodes.op("Shape", kept), nodes.constant([0]), nodes.constant([2])), nodes.constant([decoder.vocab]), axis=0)
    logits = nodes.op("Reshape", scores, back, outputs=["logits"])
    logits.shape, logits.type = ir.Shape(("batch_size", "logits_length", decoder.vocab)), ir.TensorType(nodes.target.float_type)
    return logits
