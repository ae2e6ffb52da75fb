"""The bootstrap that quality and latency share: which blocks are drawn, and how far from the middle an interval ends.

The draws follow from the number of blocks and a fixed seed alone, so that everything judged on the same blocks is resampled alike. The interval is
the percentile interval, widened for few blocks (the "expanded" percentile interval, Hesterberg 2015, arXiv:1411.5279, section 5.3).

Axes: S resamples, W blocks (windows of a text, rounds of a benchmark).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
_SEED = 20_170_905
F64 = NDArray[np.float64]


@lru_cache(maxsize=8)
def resample_counts(n_blocks: int, resamples: int = RESAMPLES) -> F64:
    """How often each block is drawn in each resample: f64[S, W], the same for every caller."""
    flat = (drawn(n_blocks, resamples) + np.arange(resamples)[:, None] * n_blocks).reshape(-1)
    counts_SW = np.bincount(flat, minlength=resamples * n_blocks).reshape(resamples, n_blocks).astype(np.float64)
    counts_SW.setflags(write=False)
    return counts_SW


def drawn(n_blocks: int, resamples: int = RESAMPLES) -> NDArray[np.int64]:
    """The blocks of each resample: i64[S, W]."""
    return np.random.Generator(np.random.PCG64(_SEED)).integers(0, n_blocks, (resamples, n_blocks))


def bounds(resampled_S: F64, n_blocks: int) -> tuple[float, float]:
    """The interval of a statistic from its values in every resample."""
    tail = _tail(n_blocks)
    low, high = np.quantile(resampled_S, [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _tail(n_blocks: int) -> float:
    """The share cut off on each side: a normal tail at Student's t, stretched by sqrt(n / (n - 1)) (Hesterberg 2015, 5.3)."""
    from scipy.stats import norm, t

    return float(norm.cdf(math.sqrt(n_blocks / (n_blocks - 1)) * t.ppf((1 - CONFIDENCE) / 2, n_blocks - 1)))
