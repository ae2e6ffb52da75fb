"""Perplexity = exp(mean negative log-likelihood) over the scored tokens of fixed windows.

Streamed: one window's logits at a time, sums in float64. The per-window sums are kept, because intervals
resample windows. Not comparable with word-level perplexities or with tools that score half a window: the
:class:`~qlora_tools.quality.corpus.Method` says what was done.

Axes: T positions, V vocabulary, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_tools.errors import UsageError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.corpus import Ids, Window
from qlora_tools.quality.logits import F64, LogitsOf, as_rows, log_softmax, slices


@dataclass(frozen=True)
class Perplexity:
    """``value`` with what it was summed from: per window the negative log-likelihood in nats and the tokens scored."""

    value: float
    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens)


def negative_log_likelihoods(logits_TV: Any, targets_T: Ids, what: str = "the model") -> F64:
    """-ln p(target) f64[T] of each row's target."""
    rows_TV = as_rows(logits_TV, len(targets_T), what)
    nll_T = np.empty(len(targets_T))
    for part in slices(*rows_TV.shape):
        log_p_TV = log_softmax(rows_TV[part], what)
        nll_T[part] = -np.take_along_axis(log_p_TV, targets_T[part, None], axis=1)[:, 0]
    return nll_T


def scored_rows(logits_of: LogitsOf, window: Window, what: str) -> Any:
    """Run one window and keep the rows that predict its scored tokens: [n_scored, V]."""
    return as_rows(logits_of(window.ids), len(window.ids), what)[window.first_scored - 1 : -1]


def perplexity(logits_of: LogitsOf, windows: Sequence[Window], *, progress: Progress = SILENT, title: str = "perplexity") -> Perplexity:
    """Perplexity of one model over ``windows``.

    Raises:
        UsageError: no windows.
        NonFiniteError: the model gave NaN.
    """
    if not windows:
        raise UsageError("no windows to score")
    sums: list[float] = []
    with progress.task(title, len(windows), "windows") as task:
        for number, window in enumerate(windows):
            what = f"the model (window {number})"
            sums.append(float(negative_log_likelihoods(scored_rows(logits_of, window, what), window.targets, what).sum()))
            task.advance()
    tokens = tuple(window.n_scored for window in windows)
    return Perplexity(exp_mean(sums, tokens), tuple(sums), tokens)


def exp_mean(nll: Sequence[float], tokens: Sequence[int]) -> float:
    """exp(total / count) with an exactly rounded total."""
    return bounded_exp(math.fsum(nll) / sum(tokens))


def bounded_exp(value: float) -> float:
    """exp, infinite where a float64 would overflow."""
    return math.exp(value) if value < 700 else math.inf
