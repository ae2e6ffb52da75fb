"""All experts of a layer in one node: ``MoE`` on floats, ``QMoE`` on blocks of 4 or 8 bits.

The bytes are those of :class:`Dense` and :class:`Blocks` for one tall matrix, the experts' rows one below the other; the operators see them as
[E, rows, columns]. Gate and up of an expert are one weight whose rows alternate (gate 0, up 0, gate 1, ...): the CPU's kernels take no other order.

What the operators were found to do (ONNX Runtime 1.31, CPU):

* ``QMoE`` divides a token's routing weights by their sum whatever ``normalize_routing_weights`` says, unless the weights come in as an input of
  their own (``router_weights``); so they always do.
* Columns that are not whole blocks are refused.
* Where scores are equal it is open which expert is chosen.
* 8-bit blocks always meet activations rounded to 8 bits; for 4-bit ones accuracy level 4 asks for it, as ``MatMulNBits`` is asked elsewhere.

CUDA (by its documentation; not tried here): ``weights_prepacked`` 0 says that the bytes are in this plain order, blocks are of 64 or 128 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.format import WeightFormat
from qlora_tools.export.nodes import Nodes

_ACCURACY_LEVEL = 4
#: Inputs that CUDA's node wants in a block.
CUDA_BLOCK = 64


@dataclass(frozen=True)
class Stack:
    """The weight ``name`` of all experts: ``rows`` of each one, ``count`` times."""

    name: str
    format: WeightFormat
    count: int
    rows: int
    columns: int

    def values(self, nodes: Nodes) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """(weights or codes, scales, zero points) with experts as first axis."""
        if isinstance(self.format, Dense):
            return nodes.stored(self.name, (self.count, self.rows, self.columns)), None, None
        assert isinstance(self.format, Blocks)
        blocks = self.format.count(self.columns)
        packed = blocks * self.format.block * self.format.bits // 8
        scale, zero = (
            nodes.stored(f"{self.name}{part}", (self.count, self.rows, blocks)) if part == ".scale" or self.format.zeros else None
            for part in (".scale", ".zero")
        )
        return nodes.stored(self.name, (self.count, self.rows, packed)), scale, zero


def has_one_node(form: WeightFormat, *columns: int) -> bool:
    """Whether the operators here take experts stored as ``form`` with that many inputs."""
    if isinstance(form, Dense):
        return form.stored == form.compute
    if isinstance(form, Blocks) and form.compute != "F32" and form.block < CUDA_BLOCK:
        return False
    return isinstance(form, Blocks) and form.multiple == 1 and all(size % form.block == 0 for size in columns)


def experts_node(
    nodes: Nodes, x_TH: ir.Value, scores_TE: ir.Value, weights_TE: ir.Value, gate_up: Stack, down: Stack, *, per_token: int, normalized: bool
) -> Any:
    """Nodes for the sum of each token's best experts, [T, H]. ``scores_TE`` choose, ``weights_TE`` (their softmax) weigh."""
    options: dict[str, Any] = {
        "k": per_token,
        "activation_type": "swiglu",
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "swiglu_fusion": 1,
        "normalize_routing_weights": int(normalized),
    }
    first, first_scale, first_zero = gate_up.values(nodes)
    second, second_scale, second_zero = down.values(nodes)
    if isinstance(gate_up.format, Dense):
        return nodes.contrib("MoE", x_TH, scores_TE, first, None, second, **options)
    form = gate_up.format
    assert isinstance(form, Blocks) and form == down.format, "QMoE has one block size for both of its products"
    level = {"accuracy_level": _ACCURACY_LEVEL} if form.compute == "F32" else {"weights_prepacked": 0}
    inputs = [x_TH, scores_TE, first, first_scale, None, second, second_scale, None, None, None, None, first_zero, second_zero, None, weights_TE]
    return nodes.contrib("QMoE", *inputs, expert_weight_bits=form.bits, block_size=form.block, **level, **options)
