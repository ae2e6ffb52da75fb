"""ONNX Runtime's own operators: grouped-query attention with its rotary part and cache inside, norms fused with the residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qlora_tools.errors import UnsupportedError
from qlora_tools.export.dialects.dialect import AttentionCall, NormCall, layer_norm, lifted
from qlora_tools.export.nodes import CONTRIB, Nodes


@dataclass(frozen=True, eq=False)
class _Lengths:
    last_B: ir.Value
    """int32: last valid position."""
    total: ir.Value
    """int32 scalar: past and new positions."""
    ids_BS: ir.Value


class Contrib:
    """A :class:`~qlora_tools.export.dialects.dialect.Dialect`."""

    #: The lowest that the nodes used here allow: attention and friends are in the runtime's own domain, Reduce* take axes as attribute until 18.
    opset = 17
    ir_version = 8

    def domains(self) -> dict[str, int]:
        return {"": self.opset, CONTRIB: 1}

    def prepare(self, nodes: Nodes, ids_BS: ir.Value, mask_BT: ir.Value) -> _Lengths:
        with nodes.scope("lengths"):
            last = nodes.op("Sub", nodes.op("ReduceSum", mask_BT, nodes.constant([1]), keepdims=0), nodes.constant([1]))
            total = nodes.op("Gather", nodes.op("Shape", mask_BT), nodes.constant(1), axis=0)
            narrow = ir.DataType.INT32
            return _Lengths(nodes.op("Cast", last, to=narrow), nodes.op("Cast", total, to=narrow), ids_BS)

    def positions(self, nodes: Nodes, shared: _Lengths) -> ir.Value:
        """As the attention operator counts: a mask that is shorter than the prompt is padding on its right."""
        zero, one = nodes.constant(0), nodes.constant(1)
        new = nodes.op("Gather", nodes.op("Shape", shared.ids_BS), one, axis=0)
        length = nodes.op("Add", nodes.op("Cast", shared.last_B, to=ir.DataType.INT64), one)
        past = nodes.op("Max", nodes.op("Sub", length, lifted(nodes, new)), zero)
        return nodes.op("Add", nodes.op("Unsqueeze", past, nodes.constant([1])), nodes.op("Range", zero, new, one))

    def norm(self, nodes: Nodes, x: ir.Value, call: NormCall) -> ir.Value:
        if call.kind == "layer":
            return layer_norm(nodes, x, call)
        return nodes.op("SimplifiedLayerNormalization", x, nodes.stored(call.weight), epsilon=call.epsilon, axis=-1, stash_type=1)

    def skip_norm(self, nodes: Nodes, residual: ir.Value, added: ir.Value, call: NormCall, *, last: bool) -> tuple[ir.Value, ir.Value]:
        base = f"{call.weight.removesuffix('.weight')}:"
        outputs = [f"{base}normed"] if last else [f"{base}normed", "", "", f"{base}residual"]
        kind = "SkipLayerNormalization" if call.kind == "layer" else "SkipSimplifiedLayerNormalization"
        bias = [nodes.stored(call.bias)] if call.bias is not None else []
        found = nodes.contrib(kind, residual, added, nodes.stored(call.weight), *bias, outputs=outputs, epsilon=call.epsilon)
        return (found, found) if last else (found[0], found[3])

    def activate(self, nodes: Nodes, x: ir.Value, kind: str) -> ir.Value:
        if kind == "silu":
            return nodes.contrib("QuickGelu", x, alpha=1.0)
        if kind == "gelu":
            return nodes.contrib("Gelu", x)
        if kind == "gelu_tanh":
            return nodes.contrib("FastGelu", x)
        if kind == "relu":
            return nodes.op("Relu", x)
        raise UnsupportedError(f"activation `{kind}` has no operator here")

    def attention(self, nodes: Nodes, call: AttentionCall, shared: _Lengths) -> tuple[ir.Value, ir.Value, ir.Value]:
        caches = [] if call.rotary is None else [nodes.stored(call.rotary.cos), nodes.stored(call.rotary.sin), call.rotary.rows_BS]
        options: dict[str, Any] = {"do_rotary": int(call.rotary is not None), "rotary_interleaved": 0}
        if call.softcap:
            options["softcap"] = call.softcap
        attended, *presents = nodes.contrib(
            "GroupQueryAttention",
            *(call.query, call.key, call.value, call.past_key, call.past_value, shared.last_B, shared.total, *caches),
            outputs=[f"layers.{call.layer}/attended", f"present.{call.layer}.key", f"present.{call.layer}.value"],
            num_heads=call.heads,
            kv_num_heads=call.kv_heads,
            scale=call.scale,
            local_window_size=-1 if call.window is None else call.window,
            **options,
        )
        return attended, presents[0], presents[1]
