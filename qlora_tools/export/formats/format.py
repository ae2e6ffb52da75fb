"""The protocol of a weight format.

Legend: O output features (rows of a stored weight), I input features, T tokens. Parts have O as their first
axis, so that packed projections are written as row ranges and a vocabulary in row tiles; the one format that
cannot have it so says ``whole``. Parts may have more rows than the weight: a format that pads for its kernels
gets the rows that are too many encoded from zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
import torch

from qlora_tools.export.nodes import Nodes
from qlora_tools.quant.gptq import Feedback
from qlora_tools.specs import TensorSpec


@dataclass(frozen=True, eq=False)
class Moments:
    """What a layer's inputs x are like: ``learn_II`` = E[x x'] fp32 over the text that candidates are made from, ``feedback`` its factor, and
    ``judge_II`` the same over other text, which they are judged by."""

    learn_II: torch.Tensor
    judge_II: torch.Tensor
    feedback: Feedback


class WeightFormat(Protocol):
    @property
    def carried(self) -> str:
        """What the weight becomes, in the words of schemes: ``int4``, ``int8``, ``nf4``, ``fp32``, ``fp16``, ``bf16``."""

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        """Specs of the tensors that carry the weight ``name`` of shape [rows, columns]; axis 0 of each is rows, or a few more."""

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of some rows of the weight, given in any float dtype; rounded once, from fp32.

        NaN or infinity in the weight shows in a floating part, or raises NonFiniteError.
        """

    def candidates(self, name: str, w_OI: torch.Tensor, moments: Moments) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Ways to carry the same rows in the same parts, made for the inputs of ``moments``; :meth:`encode`'s own, ``plain``, comes first."""

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int, *, looked_up: bool = False) -> torch.Tensor:
        """What the graph multiplies with, or what it looks up, fp32 [rows, columns]."""

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        """Nodes for ``x @ w.T + bias``: [T, I] -> [T, O]; those that ``Layout.flat`` counts free also take [B, S, I]."""

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        """Nodes that look rows up: int64 [T] -> [T, I]."""
