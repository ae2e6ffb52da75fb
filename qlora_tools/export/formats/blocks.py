"""4- and 8-bit codes with one scale per block of consecutive inputs: ``MatMulNBits`` and ``GatherBlockQuantized``.

Accuracy level 4 (activations in int8 per block) is always asked for: at the operator's default the CPU has no
kernel for 8 bits and dequantizes the whole matrix on every call.

With ``zeros`` (8 bits) each block has a zero point and its 256 levels run from its smallest to its largest value;
this costs no time and saves a fifth of the squared error. Without, the grid is that of ``quant.blockwise``, scales
searched.

Calibrated codes keep the grid and fill the same parts. Scales searched under the inputs' mean squares were tried as a candidate: after error
feedback they gain nothing. Zero points of 4 bits cost 2 % more bytes and take a tenth off the divergence at best; error feedback takes half.

Parts: ``name`` U8 [O, blocks, bytes per block] (4 bits: the even input in the low half), ``name.scale`` F32
[O, blocks], ``name.zero`` U8 [O, blocks]; w = scale * (code - zero), zero 2**(bits-1) where none is stored. Inputs
beyond the last whole block are padded with 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qlora_tools.export.formats.format import Moments
from qlora_tools.export.nodes import Nodes
from qlora_tools.quant.affine import quantize_affine
from qlora_tools.quant.blockwise import Grid, dequantize_blocks, pack_blocks, quantize_blocks
from qlora_tools.quant.calibrated import refit_scales
from qlora_tools.quant.gptq import StepGrid, sweep
from qlora_tools.specs import TensorSpec

_ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Blocks:
    """``bits`` is 4 or 8; ``block`` a power of two from 16."""

    bits: int
    block: int = 32
    zeros: bool = False

    def __post_init__(self) -> None:
        assert self.bits == 8 or not self.zeros, "4-bit zero points would be packed across blocks"

    def count(self, columns: int) -> int:
        return -(-columns // self.block)

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        blocks = self.count(columns)
        codes = TensorSpec(name, "U8", (rows, blocks, self.block * self.bits // 8))
        scale = TensorSpec(f"{name}.scale", "F32", (rows, blocks))
        zero = TensorSpec(f"{name}.zero", "U8", (rows, blocks))
        return (codes, scale, zero) if self.zeros else (codes, scale)

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.zeros:
            grid = quantize_affine(w_OI, self.block)
            return {name: grid.codes, f"{name}.scale": grid.scale, f"{name}.zero": grid.zero}
        codes, scale_OB = quantize_blocks(w_OI, self._grid, name=name)
        return {name: codes, f"{name}.scale": scale_OB}

    def candidates(self, name: str, w_OI: torch.Tensor, moments: Moments) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """``feedback`` on the plain scales and, where blocks are whole, on scales fitted once more to its codes under the moments."""
        plain = self.encode(name, w_OI)
        yield "plain", plain
        scale, zero = f"{name}.scale", f"{name}.zero"
        zero_OB = plain[zero].float() if self.zeros else torch.tensor(float(self._grid.zero_point)).expand(plain[scale].shape)
        codes_OI = self._swept(w_OI, plain[scale], zero_OB, moments)
        yield "feedback", plain | {name: self._packed(codes_OI, zero_OB)}
        if w_OI.shape[1] % self.block == 0:
            scale_OB = plain[scale].clone()
            refit_scales(w_OI.float(), codes_OI.float() - self._spread(zero_OB, w_OI), scale_OB, moments.learn_II)
            codes_OI = self._swept(w_OI, scale_OB, zero_OB, moments)
            yield "feedback, refitted", plain | {name: self._packed(codes_OI, zero_OB), scale: scale_OB}

    def _spread(self, per_block_OB: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
        """[O, I]: each input's own entry of its block."""
        return per_block_OB.repeat_interleave(self.block, 1)[:, : w_OI.shape[1]]

    def _swept(self, w_OI: torch.Tensor, scale_OB: torch.Tensor, zero_OB: torch.Tensor, moments: Moments) -> torch.Tensor:
        """Unsigned codes uint8 [O, I] by error feedback."""
        return sweep(w_OI, moments.feedback, StepGrid(0, (1 << self.bits) - 1, self._spread(scale_OB, w_OI), self._spread(zero_OB, w_OI)))

    def _packed(self, codes_OI: torch.Tensor, zero_OB: torch.Tensor) -> torch.Tensor:
        """Padded with the zero point of the last block, then packed."""
        padding = zero_OB[:, -1:].to(torch.uint8).expand(-1, -codes_OI.shape[1] % self.block)
        return pack_blocks(torch.cat([codes_OI, padding], 1), self._grid)

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int, *, looked_up: bool = False) -> torch.Tensor:
        scale_OB = parts[f"{name}.scale"]
        if not self.zeros:
            return dequantize_blocks(parts[name], scale_OB, self._grid, columns)
        codes, zero_OB = (parts[part].to(torch.float32) for part in (name, f"{name}.zero"))
        return ((codes - zero_OB[..., None]) * scale_OB[..., None]).flatten(1)[:, :columns]

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        weight = [nodes.stored(f"{name}{part}") for part in ("", ".scale", ".zero")[: 3 if self.zeros else 2]]
        options = {"K": columns, "N": rows, "bits": self.bits, "block_size": self.block, "accuracy_level": _ACCURACY_LEVEL}
        return nodes.contrib("MatMulNBits", x_TI, *weight, *[None] * (4 - len(weight)), bias, **options)

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        """Scales and zero points are named a second time with a third axis, which this operator wants; their bytes are the same."""
        rows, blocks = nodes.shape(f"{name}.scale")
        grid = [nodes.stored(f"{name}{part}", (rows, blocks, 1)) for part in (".scale", ".zero")[: 2 if self.zeros else 1]]
        options = {"bits": self.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 2}
        found = nodes.contrib("GatherBlockQuantized", nodes.stored(name), ids_T, *grid, **options)
        flat = nodes.op("Reshape", found, nodes.constant([-1, blocks * self.block]))
        return flat if columns == blocks * self.block else nodes.op("Slice", flat, nodes.constant([0]), nodes.constant([columns]), nodes.constant([1]))

    @property
    def _grid(self) -> Grid:
        return Grid(self.bits, self.block, search=True)
