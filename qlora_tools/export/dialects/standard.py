"""Plain ONNX of opset 23: Attention, RMSNormalization and RotaryEmbedding, for runtimes that do not know ONNX Runtime's own operators.

Attention gets its past as inputs and gives the present as new tensors, which grow by a copy each step. Which key a query sees is a boolean mask, computed once per
window width for all layers: opset 23 aligns its own causal mask with the first key, not with the last, which is wrong as soon as there is a past. Positions are counted along the
attention mask, so prompts may be padded on either side.

Legend: B batch, S new positions, T past and new positions, H features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from qlora_tools.errors import UnsupportedError
from qlora_tools.export.dialects.dialect import AttentionCall, NormCall, Rotary, layer_norm
from qlora_tools.export.nodes import Nodes


@dataclass(frozen=True, eq=False)
class _Sight:
    """What all layers share. ``masks``: bool [B, 1, S, T] by window width, made when first asked for."""

    positions_BS: ir.Value
    keys_T: ir.Value
    queries_S1: ir.Value
    seen_BST: ir.Value
    """bool [B, 1, S, T] without any window."""
    masks: dict[int | None, ir.Value] = field(default_factory=dict)


class Standard:
    """A :class:`~qlora_tools.export.dialects.dialect.Dialect`."""

    #: The first with Attention, RMSNormalization and RotaryEmbedding, and the first IR that it may be written in.
    opset = 23
    ir_version = 11

    def domains(self) -> dict[str, int]:
        return {"": self.opset}

    def prepare(self, nodes: Nodes, ids_BS: ir.Value, mask_BT: ir.Value) -> _Sight:
        with nodes.scope("sight"):
            shape, total = nodes.op("Shape", ids_BS), nodes.op("Shape", mask_BT, start=1, end=2)
            first = nodes.op("Sub", total, nodes.op("Slice", shape, nodes.constant([1]), nodes.constant([2])))
            counted = nodes.op("Sub", nodes.op("CumSum", mask_BT, nodes.constant(1)), nodes.constant(1))
            counted = nodes.op("Max", counted, nodes.constant(0))
            positions_BS = nodes.op("Slice", counted, first, total, nodes.constant([1]))
            zero, one = nodes.constant(0), nodes.constant(1)
            start, stop = nodes.op("Squeeze", first), nodes.op("Squeeze", total)
            keys_T = nodes.op("Range", zero, stop, one)
            queries_S1 = nodes.op("Unsqueeze", nodes.op("Range", start, stop, one), nodes.constant([1]))
            real = nodes.op("Unsqueeze", nodes.op("Cast", mask_BT, to=ir.DataType.BOOL), nodes.constant([1, 2]))
            itself = nodes.op("Equal", keys_T, queries_S1)  # a padding query must see something, or its softmax is empty
            before = nodes.op("LessOrEqual", keys_T, queries_S1)
            return _Sight(positions_BS, keys_T, queries_S1, nodes.op("And", nodes.op("Or", real, itself), before))

    def positions(self, nodes: Nodes, shared: _Sight) -> ir.Value:
        return shared.positions_BS

    def norm(self, nodes: Nodes, x: ir.Value, call: NormCall) -> ir.Value:
        if call.kind == "layer":
            return layer_norm(nodes, x, call)
        return nodes.op("RMSNormalization", x, nodes.stored(call.weight), epsilon=call.epsilon, axis=-1, stash_type=1)

    def skip_norm(self, nodes: Nodes, residual: ir.Value, added: ir.Value, call: NormCall, *, last: bool) -> tuple[ir.Value, ir.Value]:
        total = nodes.op("Add", residual, added)
        return self.norm(nodes, total, call), total

    def activate(self, nodes: Nodes, x: ir.Value, kind: str) -> ir.Value:
        if kind == "silu":
            return nodes.op("Mul", x, nodes.op("Sigmoid", x))
        if kind in ("gelu", "gelu_tanh"):
            return nodes.op("Gelu", x, approximate="none" if kind == "gelu" else "tanh")
        if kind == "relu":
            return nodes.op("Relu", x)
        raise UnsupportedError(f"activation `{kind}` has no operator here")

    def attention(self, nodes: Nodes, call: AttentionCall, shared: _Sight) -> tuple[ir.Value, ir.Value, ir.Value]:
        query, key, value = _separate(nodes, call)
        if call.rotary is not None:
            query, key = (_rotated(nodes, x, heads, call, call.rotary, shared) for x, heads in ((query, call.heads), (key, call.kv_heads)))
        options: dict[str, Any] = {"softcap": call.softcap} if call.softcap else {}
        attended, *presents = nodes.op(
            "Attention",
            *(query, key, value, _mask(nodes, call.window, shared), call.past_key, call.past_value),
            outputs=[f"layers.{call.layer}/attended", f"present.{call.layer}.key", f"present.{call.layer}.value"],
            q_num_heads=call.heads,
            kv_num_heads=call.kv_heads,
            scale=call.scale,
            **options,
        )
        return attended, presents[0], presents[1]


def _heads(call: AttentionCall) -> tuple[int, int, int]:
    return call.heads, call.kv_heads, call.kv_heads


def _separate(nodes: Nodes, call: AttentionCall) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value, each [B, S, its features]."""
    if call.key is not None and call.value is not None:
        return call.query, call.key, call.value
    sizes = [heads * call.head_size for heads in _heads(call)]
    found: tuple[ir.Value, ir.Value, ir.Value] = nodes.op("Split", call.query, nodes.constant(sizes), axis=-1, outputs=3)
    return found


def _rotated(nodes: Nodes, x_BSH: ir.Value, heads: int, call: AttentionCall, rotary: Rotary, shared: _Sight) -> ir.Value:
    """The first ``rotary.size`` dimensions of each head turned by their positions."""
    part: dict[str, Any] = {} if rotary.size == call.head_size else {"rotary_embedding_dim": rotary.size}
    caches = nodes.stored(rotary.cos), nodes.stored(rotary.sin)
    return nodes.op(
        "RotaryEmbedding", x_BSH, *caches, shared.positions_BS if rotary.rows_BS is None else rotary.rows_BS, num_heads=heads, interleaved=0, **part
    )


def _mask(nodes: Nodes, window: int | None, shared: _Sight) -> ir.Value:
    """bool [B, 1, S, T]: keys that a query sees; within a window the last ``window`` of them, itself included."""
    if window is None:
        return shared.seen_BST
    if window not in shared.masks:
        near = nodes.op("Greater", shared.keys_T, nodes.op("Sub", shared.queries_S1, nodes.constant(window)))
        shared.masks[window] = nodes.op("And", shared.seen_BST, near)
    return shared.masks[window]
