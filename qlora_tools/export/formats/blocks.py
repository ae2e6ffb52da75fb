"""4- and 8-bit codes with one scale per block of consecutive inputs: ``MatMulNBits`` and ``GatherBlockQuantized``.

Accuracy level 4 (activations in int8 per block) is always asked for: at the operator's default the CPU has no
kernel for 8 bits and dequantizes the whole matrix on every call.

With ``zeros`` each block has a zero point and its 2**bits levels run from its smallest to its largest value; this
costs no time and saves a fifth of the squared error. Without, the grid is that of ``quant.blockwise``, scales searched.

Parts: ``name`` U8 [O, blocks, bytes per block] (4 bits: the even input in the low half), ``name.scale`` [O, blocks],
``name.zero`` U8 [O, bytes] (4 bits: the even block in the low half); w = scale * (code - zero), zero 2**(bits-1)
where none is stored. Inputs beyond the last whole block are padded with 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qlora_tools.export.formats.format import encode_in_slabs
from qlora_tools.export.nodes import Nodes
from qlora_tools.quant.blockwise import Grid, dequantize_blocks, quantize_blocks
from qlora_tools.specs import TensorSpec

_ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Blocks:
    """``bits`` is 4 or 8; ``block`` a power of two from 16."""

    bits: int
    block: int = 32
    zeros: bool = False
    compute: str = "F32"

    def count(self, columns: int) -> int:
        return -(-columns // self.block)

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        blocks = self.count(columns)
        codes = TensorSpec(name, "U8", (rows, blocks, self.block * self.bits // 8))
        scale = TensorSpec(f"{name}.scale", self.compute, (rows, blocks))
        zero = TensorSpec(f"{name}.zero", "U8", (rows, -(-blocks * self.bits // 8)))
        return (codes, scale, zero) if self.zeros else (codes, scale)

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.zeros:
            codes, scale_OB = quantize_blocks(w_OI, self._grid, name=name)
            return {name: codes, f"{name}.scale": scale_OB}

        def slab(rows_OI: torch.Tensor) -> dict[str, torch.Tensor]:
            return dict(zip((name, f"{name}.scale", f"{name}.zero"), _encode_with_zeros(rows_OI, self.bits, self.block), strict=True))

        return encode_in_slabs(w_OI, self.parts(name, *w_OI.shape), slab)

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int, *, looked_up: bool = False) -> torch.Tensor:
        scale_OB = parts[f"{name}.scale"]
        if not self.zeros:
            return dequantize_blocks(parts[name], scale_OB, self._grid, columns)
        zero_OB = _unpacked(parts[f"{name}.zero"], self.bits)[:, : scale_OB.shape[1]].to(torch.float32)
        codes = _unpacked(parts[name], self.bits).to(torch.float32)
        return ((codes - zero_OB[..., None]) * scale_OB[..., None]).flatten(1)[:, :columns]

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        weight = [nodes.stored(f"{name}{part}") for part in ("", ".scale", ".zero")[: 3 if self.zeros else 2]]
        options = {"K": columns, "N": rows, "bits": self.bits, "block_size": self.block, "accuracy_level": _ACCURACY_LEVEL}
        return nodes.contrib("MatMulNBits", x_TI, *weight, *[None] * (4 - len(weight)), bias, **options)

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        """Scales and zero points are named a second time with a third axis, which this operator wants; their bytes are the same."""
        assert self.bits == 8 or not self.zeros, "packed zero points of several blocks cannot be seen as one per block"
        rows, blocks = nodes.shape(f"{name}.scale")
        grid = [nodes.stored(f"{name}{part}", (rows, blocks, 1)) for part in (".scale", ".zero")[: 2 if self.zeros else 1]]
        options = {"bits": self.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 2}
        found = nodes.contrib("GatherBlockQuantized", nodes.stored(name), ids_T, *grid, **options)
        flat = nodes.op("Reshape", found, nodes.constant([-1, blocks * self.block]))
        return flat if columns == blocks * self.block else nodes.op("Slice", flat, nodes.constant([0]), nodes.constant([columns]), nodes.constant([1]))

    @property
    def _grid(self) -> Grid:
        return Grid(self.bits, self.block, search=True)


def _encode_with_zeros(w_OI: torch.Tensor, bits: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points: all levels between each block's smallest and largest value, zero among them."""
    rows, columns = w_OI.shape
    padding = -columns % block
    w_OBI = (torch.nn.functional.pad(w_OI, (0, padding)) if padding else w_OI).reshape(rows, -1, block)
    low_OB, high_OB = w_OBI.amin(-1).clamp(max=0.0), w_OBI.amax(-1).clamp(min=0.0)
    last = 2**bits - 1
    scale_OB = (high_OB - low_OB) / last
    scale_OB = torch.where(scale_OB == 0, torch.ones_like(scale_OB), scale_OB)
    zero_OB = (-low_OB / scale_OB).round()
    codes = (w_OBI / scale_OB[..., None]).round_().add_(zero_OB[..., None]).clamp_(0, last).to(torch.uint8)
    return _packed(codes, bits), scale_OB, _packed(zero_OB.to(torch.uint8), bits)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Two 4-bit codes a byte along the last axis, the first in the low half; 8-bit codes as they are."""
    if bits == 8:
        return codes
    even, odd = codes[..., 0::2], torch.nn.functional.pad(codes[..., 1::2], (0, codes.shape[-1] % 2))
    return even | (odd << 4)


def _unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
