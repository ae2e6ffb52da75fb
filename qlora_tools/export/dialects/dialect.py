"""The protocol of a dialect: the few things a decoder does that are not a product with a weight.

Legend: B batch, S new positions, T past and new positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir

from qlora_tools.export.nodes import Nodes


@dataclass(frozen=True)
class NormCall:
    """A normalization: stored names of its scale and (LayerNorm) bias. ``kind`` is ``rms`` or ``layer``."""

    kind: str
    weight: str
    bias: str | None
    epsilon: float


@dataclass(frozen=True, eq=False)
class Rotary:
    """Stored names of the caches [rows, size / 2]; ``size`` rotated dimensions at the beginning of each head.

    ``rows_BS`` (int64) says which row of the caches each new token takes; without, that of its number in the sequence.
    """

    cos: str
    sin: str
    size: int
    rows_BS: ir.Value | None = None


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One layer's attention. Without ``key`` and ``value``, ``query`` holds all three side by side, [B, S, (heads + 2 kv_heads) * head_size]."""

    layer: int
    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None
    past_key: ir.Value
    past_value: ir.Value
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    softcap: float
    """0: none."""
    window: int | None
    rotary: Rotary | None


def layer_norm(nodes: Nodes, x: ir.Value, call: NormCall) -> ir.Value:
    """LayerNorm, which every dialect spells alike."""
    bias = None if call.bias is None else nodes.stored(call.bias)
    found: ir.Value = nodes.op("LayerNormalization", x, nodes.stored(call.weight), bias, epsilon=call.epsilon, axis=-1, stash_type=1)
    return found


class Dialect(Protocol):
    opset: int
    ir_version: int

    def domains(self) -> dict[str, int]:
        """Opset imports."""

    def prepare(self, nodes: Nodes, ids_BS: ir.Value, mask_BT: ir.Value) -> Any:
        """What all layers' attention shares, computed once; handed to :meth:`attention` as ``shared``."""

    def positions(self, nodes: Nodes, shared: Any) -> ir.Value:
        """int64 [B, S]: the number of each new token in its sequence, as :meth:`attention` rotates it."""

    def norm(self, nodes: Nodes, x: ir.Value, call: NormCall) -> ir.Value:
        """The norm over the last axis, whatever the rank of ``x``."""

    def skip_norm(self, nodes: Nodes, residual: ir.Value, added: ir.Value, call: NormCall, *, last: bool) -> tuple[ir.Value, ir.Value]:
        """(norm(residual + added), residual + added); ``last``: nobody needs the second."""

    def activate(self, nodes: Nodes, x: ir.Value, kind: str) -> ir.Value:
        """``silu``, ``gelu`` (exact), ``gelu_tanh`` or ``relu``.

        Raises:
            UnsupportedError: another name.
        """

    def attention(self, nodes: Nodes, call: AttentionCall, shared: Any) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(attended [B, S, heads * head_size], present key, present value), the presents named ``present.{layer}.key`` and ``.value``."""


def lifted(nodes: Nodes, scalar: ir.Value) -> ir.Value:
    """A scalar reckoned from shapes, int64 [1], for arithmetic with tensors. Kernels of ``Range`` read on the host and write on the device, so that
    this costs no copy between the two, which a captured graph may not hold."""
    return nodes.op("Range", scalar, nodes.op("Add", scalar, nodes.constant(1)), nodes.constant(1))
