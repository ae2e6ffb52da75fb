"""Whole-number grids as ONNX Runtime's operators take them. Weights arrive as slabs of rows, so large tensors may be done in tiles.

Axes: N output channels (or V vocabulary rows), K inputs, B blocks along K, J bytes of one block.

``MatMulNBits`` (com.microsoft): packed uint8 [N, B, J], scales fp32 [N, B]; ``w = (code - 2**(bits-1)) * scale`` with unsigned
codes, 4-bit ones low nibble first; the last block is padded with the zero point. Stored without zero points: the grid is -8..7 or
-128..127 and scales are *signed*, so that the value of largest magnitude may always use the longer, negative side. ``GatherBlockQuantized``
takes the same codes as [V, packed K]. ``DynamicQuantizeMatMul`` and ``MatMulIntegerToFloat`` take int8 [K, N] with one scale per column.

Scale search: the plain scale puts a block's extreme value exactly on -8. The search tries several scales of both signs, judges each by
the squared error its codes leave under their least-squares scale, and refits. Same bytes; on Gaussian weights in blocks of 32
the squared error falls by 11 % against the plain scale and by 30 % against absmax / 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.finite import refuse_non_finite
from qlora_tools.quant.floats import bit_patterns, in_threads
from qlora_tools.quant.kernels import CLEARLY, TINY, quantize_grid, quantize_rows

# Reciprocal scales tried where a block's extreme value is +1. Negative ones put it on the long side of the grid. The plain one is
# among those tried, so the search never does worse.
_PLAIN = {4: (-8.0,), 8: (-128.0,)}
_TRIED = {4: (-8.0, -8.8, -7.3, -9.6, 7.2, 8.0), 8: (-128.0, -129.5, -131.0, 127.0, 129.0)}
_REFITS = 1


@dataclass(frozen=True)
class Grid:
    """How blocks are rounded: ``bits`` 4 or 8, ``block`` values along K per scale (a power of two from 16), scale ``search`` or not."""

    bits: int = 4
    block: int = 32
    search: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _PLAIN:
            raise UsageError(f"{self.bits}-bit blocks are not supported", hint="choose 4 or 8 bits")
        if self.block < 16 or self.block & (self.block - 1):
            raise UsageError(f"block size {self.block} is not a power of two from 16 up", hint="32 is the accurate choice, 128 the small one")

    @property
    def zero_point(self) -> int:
        return 1 << (self.bits - 1)

    def blocks(self, k: int) -> int:
        """Blocks, and scales, in a row of ``k`` values."""
        return -(-k // self.block)

    def packed_shape(self, n: int, k: int) -> tuple[int, int, int]:
        """Shape of ``MatMulNBits``' B input."""
        return n, self.blocks(k), self.block * self.bits // 8

    def embedding_shape(self, v: int, k: int) -> tuple[int, int]:
        """Shape of ``GatherBlockQuantized``' data input."""
        return v, -(-k * self.bits // 8)


def quantize_blocks(w_NK: torch.Tensor, grid: Grid, *, name: str = "", row: int = 0, threads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [N, B, J], scales fp32 [N, B]) for ``MatMulNBits``. ``name`` and the slab's first ``row`` are for error messages.

    Raises:
        NonFiniteError: NaN or infinity in the slab.
    """
    bits, kind = bit_patterns(w_NK.cpu())
    n, k = bits.shape
    packed = torch.empty(grid.packed_shape(n, k), dtype=torch.uint8)
    scale = torch.empty((n, grid.blocks(k)), dtype=torch.float32)
    inverses = np.array(_TRIED[grid.bits] if grid.search else _PLAIN[grid.bits], dtype=np.float32)
    refits = _REFITS if grid.search else 0

    def quantize(low: int, high: int) -> None:
        quantize_grid(bits[low:high], kind, grid.block, grid.bits, inverses, refits, packed[low:high].numpy(), scale[low:high].numpy())

    in_threads(quantize, n, 1, threads)
    if not bool(torch.isfinite(scale).all()):
        refuse_non_finite(name, w_NK, row=row)
    return packed, scale


def pack_blocks(codes_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    """uint8 [N, B, J] of unsigned codes of whole blocks (uint8, K a multiple of the block), chosen elsewhere."""
    codes = codes_NK.view(len(codes_NK), -1, grid.block)
    return codes.clone() if grid.bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)


def dequantize_blocks(packed_NBJ: torch.Tensor, scale_NB: torch.Tensor, grid: Grid, k: int) -> torch.Tensor:
    """The fp32 [N, K] that ``MatMulNBits`` multiplies with."""
    codes = packed_NBJ if grid.bits == 8 else torch.stack([packed_NBJ & 15, packed_NBJ >> 4], -1).flatten(-2)
    values = (codes.to(torch.float32) - grid.zero_point) * scale_NB.unsqueeze(-1)
    return values.flatten(-2)[:, :k].contiguous()


def quantize_embedding(w_VK: torch.Tensor, grid: Grid, *, name: str = "", row: int = 0, threads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8 [V, K*bits/8], scales fp32 [V, B]) for ``GatherBlockQuantized`` with ``bits``, ``gather_axis`` 0, ``quantize_axis`` 1.

    The same bytes as :func:`quantize_blocks` where K is a whole number of blocks, so a tied embedding and output layer may share them.
    """
    if w_VK.shape[1] * grid.bits % 8:
        raise UnsupportedError(f"{name or 'embedding'}: rows of {w_VK.shape[1]} values do not fill whole bytes at {grid.bits} bits", hint="use 8 bits")
    packed, scale = quantize_blocks(w_VK, grid, name=name, row=row, threads=threads)
    return packed.flatten(1)[:, : grid.embedding_shape(*w_VK.shape)[1]].contiguous(), scale


def quantize_channels(w_NK: torch.Tensor, *, reduce_range: bool = False, name: str = "", row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [K, N], scales fp32 [N]), symmetric with zero point 0: columns of an [K, N] weight for ``DynamicQuantizeMatMul``.

    ``reduce_range`` keeps codes within -64..64: CPUs without VNNI instructions add pairs of products in 16 bits and would saturate.

    Raises:
        NonFiniteError: NaN or infinity in the slab.
    """
    limit = 64.0 if reduce_range else 127.0
    bits, kind = bit_patterns(w_NK.cpu())
    codes = torch.empty(w_NK.shape, dtype=torch.int8)
    absmax = torch.empty(w_NK.shape[0], dtype=torch.float32)
    quantize_rows(bits, kind, np.float32(limit), codes.numpy(), absmax.numpy())
    if not bool(torch.isfinite(absmax).all()):
        refuse_non_finite(name, w_NK, row=row)
    return codes.t().contiguous(), absmax / limit


def quantize_blocks_plain(w_NK: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_blocks` in plain torch: the rule that tests hold the kernel to (under search, up to the order of sums)."""
    padded = torch.nn.functional.pad(w_NK.float(), (0, -w_NK.shape[1] % grid.block))
    values = padded.view(len(w_NK), -1, grid.block)
    at = values.abs().argmax(-1, keepdim=True)
    extreme = values.gather(-1, at)
    extreme = torch.where(extreme.abs() >= float(TINY), extreme, 0)
    unit = torch.where(extreme != 0, values * (1 / extreme), 0)
    low, high = -float(grid.zero_point), float(grid.zero_point - 1)
    inverse = torch.full_like(extreme, _PLAIN[grid.bits][0])
    scale = 1 / inverse
    if grid.search:
        least = torch.full_like(scale, torch.inf)
        for attempt in range(len(_TRIED[grid.bits]) + _REFITS):
            tried = torch.full_like(scale, _TRIED[grid.bits][attempt]) if attempt < len(_TRIED[grid.bits]) else 1 / scale
            codes = torch.round(unit * tried).clamp(low, high)
            error = unit - codes / tried
            dot, square = (error * codes).sum(-1, keepdim=True), (codes * codes).sum(-1, keepdim=True).clamp(min=1)
            left = (error * error).sum(-1, keepdim=True) - dot * dot / square
            better = left < least * float(CLEARLY)
            least, scale, inverse = (torch.where(better, new, old) for new, old in ((left, least), (1 / tried + dot / square, scale), (tried, inverse)))
    unsigned = (torch.round(unit * inverse).clamp(low, high) + grid.zero_point).to(torch.uint8)
    return pack_blocks(unsigned.flatten(1), grid), (scale * extreme).squeeze(-1)
