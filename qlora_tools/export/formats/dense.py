"""Weights stored as floats. ``stored`` may be narrower than fp32 for tables that are only looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qlora_tools.export.formats.format import Moments
from qlora_tools.export.nodes import Nodes
from qlora_tools.specs import TensorSpec, dtype


@dataclass(frozen=True)
class Dense:
    """``Gemm`` and ``Gather`` on a float [O, I]; ``stored`` and ``compute`` are safetensors dtype names."""

    stored: str = "F32"
    compute: str = "F32"

    @property
    def carried(self) -> str:
        return {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}[self.stored]

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name, self.stored, (rows, columns)),)

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: w_OI.to(dtype(self.stored).torch)}

    def candidates(self, name: str, w_OI: torch.Tensor, moments: Moments) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        yield "plain", self.encode(name, w_OI)

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int, *, looked_up: bool = False) -> torch.Tensor:
        return parts[name].to(torch.float32)

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        assert self.stored == self.compute, "a table in another dtype than the graph's cannot be multiplied"
        return nodes.op("Gemm", x_TI, nodes.stored(name), bias, transB=1)

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        found = nodes.op("Gather", nodes.stored(name), ids_T, axis=0)
        return found if self.stored == self.compute else nodes.op("Cast", found, to=dtype(self.compute).onnx)
