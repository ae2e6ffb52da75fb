"""The hot CPU loops of this room, compiled with numba. Flat arrays in, caller's arrays filled; no torch, no policy.

Every loop here has a plain torch twin beside the format that uses it (``nf4.quantize_blocks_plain``, ...), and tests
hold the two together bit for bit. What the loops add is speed and memory: they read bf16, fp16 or fp32 as they lie,
make no fp32 copy of the tensor, and release the GIL, so the engine may run one tensor per thread.

Floats arrive as their bit patterns: ``bits`` is ``uint16`` for bf16 and fp16, ``uint32`` for fp32, and ``kind`` says
which. All arithmetic is fp32 in source order, without fast-math, so results do not depend on
the vector width; the one exception is the scale search (``_fit``), whose sums may differ in the last bit between kinds of CPU; ties are broken with a margin.

Index variables start at 0 and slices carry the offset: numba can then prove that no index is negative, and LLVM vectorises.

Compiled code is cached beside this file or in ``NUMBA_CACHE_DIR``; where neither can be written, each process compiles anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

BF16, FP16, FP32 = 0, 1, 2  # values of ``kind``

NF4_LEVELS = np.array(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    dtype=np.float32,
)
"""The 16 values of NF4 (Dettmers et al. 2023, appendix E), ascending; the code of a value is its index."""

NF4_MIDPOINTS = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2)
"""Decision bounds: a code is the number of bounds strictly below the normalised value."""

TINY = np.float32(1e-38)  # bitsandbytes' floor under a block's absmax, so that its reciprocal stays finite
ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to nearest even where |x| < 2**22

_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9, _T10, _T11, _T12, _T13, _T14 = (np.float32(bound) for bound in NF4_MIDPOINTS)
CLEARLY = np.float32(1 - 1e-5)  # by how much a scale must win: codes that no clipping touches fit as well negated, and such ties go to the first
_ONE, _ZERO = np.float32(1), np.float32(0)
_FP16_REBIAS = np.float32(2.0**112)  # fp16 bits moved into fp32 places are 2**112 too small; exact for subnormals too
_FP16_INF = np.float32(65536.0)  # what an fp16 infinity becomes by that route; finite fp16 stops at 65504


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``numba.njit`` that releases the GIL; cached on disk where a cache folder can be written."""
    compiled: Callable[..., Any]
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba: "no locator available", a read-only installation without a writable cache
        compiled = numba.njit(nogil=True)(function)
    return compiled


def _reordering(function: Callable[..., Any]) -> Callable[..., Any]:
    """``numba.njit`` for a sum whose terms may be added in any order; inlined into compiled callers."""
    compiled: Callable[..., Any] = numba.njit(nogil=True, fastmath={"reassoc"})(function)
    return compiled


@_compiled
def _as_float(word):  # type: ignore[no-untyped-def]
    """The fp32 whose bits are ``word`` (uint32)."""
    return np.uint32(word).view(np.float32)


@_compiled
def _as_word(value):  # type: ignore[no-untyped-def]
    """The bits of an fp32 value, as uint32."""
    return np.float32(value).view(np.uint32)


@_compiled
def _widen(bits, kind, out):  # type: ignore[no-untyped-def]
    """``out`` fp32[n] = the floats whose bit patterns are ``bits``."""
    n = len(bits)
    if kind == BF16:
        for j in range(n):
            out[j] = _as_float(np.uint32(np.uint32(bits[j]) << np.uint32(16)))
    elif kind == FP16:
        for j in range(n):
            word = np.uint32(bits[j])
            magnitude = _as_float(np.uint32((word & np.uint32(0x7FFF)) << np.uint32(13))) * _FP16_REBIAS
            out[j] = magnitude if word < np.uint32(0x8000) else -magnitude
    else:
        for j in range(n):
            out[j] = _as_float(np.uint32(bits[j]))


@_compiled
def _largest(values, kind):  # type: ignore[no-untyped-def]
    """max |value|; not finite if any value is not. Compares bit patterns: those vectorise, and NaN wins."""
    words = values.view(np.uint32)
    top = np.uint32(0)
    for j in range(len(words)):
        top = max(top, np.uint32(words[j] & np.uint32(0x7FFFFFFF)))
    largest = _as_float(top)
    if kind == FP16 and largest >= _FP16_INF:
        return np.float32(np.inf)
    return largest


@_compiled
def quantize_nf4(bits, kind, blocksize, packed, absmax, first, last):  # type: ignore[no-untyped-def]
    """NF4 codes and scales of the whole blocks ``first:last`` of a flat tensor.

    ``bits[n]``; ``packed`` uint8[n/2], even element in the high nibble; ``absmax`` fp32[blocks], not finite where a block holds
    NaN or infinity (its codes are then meaningless). ``blocksize`` is even and every block named is full.
    """
    values = np.empty(blocksize, np.float32)
    codes = np.empty(blocksize, np.uint8)
    half = blocksize >> 1
    for block in range(first, last):
        start = block * blocksize
        _widen(bits[start : start + blocksize], kind, values)
        largest = _largest(values, kind)
        absmax[block] = largest
        inverse = _ONE / max(largest, TINY)
        for j in range(blocksize):
            v = values[j] * inverse
            code = np.uint8(v > _T0) + np.uint8(v > _T1) + np.uint8(v > _T2) + np.uint8(v > _T3) + np.uint8(v > _T4)
            code += np.uint8(v > _T5) + np.uint8(v > _T6) + np.uint8(v > _T7) + np.uint8(v > _T8) + np.uint8(v > _T9)
            code += np.uint8(v > _T10) + np.uint8(v > _T11) + np.uint8(v > _T12) + np.uint8(v > _T13) + np.uint8(v > _T14)
            codes[j] = code
        out = packed[start >> 1 : (start >> 1) + half]
        for j in range(half):
            out[j] = np.uint8((codes[2 * j] << np.uint8(4)) | codes[2 * j + 1])


@_compiled
def _narrow(value, kind):  # type: ignore[no-untyped-def]
    """The bits of an fp32 value rounded to ``kind``, half to even, as uint32."""
    word = _as_word(value)
    if kind == FP32:
        return word
    magnitude = np.uint32(word & np.uint32(0x7FFFFFFF))
    if kind == BF16:
        if magnitude > np.uint32(0x7F800000):  # NaN; the carry below would lose it
            return np.uint32(0x7FC0)
        return np.uint32((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    sign = np.uint32((word >> np.uint32(16)) & np.uint32(0x8000))
    if magnitude >= np.uint32(0x47800000):  # 65536 and up, NaN
        return np.uint32(sign | (np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)))
    if magnitude < np.uint32(0x38800000):  # below 2**-14: adding 0.5 rounds at fp16's subnormal step
        return np.uint32(sign | (_as_word(_as_float(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000)))
    rounded = np.uint32(magnitude + np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1)))
    return np.uint32(sign | ((rounded - np.uint32(0x38000000)) >> np.uint32(13)))


@_compiled
def dequantize_nf4(packed, absmax, blocksize, kind, start, stop, out):  # type: ignore[no-untyped-def]
    """Flat elements ``start:stop`` as bit patterns of ``kind``: level * absmax in fp32, rounded once.

    ``packed`` is the whole tensor's; ``absmax`` begins at the block of ``start``; ``out`` [stop - start] is uint16 or uint32. A block
    has 16 possible values: they are computed once and then looked up.
    """
    values = np.empty(16, out.dtype)
    first = start // blocksize
    for block in range(first, (stop + blocksize - 1) // blocksize):
        scale = absmax[block - first]
        for k in range(16):
            values[k] = _narrow(NF4_LEVELS[k] * scale, kind)
        low, high = max(block * blocksize, start), min((block + 1) * blocksize, stop)
        target = out[low - start : high - start]
        if low & 1:
            target[0] = values[packed[low >> 1] & np.uint8(15)]
            target = target[1:]
            low += 1
        pairs = (high - low) >> 1
        source = packed[low >> 1 : (low >> 1) + pairs]
        for j in range(pairs):
            byte = source[j]
            target[2 * j] = values[byte >> np.uint8(4)]
            target[2 * j + 1] = values[byte & np.uint8(15)]
        if (high - low) & 1:
            target[2 * pairs] = values[packed[high >> 1] >> np.uint8(4)]


@_compiled
def quantize_rows(bits_RC, kind, limit, codes_RC, absmax_R):  # type: ignore[no-untyped-def]
    """Row-wise symmetric int8: ``code = round_half_even(value * (limit / max |row|))``; a row of zeros gets zeros.

    ``absmax_R`` fp32 is not finite where the row holds NaN or infinity.
    """
    columns = bits_RC.shape[1]
    values = np.empty(columns, np.float32)
    for row in range(bits_RC.shape[0]):
        _widen(bits_RC[row], kind, values)
        largest = _largest(values, kind)
        absmax_R[row] = largest
        scale = (_ONE / largest) * limit if largest > _ZERO else _ZERO  # in this order: torch divides a number by a tensor so
        codes = codes_RC[row]
        if not np.isfinite(scale):  # a row so small that the scale overflows; as if it were zero
            scale = _ZERO
        for j in range(columns):
            codes[j] = np.int8(np.int32((values[j] * scale + ROUNDER) - ROUNDER))


@_compiled
def _round_to_grid(value, inverse, low, high):  # type: ignore[no-untyped-def]
    """value * inverse rounded half to even and clipped to the whole numbers low..high, as fp32."""
    return min(max((value * inverse + ROUNDER) - ROUNDER, low), high)


@_reordering
def _fit(values, inverse, low, high):  # type: ignore[no-untyped-def]
    """(squared error left, scale): the least-squares scale for the codes of this reciprocal scale, and what it leaves.

    Computed from the error under the scale tried, so that nearly perfect 8-bit fits do not drown in cancellation.
    """
    scale = _ONE / inverse
    dot, square, left = _ZERO, _ZERO, _ZERO
    for j in range(len(values)):
        code = _round_to_grid(values[j], inverse, low, high)
        error = values[j] - scale * code
        dot += error * code
        square += code * code
        left += error * error
    if square == _ZERO:
        return left, scale
    return left - dot * dot / square, scale + dot / square


@_compiled
def quantize_grid(bits_RK, kind, block, width, inverses, refits, packed_RBJ, scale_RB):  # type: ignore[no-untyped-def]
    """Signed-scale whole-number grid per block along K: ``value = code * scale`` with codes ``-2**(width-1) .. 2**(width-1)-1``.

    ``bits_RK``; ``packed_RBJ`` uint8 [rows, ceil(K/block), block*width/8] takes ``code + 2**(width-1)``, of 4-bit codes the earlier in
    the low nibble, zero beyond K; ``scale_RB`` fp32. Inside a block values are divided by
    the value of largest magnitude (the first of equals), so that this one becomes +1; ``inverses`` fp32[n] are the reciprocal scales
    tried there. With one and no ``refits`` that scale is used as it is. Otherwise the one whose codes, under their least-squares
    scale, leave the least squared error is taken, and code choice and least squares alternate ``refits`` more times. ``scale`` is
    not finite where the block holds NaN or infinity, and 0 where nothing in it reaches 1e-38.
    """
    rows, columns = bits_RK.shape
    low, high = np.float32(-(1 << (width - 1))), np.float32((1 << (width - 1)) - 1)
    values = np.empty(block, np.float32)
    codes = np.empty(block, np.uint8)
    for row in range(rows):
        line = bits_RK[row]
        for number in range(scale_RB.shape[1]):
            start = number * block
            if start + block > columns:
                values[:] = _ZERO
            _widen(line[start : min(start + block, columns)], kind, values)
            largest = _largest(values, kind)
            packed = packed_RBJ[row, number]
            if not largest >= TINY or not np.isfinite(largest):
                scale_RB[row, number] = _ZERO if largest < TINY else np.float32(np.inf)
                packed[:] = 0x88 if width == 4 else 0x80
                continue
            extreme = largest
            for j in range(block):
                if abs(values[j]) == largest:
                    extreme = values[j]
                    break
            shrink = _ONE / extreme
            for j in range(block):
                values[j] *= shrink
            inverse = inverses[0]
            scale = _ONE / inverse
            if len(inverses) > 1 or refits > 0:
                least = np.float32(np.inf)
                for attempt in range(len(inverses) + refits):
                    tried = inverses[attempt] if attempt < len(inverses) else _ONE / scale
                    left, fitted = _fit(values, tried, low, high)
                    if left < least * CLEARLY:
                        least, scale, inverse = left, fitted, tried
            scale_RB[row, number] = scale * extreme
            for j in range(block):
                codes[j] = np.uint8(np.int32(_round_to_grid(values[j], inverse, low, high) - low))
            if width == 4:
                for j in range(block >> 1):
                    packed[j] = np.uint8(codes[2 * j] | (codes[2 * j + 1] << np.uint8(4)))
            else:
                packed[:] = codes
