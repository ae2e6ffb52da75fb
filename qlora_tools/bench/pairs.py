"""Latencies of two settings beside each other, and of two benchmarks.

Absolute times on a shared machine are worth little; the ratio of two that were measured one after the other, in the same round, is worth more. So
settings are paired by round: of each round the medians are divided, and the figure is the median of these ratios. Its interval resamples whole
rounds. Below :data:`FEWEST_ROUNDS` rounds there is none and nobody is called faster: simulated A/A runs (normal, outlying and two-peaked noise with a
drift that rounds share) were told apart by chance in 25 % of cases from 3 rounds, 12 % from 4, 5 to 6 % from 5 and 2 to 6 % beyond.

Axes: S resamples, W rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from qlora_tools.bench.record import Attempt, BenchRecord, Case, Row
from qlora_tools.bench.rows import counted
from qlora_tools.errors import IncompatibleError
from qlora_tools.resampling import bounds, drawn

FEWEST_ROUNDS = 5
_RUNS: Mapping[str, Callable[[Attempt], Sequence[float]]] = {
    "prefill": lambda attempt: attempt.prefill_s,
    "decode": lambda attempt: [step for run in attempt.decode_s for step in run],
}
METRICS = tuple(_RUNS)


@dataclass(frozen=True)
class TimeRatio:
    """``setting``'s time over that of the first setting at one case: in this record, in another, and how far the two are apart, as a share."""

    setting: str
    case: Case
    metric: str
    one: float
    other: float

    @property
    def difference(self) -> float:
        """0.05 where one is 5 % above the other; the same whichever comes first."""
        return math.exp(abs(math.log(self.one / self.other))) - 1


@dataclass(frozen=True)
class Agreement:
    """All ratios that two records share, the furthest apart first; ``missing``: what only one of them has, as ``setting, case, metric``."""

    ratios: tuple[TimeRatio, ...]
    missing: tuple[str, ...]

    @property
    def largest(self) -> float | None:
        """The largest difference, ``None`` where no ratio is shared."""
        return self.ratios[0].difference if self.ratios else None


def latency_comparisons(rows: Sequence[Row], first: str) -> list[dict[str, Any]]:
    """Every other setting (``a``) against the setting ``first`` (``b``), case by case, as plain JSON.

    ``effect`` is the time of a over that of b; ``verdict`` says who is faster: ``a``, ``b`` or ``tie`` (the interval holds 1, or there is none and
    ``reason`` says why).
    """
    return [
        {"a": setting, "b": first, "metric": metric, "case": [case.batch, case.prompt_tokens, case.new_tokens], **compare(ratios_W)}
        for setting, case, metric, ratios_W in _beside_first(rows, first)
    ]


def compare(ratios_W: Sequence[float]) -> dict[str, Any]:
    """``effect``, ``ci95``, ``n_pairs``, ``verdict`` of a's time over b's in each round."""
    effect, n = median(ratios_W), len(ratios_W)
    if n < FEWEST_ROUNDS:
        return {"effect": effect, "ci95": None, "n_pairs": n, "verdict": "tie", "reason": f"a verdict takes {FEWEST_ROUNDS} rounds, there are {n}"}
    low, high = bounds(np.median(np.asarray(ratios_W)[drawn(n)], axis=1), n)
    return {"effect": effect, "ci95": [low, high], "n_pairs": n, "verdict": "tie" if low <= 1 <= high else "a" if high < 1 else "b"}


def round_ratios(a: Sequence[Attempt], b: Sequence[Attempt], metric: str) -> list[float]:
    """a's median over b's in every round that both went through."""
    times_a, times_b = round_medians(a, metric), round_medians(b, metric)
    return [times_a[number] / times_b[number] for number in sorted(times_a.keys() & times_b.keys()) if times_b[number] > 0 < times_a[number]]


def agreement(one: BenchRecord, other: BenchRecord) -> Agreement:
    """How well two runs of the same benchmark agree in every ratio of a setting's time to the first setting's.

    Raises:
        IncompatibleError: another first setting, or not one case in common.
    """
    first = one.settings[0].id
    if other.settings[0].id != first:
        raise IncompatibleError(
            f"ratios are to the first setting: `{first}` in one record, `{other.settings[0].id}` in the other", hint="name the settings in the same order"
        )
    if not set(one.workload.cases) & set(other.workload.cases):
        raise IncompatibleError("the two records have no case in common", hint="measure the same --prompt, --new and --batch")
    left, right = _ratios(one, first), _ratios(other, first)
    shared = [TimeRatio(*key, left[key], right[key]) for key in left if key in right]
    missing = [
        f"{setting}, {case.name}, {metric}"
        for setting, case, metric in [*left, *right]
        if ((setting, case, metric) in left) != ((setting, case, metric) in right)
    ]
    return Agreement(tuple(sorted(shared, key=lambda ratio: -ratio.difference)), tuple(missing))


def _ratios(record: BenchRecord, first: str) -> dict[tuple[str, Case, str], float]:
    return {(setting, case, metric): median(ratios_W) for setting, case, metric, ratios_W in _beside_first(record.rows, first)}


def _beside_first(rows: Sequence[Row], first: str) -> Iterator[tuple[str, Case, str, list[float]]]:
    """(setting, case, metric, its ratios to the first setting) wherever there are both; one that failed has no round to be paired by."""
    base: Mapping[Case, Row] = {row.case: row for row in rows if row.setting == first}
    for row in rows:
        for metric in METRICS if row.setting != first and row.case in base else ():
            ratios_W = round_ratios(row.attempts, base[row.case].attempts, metric)
            if ratios_W:
                yield row.setting, row.case, metric, ratios_W


def round_medians(attempts: Sequence[Attempt], metric: str) -> dict[int, float]:
    """Round -> the median of its samples, in seconds, of the attempts that count."""
    samples = {attempt.round: _RUNS[metric](attempt) for attempt in counted(attempts)}
    return {number: median(found) for number, found in samples.items() if found}
