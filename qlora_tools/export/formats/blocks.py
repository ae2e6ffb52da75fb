"""4- and 8-bit codes with one scale per block of consecutive inputs: ``MatMulNBits`` and ``GatherBlockQuantized``.

In fp32 graphs accuracy level 4 (activations in int8 per block) is asked for: at the operator's default the CPU has no
kernel for 8 bits and dequantizes the whole matrix on every call. In 16-bit graphs, which are CUDA's, level 0.

CUDA's fast kernels (weights of 4 or 8 bits against 16-bit activations) want scales in the activations' dtype, no zero points, no
bias, and N in multiples of 64 (4 bits) or 32 (8 bits). So with 16-bit ``compute`` a bias is an ``Add`` of its own, scales are rounded
to that dtype before codes are chosen under them, and ``multiple`` pads the stored rows; what the padding yields is cut off again.

With ``zeros`` (8 bits) each block has a zero point and its 256 levels run from its smallest to its largest value;
this costs no time and saves a fifth of the squared error. Without, the grid is that of ``quant.blockwise``, scales
searched.

Calibrated codes keep the grid and fill the same parts. Scales searched under the inputs' mean squares were tried as a candidate: after error
feedback they gain nothing. Zero points of 4 bits cost 2 % more bytes and take a tenth off the divergence at best; error feedback takes half.

Parts: ``name`` U8 [O, blocks, bytes per block] (4 bits: the even input in the low half), ``name.scale`` F32, F16 or BF16
[O, blocks], ``name.zero`` U8 [O, blocks]; w = scale * (code - zero), zero 2**(bits-1) where none is stored. Inputs
beyond the last whole block are padded with 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qlora_tools.errors import NonFiniteError
from qlora_tools.export.formats.format import Moments
from qlora_tools.export.nodes import Nodes
from qlora_tools.quant.affine import quantize_affine
from qlora_tools.quant.blockwise import Grid, dequantize_blocks, pack_blocks, quantize_blocks
from qlora_tools.quant.calibrated import refit_scales
from qlora_tools.quant.gptq import StepGrid, sweep
from qlora_tools.specs import TensorSpec, dtype

_ACCURACY_LEVEL = {"F32": 4}


@dataclass(frozen=True)
class Blocks:
    """``bits`` is 4 or 8; ``block`` a power of two from 16; ``compute`` the dtype of activations and scales; rows are stored in a ``multiple``."""

    bits: int
    block: int = 32
    zeros: bool = False
    compute: str = "F32"
    multiple: int = 1

    def __post_init__(self) -> None:
        assert self.bits == 8 or not self.zeros, "4-bit zero points would be packed across blocks"
        assert self.compute == "F32" or not self.zeros, "CUDA's fast kernels know no zero points"

    def count(self, columns: int) -> int:
        return -(-columns // self.block)

    @property
    def carried(self) -> str:
        return f"int{self.bits}"

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        """Rows rounded up to the multiple; those that are too many are encoded from zeros by whoever fills the tensors."""
        blocks, rows = self.count(columns), -(-rows // self.multiple) * self.multiple
        codes = TensorSpec(name, "U8", (rows, blocks, self.block * self.bits // 8))
        scale = TensorSpec(f"{name}.scale", self.compute, (rows, blocks))
        zero = TensorSpec(f"{name}.zero", "U8", (rows, blocks))
        return (codes, scale, zero) if self.zeros else (codes, scale)

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.zeros:
            grid = quantize_affine(w_OI, self.block)
            return {name: grid.codes, f"{name}.scale": grid.scale, f"{name}.zero": grid.zero}
        codes, scale_OB = quantize_blocks(w_OI, self._grid, name=name)
        if self.compute == "F32":
            return {name: codes, f"{name}.scale": scale_OB}
        scale_OB = self._narrowed(name, scale_OB)
        return {name: self._nearest(w_OI, scale_OB.float()), f"{name}.scale": scale_OB}

    def candidates(self, name: str, w_OI: torch.Tensor, moments: Moments) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """``feedback`` on the plain scales and, where blocks are whole, on scales fitted once more to its codes under the moments."""
        plain = self.encode(name, w_OI)
        yield "plain", plain
        scale, zero = f"{name}.scale", f"{name}.zero"
        zero_OB = plain[zero].float() if self.zeros else torch.tensor(float(self._grid.zero_point)).expand(plain[scale].shape)
        codes_OI = self._swept(w_OI, plain[scale].float(), zero_OB, moments)
        yield "feedback", plain | {name: self._packed(codes_OI, zero_OB)}
        if w_OI.shape[1] % self.block == 0:
            fitted_OB = plain[scale].float().clone()
            refit_scales(w_OI.float(), codes_OI.float() - self._spread(zero_OB, w_OI), fitted_OB, moments.learn_II)
            scale_OB = self._narrowed(name, fitted_OB)
            codes_OI = self._swept(w_OI, scale_OB.float(), zero_OB, moments)
            yield "feedback, refitted", plain | {name: self._packed(codes_OI, zero_OB), scale: scale_OB}

    def _narrowed(self, name: str, scale_OB: torch.Tensor) -> torch.Tensor:
        """The scales in the dtype they are stored in.

        Raises:
            NonFiniteError: the grid's largest value does not fit that dtype, in which the kernels compute it.
        """
        kind = dtype(self.compute).torch
        if float(scale_OB.abs().max()) * self._grid.zero_point > torch.finfo(kind).max:
            raise NonFiniteError(f"`{name}` overflows in {self.compute}", hint="export it in bf16")
        return scale_OB.to(kind)

    def _nearest(self, w_OI: torch.Tensor, scale_OB: torch.Tensor) -> torch.Tensor:
        """Packed codes nearest to the weight under given scales; where a scale is 0, the code that means 0."""
        scale_OI, middle = self._spread(scale_OB, w_OI), self._grid.zero_point
        steps_OI = torch.where(scale_OI == 0, 0.0, w_OI.float() / scale_OI).round_()
        codes_OI = steps_OI.clamp_(-middle, middle - 1).add_(middle).to(torch.uint8)
        return self._packed(codes_OI, torch.full_like(scale_OB, middle))

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
            return dequantize_blocks(parts[name], scale_OB.float(), self._grid, columns)
        codes, zero_OB = (parts[part].to(torch.float32) for part in (name, f"{name}.zero"))
        return ((codes - zero_OB[..., None]) * scale_OB[..., None]).flatten(1)[:, :columns]

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        stored = nodes.shape(f"{name}.scale")[0]
        weight = [nodes.stored(f"{name}{part}") for part in ("", ".scale", ".zero")[: 3 if self.zeros else 2]]
        options = {"K": columns, "N": stored, "bits": self.bits, "block_size": self.block, "accuracy_level": _ACCURACY_LEVEL.get(self.compute, 0)}
        if self.compute == "F32" and stored == rows:
            return nodes.contrib("MatMulNBits", x_TI, *weight, *[None] * (4 - len(weight)), bias, **options)
        y = nodes.contrib("MatMulNBits", x_TI, *weight, **options)
        if stored > rows:
            y = nodes.op("Slice", y, nodes.constant([0]), nodes.constant([rows]), nodes.constant([-1]))
        return y if bias is None else nodes.op("Add", y, bias)

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
