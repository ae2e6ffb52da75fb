"""How sure a figure is: bootstrap over windows, paired between settings.

Tokens of one window depend on each other, so whole windows are resampled. All settings are resampled with
the *same* indices (they follow from the number of windows and a fixed seed), which removes the text's own
difficulty from every comparison. A statistic here is a ratio of sums over windows, so a resample is only a
vector of counts, and ten thousand of them are one matrix product.

How they are drawn and where an interval ends is ``resampling.py``'s. Below :data:`FEWEST_WINDOWS` windows no interval is given.

Axes: S resamples, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_tools.errors import IncompatibleError
from qlora_tools.quality.divergence import Divergence, WindowSums
from qlora_tools.quality.perplexity import bounded_exp
from qlora_tools.resampling import F64, bounds, resample_counts

FEWEST_WINDOWS = 8
_MOST_BLOCKS = 512


@dataclass(frozen=True)
class Interval:
    """``value`` with its confidence bounds; bounds are ``None`` where too few windows were scored."""

    value: float
    low: float | None
    high: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """``a`` against ``b`` on ``metric``: ratio a/b (kl, ppl) or difference a-b (top1) and who is better, if anyone.

    ``verdict``: ``"a"``, ``"b"``, ``"tie"`` (the interval holds no-difference) or ``"unknown"`` (no interval).
    """

    a: str
    b: str
    metric: str
    effect: Interval
    verdict: str
    n_pairs: int


def mean_interval(sums_W: Sequence[float], tokens_W: Sequence[int]) -> Interval:
    """Mean per token of a quantity given as sums per window."""
    value = math.fsum(sums_W) / sum(tokens_W)
    return _interval(value, _resampled(sums_W, tokens_W))


def perplexity_interval(nll_W: Sequence[float], tokens_W: Sequence[int]) -> Interval:
    """exp of the mean negative log-likelihood."""
    return _mapped(mean_interval(nll_W, tokens_W), bounded_exp)


def perplexity_ratio(nll_a_W: Sequence[float], nll_b_W: Sequence[float], tokens_W: Sequence[int]) -> Interval:
    """ppl(a) / ppl(b), paired: the mean is taken of the windows' differences."""
    return _mapped(mean_interval([a - b for a, b in zip(nll_a_W, nll_b_W, strict=True)], tokens_W), bounded_exp)


def ratio_interval(a_W: Sequence[float], b_W: Sequence[float]) -> Interval:
    """sum(a) / sum(b) over the same resampled windows. 0/0 is 1: both are perfect."""
    total_a, total_b = math.fsum(a_W), math.fsum(b_W)
    if total_a == total_b == 0:
        return Interval(1.0, 1.0, 1.0)
    if total_b == 0:
        return Interval(math.inf, None, None)
    return _interval(total_a / total_b, _resampled(a_W, b_W))


def retention_interval(base_W: Sequence[float], tuned_W: Sequence[float], x_W: Sequence[float]) -> Interval:
    """Kept share of a fine-tune's gain from per-window negative log-likelihoods of base, tuned and candidate."""
    gained = [base - x for base, x in zip(base_W, x_W, strict=True)]
    possible = [base - tuned for base, tuned in zip(base_W, tuned_W, strict=True)]
    return ratio_interval(gained, possible)


def compare(name_a: str, a: Divergence, name_b: str, b: Divergence, metric: str = "kl") -> Comparison:
    """Which of two candidates, judged on the same windows, is better by ``kl``, ``ppl`` or ``top1``.

    Raises:
        IncompatibleError: the windows differ.
    """
    x, y = a.windows, b.windows
    if x.tokens != y.tokens:
        raise IncompatibleError(f"{name_a} and {name_b} were not judged on the same windows", hint="judge both in one run")
    effect, neutral = _effect(x, y, metric)
    return Comparison(name_a, name_b, metric, effect, verdict_of(effect, neutral, less_is_better=metric != "top1"), len(x.tokens))


def verdict_of(effect: Interval, neutral: float, *, less_is_better: bool) -> str:
    """Who is better by ``effect`` of ``a`` against ``b``, which is ``neutral`` where they are alike; see :class:`Comparison`."""
    if effect.low is None or effect.high is None:
        return "unknown"
    if effect.low <= neutral <= effect.high:
        return "tie"
    return "a" if (effect.high < neutral) == less_is_better else "b"


def _effect(x: WindowSums, y: WindowSums, metric: str) -> tuple[Interval, float]:
    if metric == "kl":
        return ratio_interval(x.kl, y.kl), 1.0
    if metric == "ppl":
        return perplexity_ratio(x.nll_candidate, y.nll_candidate, x.tokens), 1.0
    if metric == "top1":
        return mean_interval([p - q for p, q in zip(x.agrees, y.agrees, strict=True)], x.tokens), 0.0
    raise ValueError(f"metric {metric!r}: expected kl, ppl or top1")


def _resampled(numerators_W: Sequence[float], denominators_W: Sequence[float]) -> tuple[F64, int]:
    """The statistic in every resample f64[S] and the number of blocks drawn; empty where there are too few windows."""
    if len(numerators_W) < FEWEST_WINDOWS:
        return np.empty(0), 0
    counts_SW = resample_counts(len(_blocked(numerators_W)))
    # einsum, not @: its loops do not depend on the number of BLAS threads
    numerators_S, denominators_S = (np.einsum("sw,w->s", counts_SW, _blocked(x)) for x in (numerators_W, denominators_W))
    with np.errstate(divide="ignore", invalid="ignore"):
        return numerators_S / denominators_S, counts_SW.shape[1]


def _blocked(values_W: Sequence[float]) -> F64:
    """Neighbouring windows added up until at most ``_MOST_BLOCKS`` are left: longer blocks, bounded memory."""
    values = np.asarray(values_W, dtype=np.float64)
    per_block = -(-len(values) // _MOST_BLOCKS)
    return np.add.reduceat(values, np.arange(0, len(values), per_block))


def _interval(value: float, resampled: tuple[F64, int]) -> Interval:
    ratio_S, n_blocks = resampled
    if n_blocks == 0 or not np.isfinite(ratio_S).all():
        return Interval(value, None, None)
    return Interval(value, *bounds(ratio_S, n_blocks))


def _mapped(interval: Interval, function: Callable[[float], float]) -> Interval:
    """The interval of an increasing function of the quantity."""
    low, high = interval.low, interval.high
    return Interval(function(interval.value), None if low is None else function(low), None if high is None else function(high))
