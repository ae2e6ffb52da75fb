"""The loops of rounding with error feedback, compiled with numba: a block of columns one after the other, many rows at once.

Conventions are those of ``kernels``. The plain torch twins stand in ``gptq``. Arrays lie with columns first, so that what runs innermost are rows
beside each other; a block is copied into a compact buffer that stays in the first cache.

Axes: C columns of a block, T rows of a tile.
"""

from __future__ import annotations

import numpy as np

from qlora_tools.quant.kernels import ROUNDER, _compiled

LANES = 64  # rows carried at once: 128 columns of them are 32 kB


@_compiled
def _choose(wanted, scales, zeros, lanes, levels, bounds, lowest, highest, codes, values):  # type: ignore[no-untyped-def]
    """``codes`` uint8 and ``values`` fp32 of the grid nearest to ``wanted``, for the first ``lanes`` of each."""
    unit, code = np.empty(LANES, np.float32), np.zeros(LANES, np.float32)
    for t in range(lanes):
        unit[t] = wanted[t] / scales[t] if scales[t] != np.float32(0) else np.float32(0)
    if len(levels):
        for k in range(len(bounds)):
            bound = bounds[k]
            for t in range(lanes):
                code[t] += np.float32(unit[t] > bound)
        for t in range(lanes):
            values[t] = levels[np.int32(code[t])] * scales[t]
    else:
        for t in range(lanes):
            code[t] = min(max((unit[t] + zeros[t] + ROUNDER) - ROUNDER, lowest), highest)
            values[t] = (code[t] - zeros[t]) * scales[t]
    for t in range(lanes):
        codes[t] = np.uint8(np.int32(code[t]))


@_compiled
def sweep_columns(w_CT, scale_CT, zero_CT, codes_CT, errors_CT, wanted_CT, u_CC, levels, bounds, lowest, highest, first, last):  # type: ignore[no-untyped-def]
    """Rows ``first:last`` of a block of columns. ``levels`` empty: whole steps; ``wanted_CT`` comes with the feedback of earlier blocks."""
    columns = w_CT.shape[0]
    value = np.empty(LANES, np.float32)
    lines = np.zeros((columns, LANES), np.float32)  # a compact copy: rows of the block lie far apart
    for start in range(first, last, LANES):
        stop = min(start + LANES, last)
        lanes = stop - start
        for column in range(columns):
            lines[column, :lanes] = wanted_CT[column, start:stop]
        for column in range(columns):
            error = lines[column]
            scales, zeros = scale_CT[column, start:stop], zero_CT[column, start:stop]
            _choose(error, scales, zeros, lanes, levels, bounds, lowest, highest, codes_CT[column, start:stop], value)
            for t in range(lanes):
                error[t] = w_CT[column, start + t] - value[t]
            errors_CT[column, start:stop] = error[:lanes]
            for later in range(column + 1, columns):
                factor = u_CC[column, later]
                line = lines[later]
                for t in range(LANES):
                    line[t] += factor * error[t]


@_compiled
def descend_columns(w_CT, scale_CT, zero_CT, codes_CT, errors_CT, gradient_CT, r_CC, levels, bounds, lowest, highest, first, last):  # type: ignore[no-untyped-def]
    """Rows ``first:last`` of a block of columns, each moved to the best level given the others; ``gradient_CT`` = R times the errors of all columns."""
    columns = w_CT.shape[0]
    value, step = np.empty(LANES, np.float32), np.zeros(LANES, np.float32)
    lines = np.zeros((columns, LANES), np.float32)
    for start in range(first, last, LANES):
        stop = min(start + LANES, last)
        lanes = stop - start
        for column in range(columns):
            lines[column, :lanes] = gradient_CT[column, start:stop]
        for column in range(columns):
            wanted, error = lines[column], errors_CT[column, start:stop]
            inverse = np.float32(1) / r_CC[column, column]
            for t in range(lanes):
                wanted[t] = w_CT[column, start + t] - error[t] + wanted[t] * inverse
            scales, zeros = scale_CT[column, start:stop], zero_CT[column, start:stop]
            _choose(wanted, scales, zeros, lanes, levels, bounds, lowest, highest, codes_CT[column, start:stop], value)
            for t in range(lanes):
                left = w_CT[column, start + t] - value[t]
                step[t] = left - error[t]
                error[t] = left
            for later in range(column + 1, columns):
                factor = r_CC[column, later]
                line = lines[later]
                for t in range(LANES):
                    line[t] += factor * step[t]
