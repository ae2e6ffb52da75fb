"""The loops of NF4's scale search, compiled with numba: which scale suits a block best, and the codes under scales already chosen.

Conventions are those of ``kernels``: bit patterns in, caller's arrays filled, no torch, no policy. The plain torch twins stand in ``search``.
Sums may be added in any order (``_reordering``), so scales may differ in the last bit between kinds of CPU; a candidate has to win by a margin.
"""

from __future__ import annotations

import numpy as np

from qlora_tools.quant.kernels import FP32, NF4_LEVELS, NF4_MIDPOINTS, TINY, _compiled, _largest, _reordering, _widen

_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9, _T10, _T11, _T12, _T13, _T14 = (np.float32(bound) for bound in NF4_MIDPOINTS)
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7, _L8, _L9, _L10, _L11, _L12, _L13, _L14, _L15 = (np.float32(level) for level in NF4_LEVELS)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
CLEARLY_MORE = np.float32(1 + 1e-6)  # by how much a scale must explain more of a block than the best so far
SMALLEST_INVERSE = np.float32(0.8620)  # times the largest magnitude; below it no value might be nearest to an end of NF4's levels


@_reordering
def _explain(values, weighted, weights, inverse):  # type: ignore[no-untyped-def]
    """(sum of weight * value * level, sum of weight * level**2) for the levels nearest to ``values * inverse``."""
    dot, square = _ZERO, _ZERO
    for j in range(len(values)):
        v = values[j] * inverse
        level = _L1 if v > _T0 else _L0
        level = _L2 if v > _T1 else level
        level = _L3 if v > _T2 else level
        level = _L4 if v > _T3 else level
        level = _L5 if v > _T4 else level
        level = _L6 if v > _T5 else level
        level = _L7 if v > _T6 else level
        level = _L8 if v > _T7 else level
        level = _L9 if v > _T8 else level
        level = _L10 if v > _T9 else level
        level = _L11 if v > _T10 else level
        level = _L12 if v > _T11 else level
        level = _L13 if v > _T12 else level
        level = _L14 if v > _T13 else level
        level = _L15 if v > _T14 else level
        dot += weighted[j] * level
        square += weights[j] * (level * level)
    return dot, square


@_compiled
def search_nf4(bits, kind, blocksize, diag, inverses, refits, smallest, absmax, first, last):  # type: ignore[no-untyped-def]
    """Scales of the blocks ``first:last`` of a flat tensor that leave the least weighted squared error, before double quantization.

    ``bits[n]``; ``diag`` fp32[I] holds the weight of each input, I a divisor of n, or is empty: all alike. ``inverses`` fp32[k] are the reciprocal
    scales tried, times the block's largest magnitude, negative ones too; each is judged under the least-squares scale of its codes. Code choice and
    least squares then alternate ``refits`` times, never trying a reciprocal below ``smallest``. ``absmax`` fp32[blocks] takes the scales: 0 where
    nothing in the block reaches 1e-38, not finite where it holds NaN or infinity.
    """
    values, weighted, weights = np.zeros(blocksize, np.float32), np.zeros(blocksize, np.float32), np.ones(blocksize, np.float32)
    columns = len(diag)
    for block in range(first, last):
        start = block * blocksize
        if start + blocksize > len(bits):
            values[:] = _ZERO
        _widen(bits[start : min(start + blocksize, len(bits))], kind, values)
        largest = _largest(values, kind)
        if not largest >= TINY or not np.isfinite(largest):
            absmax[block] = _ZERO if largest < TINY else np.float32(np.inf)
            continue
        if columns > 0:
            at = start % columns
            for j in range(blocksize):
                weights[j] = diag[at]
                at = at + 1 if at + 1 < columns else 0
        shrink = _ONE / largest
        for j in range(blocksize):
            values[j] *= shrink
            weighted[j] = weights[j] * values[j]
        most, scale = -_ONE, _ONE
        for attempt in range(len(inverses) + refits):
            inverse = inverses[attempt] if attempt < len(inverses) else _ONE / scale
            if inverse < smallest:
                break
            dot, square = _explain(values, weighted, weights, inverse)
            if not square > _ZERO:
                continue
            explained = dot * (dot / square)
            if explained > most * CLEARLY_MORE:
                most, scale = explained, dot / square
            elif attempt >= len(inverses):
                break
        absmax[block] = scale * largest


@_compiled
def assign_nf4(bits, kind, blocksize, scales, keep_end, packed, first, last):  # type: ignore[no-untyped-def]
    """Codes of the blocks ``first:last`` under given ``scales`` fp32[blocks], of either sign, two in a byte of ``packed`` uint8[ceil(n/2)].

    With ``keep_end`` every block that is not all zeros holds an end of the levels, so that quantizing the decoded values anew finds the same codes:
    where none is nearest the extreme value takes one, or, if it does not reach half of it, the block becomes zeros; so it does under a scale below 0.
    """
    values = np.zeros(blocksize, np.float32)
    codes = np.empty(blocksize, np.uint8)
    for block in range(first, last):
        start = block * blocksize
        count = min(blocksize, len(bits) - start)
        if count < blocksize:
            values[:] = _ZERO
        _widen(bits[start : start + count], kind, values)
        scale = scales[block]
        inverse = _ZERO if abs(scale) < TINY or (keep_end and scale < _ZERO) else _ONE / scale
        for j in range(blocksize):
            v = values[j] * inverse
            code = np.uint8(v > _T0) + np.uint8(v > _T1) + np.uint8(v > _T2) + np.uint8(v > _T3) + np.uint8(v > _T4)
            code += np.uint8(v > _T5) + np.uint8(v > _T6) + np.uint8(v > _T7) + np.uint8(v > _T8) + np.uint8(v > _T9)
            code += np.uint8(v > _T10) + np.uint8(v > _T11) + np.uint8(v > _T12) + np.uint8(v > _T13) + np.uint8(v > _T14)
            codes[j] = code
        if keep_end and _largest(values, FP32) * inverse <= SMALLEST_INVERSE and codes.max() < 15 and codes.min() > 0:
            extreme = np.argmax(np.abs(values))
            reached = values[extreme] * inverse
            if abs(reached) < _HALF:
                codes[:] = np.uint8(7)
            else:
                codes[extreme] = np.uint8(15) if reached > _ZERO else np.uint8(0)
        out = packed[start >> 1 : (start + count + 1) >> 1]
        for j in range(len(out)):
            out[j] = np.uint8((codes[2 * j] << np.uint8(4)) | codes[2 * j + 1])
