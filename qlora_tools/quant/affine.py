"""256 levels between the smallest and the largest value of a block: unsigned codes, a scale and a zero point.

Axes: R rows, K inputs, B blocks along K, J inputs of one block (the last block is padded with zeros).

``w = (code - zero) * scale`` with codes and zero in 0..255; zero is always a level, so padding and exact zeros stay exact.
Where a block is a whole row, or a large part of one, this is the "per channel" int8 of integer matrix products; in blocks of 32 it
is what ``MatMulNBits`` takes with 8-bit zero points. ``rest`` is what rounding left, in 1/254 of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch

from qlora_tools.quant.floats import bit_patterns
from qlora_tools.quant.kernels import ROUNDER, TINY, _compiled, _largest, _widen

#: One step of ``rest``, in steps of the grid.
REST_STEP = 1 / 254
_LEVELS = np.float32(255)
_ZERO, _ONE, _REST = np.float32(0), np.float32(1), np.float32(254)


@dataclass(frozen=True)
class Affine:
    """``codes`` and ``rest`` [R, B, J], ``scale`` fp32 and ``zero`` [R, B]; codes and zero uint8, rest int8 (``None`` unless asked for)."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    rest: torch.Tensor | None


def quantize_affine(w_RK: torch.Tensor, block: int, columns: tuple[int, int] | None = None, *, rest: bool = False) -> Affine:
    """The grid of every block of ``columns`` (default: all). A scale is not finite where its block holds NaN or infinity."""
    bits, kind = bit_patterns(w_RK.cpu())
    start, stop = columns or (0, w_RK.shape[1])
    shape = (w_RK.shape[0], -(-(stop - start) // block))
    codes, zero = torch.empty((*shape, block), dtype=torch.uint8), torch.empty(shape, dtype=torch.uint8)
    scale, left = torch.empty(shape), torch.empty((*shape, block) if rest else (0, 0, 0), dtype=torch.int8)
    _quantize(bits, kind, start, stop, codes.numpy(), scale.numpy(), zero.numpy(), left.numpy())
    return Affine(codes, scale, zero, left if rest else None)


def quantize_affine_plain(w_RK: torch.Tensor, block: int) -> Affine:
    """:func:`quantize_affine` of all columns in plain torch: the rule that tests hold the kernel to."""
    w_RBJ = torch.nn.functional.pad(w_RK.float(), (0, -w_RK.shape[1] % block)).view(len(w_RK), -1, block)
    low, high = w_RBJ.amin(-1).clamp(max=0), w_RBJ.amax(-1).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale < float(TINY), torch.ones_like(scale), scale)
    inverse = 1 / scale
    zero = (-low * inverse).round()
    steps = w_RBJ * inverse[..., None]
    codes = (steps.round() + zero[..., None]).clamp(0, 255)
    rest = ((steps - (codes - zero[..., None])) * 254).round().clamp(-127, 127)
    return Affine(codes.to(torch.uint8), scale, zero.to(torch.uint8), rest.to(torch.int8))


@numba.njit(nogil=True, fastmath={"nnan", "nsz", "reassoc"})
def _ends(values):  # type: ignore[no-untyped-def]
    """(min(0, values), max(0, values)) of finite values."""
    low, high = _ZERO, _ZERO
    for j in range(len(values)):
        low = min(low, values[j])
        high = max(high, values[j])
    return low, high


@_compiled
def _quantize(bits_RK, kind, start, stop, codes_RBJ, scale_RB, zero_RB, rest_RBJ):  # type: ignore[no-untyped-def]
    rows, blocks, block = codes_RBJ.shape
    values = np.empty(block, np.float32)
    for row in range(rows):
        line = bits_RK[row]
        for number in range(blocks):
            first = start + number * block
            last = min(first + block, stop)
            if last - first < block:
                values[:] = _ZERO
            _widen(line[first:last], kind, values)
            largest = _largest(values, kind)
            if not np.isfinite(largest):
                scale_RB[row, number] = np.float32(np.nan)
                continue
            low, high = _ends(values)
            scale = (high - low) / _LEVELS
            if scale < TINY:
                scale = _ONE
            inverse = _ONE / scale
            zero = (-low * inverse + ROUNDER) - ROUNDER
            scale_RB[row, number], zero_RB[row, number] = scale, np.uint8(np.int32(zero))
            codes = codes_RBJ[row, number]
            for j in range(block):
                codes[j] = np.uint8(np.int32(min(max((values[j] * inverse + ROUNDER) - ROUNDER + zero, _ZERO), _LEVELS)))
            if rest_RBJ.size:
                rest = rest_RBJ[row, number]
                for j in range(block):
                    left = values[j] * inverse - (np.float32(codes[j]) - zero)
                    rest[j] = np.int8(np.int32(min(max((left * _REST + ROUNDER) - ROUNDER, np.float32(-127)), np.float32(127))))
