"""From raw timings to the figures one may claim.

A quantile is given only where the samples can bound it: with 95 % confidence the largest of n samples lies
above the p-quantile when 1 - p**n >= 0.95, so p95 needs 59 and p99 needs 299. The interval of the median is
made of order statistics of *whole processes' medians*, because samples of one process depend on each other; it
assumes no distribution and does not exist below six processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Timing:
    """Figures of one quantity in seconds, from ``n`` samples of ``n_runs`` processes. What is ``None`` has its reason in ``unknown`` under the same name."""

    n: int
    n_runs: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    ci95_p50_s: tuple[float, float] | None
    unknown: dict[str, str] = field(default_factory=dict)


def samples_needed(quantile: float) -> int:
    """The fewest samples whose maximum bounds ``quantile`` from above with 95 % confidence."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(quantile) - 1e-9)


def summarise(processes: Sequence[Sequence[float]]) -> Timing:
    """``processes`` holds the samples of each process in seconds; one without samples does not count. Quantiles are of all samples together."""
    filled = [list(samples) for samples in processes if samples]
    pooled = sorted(sample for samples in filled for sample in samples)
    n = len(pooled)
    if n == 0:
        reason = "nothing was measured"
        return Timing(0, 0, None, None, None, None, dict.fromkeys(("p50_s", "p95_s", "p99_s", "ci95_p50_s"), reason))
    unknown = {}
    tails: dict[str, float | None] = {}
    for name, quantile in (("p95_s", 0.95), ("p99_s", 0.99)):
        needed = samples_needed(quantile)
        tails[name] = nearest_rank(pooled, quantile) if n >= needed else None
        if n < needed:
            unknown[name] = f"{n} samples, {needed} needed"
    interval = median_interval([median(samples) for samples in filled])
    if interval is None:
        unknown["ci95_p50_s"] = f"{len(filled)} process{'es' * (len(filled) > 1)}, 6 needed"
    return Timing(n, len(filled), median(pooled), tails["p95_s"], tails["p99_s"], interval, unknown)


def nearest_rank(ordered: Sequence[float], quantile: float) -> float:
    """The smallest sample with at least ``quantile`` of all samples at or below it."""
    return ordered[max(math.ceil(quantile * len(ordered)) - 1, 0)]


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The k-th smallest and largest value that hold the true median with at least 95 % confidence, if any do."""
    ordered = sorted(values)
    n = len(ordered)
    below = 0.0
    best = None
    for k in range(1, n // 2 + 1):
        below += math.comb(n, k - 1) / 2**n  # P(fewer than k of n values lie below the median)
        if 2 * below > 1 - CONFIDENCE:
            break
        best = (ordered[k - 1], ordered[n - k])
    return best
