"""The protocol of a weight format.

Legend: O output features (rows of a stored weight), I input features, T tokens. Every part of every format
has O as its first axis, so that packed projections are written as row ranges and a vocabulary in row tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import onnx_ir as ir
import torch

from qlora_tools.export.nodes import Nodes
from qlora_tools.specs import TensorSpec


class WeightFormat(Protocol):
    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        """Specs of the tensors that carry the weight ``name`` of shape [rows, columns]; axis 0 of each is rows."""

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of some rows of the weight, given in any float dtype; rounded once, from fp32.

        NaN or infinity in the weight shows in a floating part, or raises NonFiniteError.
        """

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int, *, looked_up: bool = False) -> torch.Tensor:
        """What the graph multiplies with, or what it looks up, fp32 [rows, columns]."""

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        """Nodes for ``x @ w.T + bias``: [T, I] -> [T, O]."""

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        """Nodes that look rows up: int64 [T] -> [T, I]."""
