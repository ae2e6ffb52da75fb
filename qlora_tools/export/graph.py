"""The decoder's graph, node by node.

Between embedding and logits everything is two-dimensional, [T, features] with T = batch * sequence; only the
attention operator sees [B, S, features]. Inputs and outputs carry the names that onnxruntime-genai and
Optimum look for. ``num_logits_to_keep`` is an input that most callers never see: it has a default (0: all
positions), and a runtime that sets it to 1 gets the logits of the last position only.

Legend: B batch, S new positions, P past positions, T = B * S.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qlora_tools import __version__
from qlora_tools.export.layout import Layer, Layout, Matrix
from qlora_tools.export.nodes import CONTRIB, Nodes
from qlora_tools.models.decoder import Decoder
from qlora_tools.specs import TensorSpec

#: The lowest that the nodes used here allow: GQA and friends are in the runtime's own domain, Reduce* take axes as attribute until 18.
OPSET = 17
IR_VERSION = 8
DATA_FILE = "model.onnx.data"
COS, SIN = "rotary.cos", "rotary.sin"
KEEP = "num_logits_to_keep"
_END = np.iinfo(np.int64).max


def build_graph(decoder: Decoder, layout: Layout, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int]) -> ir.Model:
    """The model whose initializers lie at ``offsets`` of :data:`DATA_FILE`."""
    nodes = Nodes(specs, offsets, DATA_FILE)
    inputs, pasts = _inputs(decoder)
    ids, mask, keep = inputs[0], inputs[1], inputs[-1]
    lengths = _lengths(nodes, ids, mask)
    normed, residual = _embed(nodes, decoder, layout, ids)
    presents: list[ir.Value] = []
    for index, layer in enumerate(layout.layers):
        with nodes.scope(f"layers.{index}"):
            attended, present = _attention(nodes, decoder, layer, index, normed, pasts[index], lengths)
            presents += present
            normed, residual = _skip_norm(nodes, decoder, residual, attended, decoder.module("post_norm", index))
            fed = _feed_forward(nodes, layer, normed)
            last = index + 1 == decoder.layers
            normed, residual = _skip_norm(
                nodes, decoder, residual, fed, decoder.module("final_norm") if last else decoder.module("input_norm", index + 1), last
            )
    logits = _head(nodes, decoder, layout.head, normed, ids, keep)
    graph = ir.Graph(
        inputs,
        [logits, *presents],
        nodes=nodes.nodes,
        initializers=[*nodes.initializers, keep],
        opset_imports={"": OPSET, CONTRIB: 1},
        name=decoder.model_type,
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="qlora-tools", producer_version=__version__)


def _value(name: str, kind: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))


def _inputs(decoder: Decoder) -> tuple[list[ir.Value], list[tuple[ir.Value, ir.Value]]]:
    """Graph inputs in order, and the past (key, value) of each layer among them."""
    cache = ("batch_size", decoder.kv_heads, "past_sequence_length", decoder.head_size)
    pasts = [
        (_value(f"past_key_values.{i}.key", ir.DataType.FLOAT, *cache), _value(f"past_key_values.{i}.value", ir.DataType.FLOAT, *cache))
        for i in range(decoder.layers)
    ]
    ids = _value("input_ids", ir.DataType.INT64, "batch_size", "sequence_length")
    mask = _value("attention_mask", ir.DataType.INT64, "batch_size", "total_sequence_length")
    keep = _value(KEEP, ir.DataType.INT64, 1)
    keep.const_value = ir.tensor(np.zeros(1, np.int64), name=KEEP)
    return [ids, mask, *(value for pair in pasts for value in pair), keep], pasts


def _lengths(nodes: Nodes, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Computed once for all layers: last valid position int32 [B], total length int32 scalar, the shape (B, S)."""
    with nodes.scope("lengths"):
        last = nodes.op("Sub", nodes.op("ReduceSum", mask, nodes.constant([1]), keepdims=0), nodes.constant([1]))
        total = nodes.op("Gather", nodes.op("Shape", mask), nodes.constant(1), axis=0)
        narrow = ir.DataType.INT32
        return nodes.op("Cast", last, to=narrow), nodes.op("Cast", total, to=narrow), nodes.op("Shape", ids)


def _embed(nodes: Nodes, decoder: Decoder, layout: Layout, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(normed, residual), each [T, hidden]."""
    with nodes.scope("embedding"):
        flat = nodes.op("Reshape", ids, nodes.constant([-1]))
        x = layout.embedding.format.gather(nodes, flat, layout.embedding.name, decoder.hidden)
        scale = nodes.stored(f"{decoder.module('input_norm', 0)}.weight")
        return nodes.op("SimplifiedLayerNormalization", x, scale, epsilon=decoder.norm_epsilon, axis=-1, stash_type=1), x


def _multiply(nodes: Nodes, matrix: Matrix, x: ir.Value) -> ir.Value:
    with nodes.scope(matrix.name.rpartition(".")[2]):
        bias = None if matrix.bias is None else nodes.stored(matrix.bias)
        return matrix.format.multiply(nodes, x, matrix.name, matrix.total_rows, matrix.columns, bias)


def _skip_norm(nodes: Nodes, decoder: Decoder, residual: ir.Value, added: ir.Value, module: str, last: bool = False) -> tuple[ir.Value, ir.Value]:
    """(norm(residual + added), residual + added); after the last layer nobody needs the second."""
    with nodes.scope(module.rpartition(".")[2]):
        scale = nodes.stored(f"{module}.weight")
        base = f"{module}:"
        outputs = [f"{base}normed"] if last else [f"{base}normed", "", "", f"{base}residual"]
        found = nodes.contrib("SkipSimplifiedLayerNormalization", residual, added, scale, outputs=outputs, epsilon=decoder.norm_epsilon)
        return (found, found) if last else (found[0], found[3])


def _attention(
    nodes: Nodes, decoder: Decoder, layer: Layer, index: int, normed: ir.Value, past: tuple[ir.Value, ir.Value], lengths: tuple[ir.Value, ir.Value, ir.Value]
) -> tuple[ir.Value, list[ir.Value]]:
    """(attention output [T, hidden], presents)."""
    last, total, batch_sequence = lengths
    packed = _multiply(nodes, layer.qkv, normed)
    query, key, value = _queries(nodes, decoder, index, packed, batch_sequence)
    window = decoder.windows[index]
    names = [f"layers.{index}/attended", f"present.{index}.key", f"present.{index}.value"]
    attended, *presents = nodes.contrib(
        "GroupQueryAttention",
        *(query, key, value, *past, last, total, nodes.stored(COS), nodes.stored(SIN)),
        outputs=names,
        num_heads=decoder.heads,
        kv_num_heads=decoder.kv_heads,
        scale=decoder.head_size**-0.5,
        local_window_size=-1 if window is None else window,
        do_rotary=1,
        rotary_interleaved=0,
    )
    cache = ("batch_size", decoder.kv_heads, "total_sequence_length", decoder.head_size)
    for present in presents:
        present.shape, present.type = ir.Shape(cache), ir.TensorType(ir.DataType.FLOAT)
    flat = nodes.op("Reshape", attended, nodes.constant([-1, decoder.query_size]))
    return _multiply(nodes, layer.output, flat), presents


def _queries(nodes: Nodes, decoder: Decoder, index: int, packed: ir.Value, batch_sequence: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """What the attention operator gets as query, key, value: all three packed in the first, or normalised per head one by one."""

    def spread(x: ir.Value, *features: int) -> ir.Value:
        (shape,) = nodes.once(f"shape {features}", batch_sequence, lambda: (nodes.op("Concat", batch_sequence, nodes.constant(list(features)), axis=0),))
        return nodes.op("Reshape", x, shape)

    if not decoder.head_norms:
        return spread(packed, decoder.query_size + 2 * decoder.kv_size), None, None
    sizes = (decoder.query_size, decoder.kv_size, decoder.kv_size)
    query, key, value = nodes.op("Split", packed, nodes.constant(sizes), axis=-1, outputs=3)

    def normalise(x: ir.Value, role: str) -> ir.Value:
        heads = nodes.op("Reshape", x, nodes.constant([-1, decoder.head_size]))
        scale = nodes.stored(f"{decoder.module(role, index)}.weight")
        return nodes.op("SimplifiedLayerNormalization", heads, scale, epsilon=decoder.norm_epsilon, axis=-1, stash_type=1)

    return spread(normalise(query, "query_norm"), sizes[0]), spread(normalise(key, "key_norm"), sizes[1]), spread(value, sizes[2])


def _feed_forward(nodes: Nodes, layer: Layer, normed: ir.Value) -> ir.Value:
    if len(layer.feed) == 1:
        gate, up = nodes.op("Split", _multiply(nodes, layer.feed[0], normed), nodes.constant([layer.down.columns] * 2), axis=-1, outputs=2)
    else:
        gate, up = (_multiply(nodes, matrix, normed) for matrix in layer.feed)
    activated = nodes.contrib("QuickGelu", gate, alpha=1.0)
    return _multiply(nodes, layer.down, nodes.op("Mul", activated, up))


def _head(nodes: Nodes, decoder: Decoder, head: Matrix, normed: ir.Value, ids: ir.Value, keep: ir.Value) -> ir.Value:
    """Logits fp32 [B, kept positions, vocab]."""
    with nodes.scope("head"):
        shape = nodes.op("Concat", nodes.op("Shape", ids), nodes.constant([decoder.hidden]), axis=0)
        by_row = nodes.op("Reshape", normed, shape)
        kept = nodes.op("Slice", by_row, nodes.op("Neg", keep), nodes.constant([_END]), nodes.constant([1]))
        flat = nodes.op("Reshape", kept, nodes.constant([-1, decoder.hidden]))
        scores = _multiply(nodes, head, flat)
        back = nodes.op("Concat", nodes.op("Slice", nodes.op("Shape", kept), nodes.constant([0]), nodes.constant([2])), nodes.constant([decoder.vocab]), axis=0)
    logits = nodes.op("Reshape", scores, back, outputs=["logits"])
    logits.shape, logits.type = ir.Shape(("batch_size", "logits_length", decoder.vocab)), ir.TensorType(ir.DataType.FLOAT)
    return logits
