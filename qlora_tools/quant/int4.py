"""Whole-number blocks with signed scales as a codec: what the ONNX export's int4 weights compute, for models that must learn around it.

The parts are those of ``MatMulNBits`` (``quant/blockwise.py``). No checkpoint is stored so: this codec only lives in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.errors import UnsupportedError
from qlora_tools.quant.blockwise import Grid, dequantize_blocks, quantize_blocks
from qlora_tools.specs import TensorSpec

_SCALES = ".scales"


@dataclass(frozen=True)
class Int4:
    """A codec over :class:`Grid`: packed codes under the tensor's own name, fp32 scales beside it."""

    grid: Grid = field(default_factory=lambda: Grid(search=True))

    @property
    def name(self) -> str:
        return f"int{self.grid.bits}-blocks"

    def part_specs(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        rows, columns = spec.shape
        shape = self.grid.packed_shape(rows, columns)
        return TensorSpec(spec.name, "U8", shape), TensorSpec(spec.name + _SCALES, "F32", shape[:2])

    def encode(self, spec: TensorSpec, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(spec.shape) != 2:
            raise UnsupportedError(f"{spec}: blocks are made of the rows of matrices", hint="choose --nf4, --int8 or --bf16")
        packed_NBJ, scale_NB = quantize_blocks(dense, self.grid, name=spec.name)
        return {spec.name: packed_NBJ, spec.name + _SCALES: scale_NB}

    def decode(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], rows: tuple[int, int] | None = None) -> torch.Tensor:
        chosen = slice(None) if rows is None else slice(*rows)
        dense_NK = dequantize_blocks(parts[spec.name][chosen], parts[spec.name + _SCALES][chosen], self.grid, spec.shape[1])
        return dense_NK.to(spec.torch_dtype)

    def describe(self) -> dict[str, Any]:
        raise UnsupportedError("no checkpoint is stored in whole-number blocks", hint="`qlt export --int4` writes them into a graph")
