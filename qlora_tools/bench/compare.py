"""A benchmark against an older one of the same settings: what got better, worse, or cannot be told apart.

Every figure becomes a ratio new / old, smaller being better. Times and the host's memory have one value per round on either side, so the ratio is one of
geometric means and its interval Welch's (95 %, on logarithms); that interval knows how rounds scatter, not how machines differ from day to day, which
is what the margin is for. ``better`` and ``worse`` need both: a ratio beyond the margin, and an interval that leaves out 1. What was sampled and has no
interval, from one round for instance, is ``unknown``. Files and the memory of a device are not samples, and are judged by their ratio alone.

KL, or the error of models that choose no classes, is compared on the same windows or inputs by a function that is passed in, since judging quality is
another room's work. What cannot be judged any more, became infinite, or differs where nothing did, has no ratio and is worse all the same.

Left out: absolute differences, and any judgement across different text, references, cases or settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean, variance
from typing import Any, Literal

from qlora_tools.bench.pairs import METRICS, round_medians
from qlora_tools.bench.pareto import ROUNDING_NATS
from qlora_tools.bench.record import BenchRecord, Case, Quality, Row, Setting
from qlora_tools.bench.rows import counted, peak_bytes
from qlora_tools.bench.samples import CONFIDENCE
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.names import shortened

MARGIN = 0.05
Verdict = Literal["better", "worse", "tie", "unknown"]
#: Ratio and interval of two settings' stored figures, judged on the same windows or inputs; ``None`` where they were not. It is a ratio of KL, or of
#: relative errors where either has no KL.
Paired = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[float, tuple[float, float] | None] | None]
#: Facts of a machine that change by themselves from minute to minute.
_VOLATILE = frozenset({"load_average", "others_running", "clocks"})
#: Options that say where a model lies, and not what it computes.
_PLACES = frozenset({"folder", "path"})


@dataclass(frozen=True)
class Change:
    """One figure of one setting, now and before. ``case`` is ``None`` for what does not depend on the work. ``old`` and ``new`` are in ``unit``
    (seconds, bytes, nats, a share of 1). ``reason``: why there is no ratio, or no interval."""

    setting: str
    name: str
    case: Case | None
    metric: str
    unit: str
    old: float | None
    new: float | None
    ratio: float | None
    ci95: tuple[float, float] | None
    verdict: Verdict
    reason: str | None = None


@dataclass(frozen=True)
class Difference:
    """Something about the two runs that is not the same, and that ratios may come from."""

    what: str
    old: str
    new: str


@dataclass(frozen=True)
class Compared:
    """All changes, in the new record's order. ``missing``: settings and cases that only the baseline has; ``added``: that only the new one has."""

    baseline: str
    margin: float
    changes: tuple[Change, ...]
    differences: tuple[Difference, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def worse(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict == "worse")


@dataclass(frozen=True)
class _Loss:
    """What quality is compared by: its name here and among the figures, and below what, in ``unit``, it is rounding. ``noun``: what 0 is none of."""

    metric: str
    figure: str
    unit: str
    noun: str
    rounding: float

    def of(self, judged: Quality | None) -> float | None:
        """The figure; ``None`` where it is not known, and where it is infinite, which a record cannot hold."""
        value = judged.figures.get(self.figure) if judged is not None and judged.status == "ok" else None
        return value if value is not None and math.isfinite(value) else None


#: The preferred one first.
_LOSSES = (
    _Loss("KL", "kl_mean", "nats", "divergence", ROUNDING_NATS),
    _Loss("error", "relative_error", "share", "error", math.sqrt(ROUNDING_NATS)),  # a divergence is of the order of the error's square
)
_Side = tuple[BenchRecord, Quality | None]
#: Ratio, its interval, the verdict, and why there is no ratio or no interval.
_Judgement = tuple[float | None, tuple[float, float] | None, Verdict, str | None]


def compare_records(new: BenchRecord, old: BenchRecord, *, margin: float = MARGIN, paired: Paired = lambda new, old: None, baseline: str = "") -> Compared:
    """Every figure that both records have. ``margin``: the share up to which a change is none. ``paired``: the ratio of two KLs or errors, with its interval.

    Raises:
        What :func:`check_comparable` raises.
    """
    partner, cases = check_comparable(new.settings, new.workload.cases, old, margin)
    changes: list[Change] = []
    for setting in (setting for setting in new.settings if setting.id in partner):
        before = partner[setting.id]
        for case in cases:
            changes += _at_case(setting, new.row(setting.id, case), old.row(before.id, case), margin)
        if any(row.status == "ok" for row in new.rows if row.setting == setting.id):
            changes += _files(setting, new.row(setting.id, cases[0]), old.row(before.id, cases[0]), margin)
            changes += _quality(setting, (new, new.quality_of(setting.id)), (old, old.quality_of(before.id)), margin, paired)
    matched = {found.id for found in partner.values()}
    return Compared(
        baseline=baseline or f"{old.title}, {old.created}",
        margin=margin,
        changes=tuple(changes),
        differences=tuple(_differences(new, old, partner)),
        missing=(*(s.name for s in old.settings if s.id not in matched), *(case.name for case in old.workload.cases if case not in cases)),
        added=(*(s.name for s in new.settings if s.id not in partner), *(case.name for case in new.workload.cases if case not in cases)),
    )


def check_comparable(settings: Sequence[Setting], work: Sequence[Case], old: BenchRecord, margin: float = MARGIN) -> tuple[dict[str, Setting], list[Case]]:
    """(id -> the same setting of ``old``, the cases of ``work`` that it has too). Both are known before anything is measured.

    Raises:
        UsageError: a negative margin. IncompatibleError: no setting, or no case, in common.
    """
    if not 0 <= margin < math.inf:
        raise UsageError(f"a margin of {margin:g} is out of range", hint="give a share such as 0.05, or 5%")
    partner = {setting.id: found for setting in settings if (found := _partner(setting, old)) is not None}
    cases = [case for case in work if case in old.workload.cases]
    if not partner or not cases:
        what = "setting" if not partner else "case"
        theirs = [found.id for found in old.settings] if not partner else [case.name for case in old.workload.cases]
        ours = [found.id for found in settings] if not partner else [case.name for case in work]
        raise IncompatibleError(
            f"the baseline has no {what} of this benchmark: it has {shortened(theirs)}, this one {shortened(ours)}",
            hint="measure the same settings with the same --prompt, --new and --batch",
        )
    return partner, cases


def _partner(setting: Setting, old: BenchRecord) -> Setting | None:
    """The same setting in the baseline: by its id, or else by what tables call it."""
    by_id = next((found for found in old.settings if found.id == setting.id), None)
    return by_id or next((found for found in old.settings if found.name == setting.name), None)


def _at_case(setting: Setting, new: Row, old: Row, margin: float) -> Iterator[Change]:
    """Times and memory of one setting at one case; a single entry where it no longer runs, or only now does."""
    if new.status != "ok" or old.status != "ok":
        if new.status == old.status:
            verdict: Verdict = "tie"
        else:
            verdict = "worse" if old.status == "ok" else "better" if new.status == "ok" else "unknown"
        yield Change(setting.id, setting.name, new.case, "runs", "", None, None, None, None, verdict, _turn(new, old))
        return
    for metric, unit in (*((metric, "s") for metric in METRICS), ("peak memory", "B")):
        now, before = _per_round(new, metric), _per_round(old, metric)
        if now or before:
            yield _change(setting, new.case, metric, unit, before, now, margin)
    before_on, now_on = (row.device_memory.as_deployed_peak_bytes if row.device_memory else None for row in (old, new))
    if before_on is not None or now_on is not None:
        yield _exact(setting, new.case, "device memory", "B", before_on, now_on, margin)


def _turn(new: Row | Quality, old: Row | Quality) -> str:
    """How something ended before and now, in words."""
    return f"was {old.status}, is {new.status}" + (f": {new.reason}" if new.reason and new.status != "ok" else "")


def _files(setting: Setting, new: Row, old: Row, margin: float) -> Iterator[Change]:
    if new.file_bytes is not None or old.file_bytes is not None:
        yield _exact(setting, None, "file", "B", old.file_bytes, new.file_bytes, margin)


def _quality(setting: Setting, new: _Side, old: _Side, margin: float, paired: Paired) -> Iterator[Change]:
    """The change of the first loss that both sides have, or else that one has; nothing where quality was judged on neither."""
    told = [judged.figures for _, judged in (new, old) if judged is not None and judged.status == "ok"]
    loss = next((item for some in (all, any) for item in _LOSSES if told and some(item.figure in figures for figures in told)), None)
    if loss is not None:
        found = _judgement(loss, new, old, margin, paired)
        yield Change(setting.id, setting.name, None, loss.metric, loss.unit, loss.of(old[1]), loss.of(new[1]), *found)


def _judgement(loss: _Loss, new_side: _Side, old_side: _Side, margin: float, paired: Paired) -> _Judgement:
    """Whether both were judged alike, and then :func:`_ratio_of`."""
    (record, new), (before, old) = new_side, old_side
    if new is None or old is None:
        return None, None, "unknown", f"not judged {'now' if new is None else 'in the baseline'}"
    if not _is_one_reference(record, new.reference, before, old.reference):
        return None, None, "unknown", "judged against another reference"
    if "unsupported" in (new.status, old.status):  # it was not tried, for want of the reference for instance
        return None, None, "unknown", _turn(new, old)
    if new.status != "ok" or old.status != "ok":
        return None, None, "worse" if old.status == "ok" else "better", _turn(new, old)
    if loss.figure not in new.figures or loss.figure not in old.figures:
        return None, None, "unknown", f"not judged {'in the baseline' if loss.figure in new.figures else 'now'}"
    texts = [(found.figures.get("corpus") or {}).get("sha256") for found in (new, old)]
    if texts[0] != texts[1]:
        return None, None, "unknown", "judged on another text"
    return _ratio_of(loss, new, old, margin, paired)


def _ratio_of(loss: _Loss, new: Quality, old: Quality, margin: float, paired: Paired) -> _Judgement:
    """The judgement of what both were asked to tell on one text, against one reference."""
    now, before, pieces = loss.of(new), loss.of(old), "inputs" if "inputs" in new.figures else "windows"
    elsewhere: _Judgement = (None, None, "unknown", f"not judged on the same {pieces}")
    if now is None or before is None:
        if new.figures.get("method") != old.figures.get("method"):  # infinite sums cannot be paired, so nothing else tells
            return elsewhere
        if now is None and before is None:
            return None, None, "tie", "both are infinite"
        return (None, None, "worse", "it is infinite now") if now is None else (None, None, "better", "it was infinite before")
    if max(now, before) < loss.rounding:
        return 1.0, None, "tie", "both are rounding noise"
    found = paired(new.figures, old.figures)
    if found is None:
        return elsewhere
    ratio, interval = found
    if before < loss.rounding and not math.isfinite(ratio):
        return None, None, "worse", f"there was no {loss.noun} before"
    if now < loss.rounding and ratio == 0:
        return None, None, "better", f"there is no {loss.noun} now"
    if interval is None or not math.isfinite(ratio):
        return ratio if math.isfinite(ratio) else None, None, "unknown", f"too few {pieces} for an interval"
    return ratio, interval, _verdict(ratio, interval, margin), None


def _is_one_reference(new: BenchRecord, now: str, old: BenchRecord, before: str) -> bool:
    """Whether the settings that judge are one: by id and, where both records list it, by what computes there."""
    found = [next((setting for setting in record.settings if setting.id == name), None) for record, name in ((new, now), (old, before))]
    known = [(one.engine, one.scheme, {name: value for name, value in one.options.items() if name not in _PLACES}) for one in found if one is not None]
    return now == before and (len(known) < 2 or known[0] == known[1])


def _per_round(row: Row, metric: str) -> list[float]:
    """One value of each round that has any; what is not one of :data:`METRICS` is the peak of memory."""
    values = round_medians(row.attempts, metric).values() if metric in METRICS else map(peak_bytes, counted(row.attempts))
    return [value for value in values if value]


def _change(setting: Setting, case: Case, metric: str, unit: str, old: Sequence[float], new: Sequence[float], margin: float) -> Change:
    before, now = (geometric_mean(values) if values else None for values in (old, new))
    if before is None or now is None:
        missing = f"not measured {'in the baseline' if before is None else 'now'}"
        return Change(setting.id, setting.name, case, metric, unit, before, now, None, None, "unknown", missing)
    ratio, interval = ratio_of_rounds(new, old)
    if interval is None:
        return Change(setting.id, setting.name, case, metric, unit, before, now, ratio, None, "unknown", "one round has no interval")
    return Change(setting.id, setting.name, case, metric, unit, before, now, ratio, interval, _verdict(ratio, interval, margin))


def _exact(setting: Setting, case: Case | None, metric: str, unit: str, old: int | None, new: int | None, margin: float) -> Change:
    if not old or not new:
        missing = f"not known {'in the baseline' if not old else 'now'}"
        return Change(setting.id, setting.name, case, metric, unit, old, new, None, None, "unknown", missing)
    ratio = new / old
    return Change(setting.id, setting.name, case, metric, unit, old, new, ratio, None, _verdict(ratio, (ratio, ratio), margin))


def ratio_of_rounds(new: Sequence[float], old: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Geometric mean of ``new`` over that of ``old``, and Welch's 95 % interval; none below two rounds on either side."""
    logs = [[math.log(value) for value in values] for values in (new, old)]
    middle = fmean(logs[0]) - fmean(logs[1])
    if min(len(new), len(old)) < 2:
        return math.exp(middle), None
    shares = [variance(values) / len(values) for values in logs]
    error = math.sqrt(sum(shares))
    if error == 0.0:
        return math.exp(middle), (math.exp(middle), math.exp(middle))
    from scipy.stats import t

    freedom = sum(shares) ** 2 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, logs, strict=True))
    half = error * float(t.ppf((1 + CONFIDENCE) / 2, freedom))
    return math.exp(middle), (math.exp(middle - half), math.exp(middle + half))


def _verdict(ratio: float, interval: tuple[float, float], margin: float) -> Verdict:
    low, high = interval
    if ratio > 1 + margin and low > 1:
        return "worse"
    return "better" if ratio < 1 / (1 + margin) and high < 1 else "tie"


def _differences(new: BenchRecord, old: BenchRecord, partner: Mapping[str, Setting]) -> Iterator[Difference]:
    sides: list[dict[str, Any]] = []
    for record in (old, new):
        work = record.workload
        facts = {f"machine: {name}": value for name, value in _flat(record.machine)} | {f"version: {name}": value for name, value in record.versions.items()}
        facts |= {"threads": record.threads, "rounds": record.rounds, "repeats": work.repeats, "warmup": work.warmup, "tokens": (work.seed, work.ids)}
        sides.append(facts)
    before, after = sides
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            written = ("others", "these") if name == "tokens" else (_written(before.get(name)), _written(after.get(name)))
            yield Difference(name, *written)
    judges = [", ".join(sorted({found.reference for found in record.quality})) for record in (old, new)]
    if all(judges) and judges[0] != judges[1]:
        yield Difference("reference of quality", *judges)
    for setting in new.settings:
        known = partner.get(setting.id)
        for field in ("engine", "options", "scheme", "threads") if known is not None else ():
            was, now = getattr(known, field), getattr(setting, field)
            if was != now:
                yield Difference(f"{setting.name}: {field}", _written(was), _written(now))


def _flat(facts: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if name in _VOLATILE:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{within}{name}.")
        else:
            yield f"{within}{name}", value


def _written(value: Any) -> str:
    return "not known" if value is None else ", ".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
