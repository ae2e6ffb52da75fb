"""``--pick "kl<0.01,vram<6GB;fastest"``: wishes in words, and the setting of a record that meets them best.

A wish is ``metric comparator number unit``; several are joined by commas and must all hold. What comes behind a semicolon says which of the settings
that meet them is taken. A figure that is not known never satisfies a wish. Where a setting was measured at several shapes of work, its worst figure counts.
The base that is measured beside its fine-tune, to show what that gained, is another model and no choice.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_tools.bench.record import UNTUNED, BenchRecord, Row, Setting
from qlora_tools.errors import UsageError
from qlora_tools.names import nearest

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "bytes": {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
    "seconds": {"s": 1, "ms": 1e-3, "us": 1e-6},
    "share": {"": 1, "%": 0.01},
    "rate": {"": 1, "tok/s": 1, "tokens/s": 1},
    "nats": {"": 1, "nats": 1},
    "number": {"": 1},
}
_EXAMPLES = {"bytes": "6GB", "seconds": "20ms", "share": "98%", "rate": "30", "nats": "0.01", "number": "12.5"}
_WISH = re.compile(r"\s*([A-Za-z0-9/_]+)\s*(<=|>=|<|>)\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z%/]*)\s*")


@dataclass(frozen=True)
class Metric:
    """Something to wish for. ``kind``: of units. ``read``: the figure of a row, ``None`` where it is not known. ``missing``: its name in a row's ``unknown``."""

    name: str
    kind: str
    read: Callable[[BenchRecord, Row], float | None]
    missing: str = ""
    higher_is_better: bool = False


def _quality(figure: str) -> Callable[[BenchRecord, Row], float | None]:
    def read(record: BenchRecord, row: Row) -> float | None:
        judged = record.quality_of(row.setting)
        return judged.figures.get(figure) if judged is not None and judged.status == "ok" else None

    return read


def _median(name: str) -> Callable[[BenchRecord, Row], float | None]:
    return lambda record, row: timing.p50_s if (timing := getattr(row, name)) is not None else None


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("kl", "nats", _quality("kl_mean")),
        Metric("ppl", "number", _quality("ppl_candidate")),
        Metric("top1", "share", _quality("top1_agreement"), higher_is_better=True),
        Metric("accuracy", "share", _quality("accuracy"), higher_is_better=True),
        Metric("cosine", "number", _quality("cosine_mean"), higher_is_better=True),
        Metric("error", "share", _quality("relative_error")),
        Metric("retention", "share", _quality("retention"), higher_is_better=True),
        Metric("file", "bytes", lambda record, row: row.file_bytes, "file_bytes"),
        Metric("weights", "bytes", lambda record, row: row.weights_bytes, "weights_bytes"),
        Metric("peak", "bytes", lambda record, row: row.memory.peak_bytes if row.memory else None, "memory"),
        Metric(
            "vram", "bytes", lambda record, row: row.device_memory.as_deployed_peak_bytes if row.device_memory else None, "device_memory.as_deployed_peak_bytes"
        ),
        Metric("load", "seconds", _median("load")),
        Metric("prefill", "seconds", _median("prefill")),
        Metric("decode", "seconds", _median("decode")),
        Metric("tok/s", "rate", lambda record, row: row.decode_tokens_per_s, "decode_tokens_per_s", higher_is_better=True),
    )
}
#: The metrics that come from judging, not from running.
QUALITY = frozenset({"kl", "ppl", "top1", "accuracy", "cosine", "error", "retention"})
#: What decides between settings that meet all wishes: the first figure, then the next where that ties or is not known.
OBJECTIVES: Mapping[str, tuple[str, ...]] = {
    "fastest": ("decode", "prefill", "file"),
    "smallest": ("vram", "file", "decode"),
    "closest": ("kl", "top1", "error", "decode"),
}


@dataclass(frozen=True)
class Wish:
    """``metric sign limit``; ``limit`` in the base unit (bytes, seconds, a share of 1), ``text`` as it was written."""

    metric: str
    sign: str
    limit: float
    text: str

    def holds(self, value: float | None) -> bool:
        """Whether ``value`` satisfies the wish; an unknown one does not."""
        return value is not None and _OPERATORS[self.sign](value, self.limit)

    def missed_by(self, value: float) -> float:
        """How far ``value`` is from the limit, as a share of the limit (of the value where the limit is 0)."""
        return abs(value - self.limit) / (abs(self.limit) or abs(value) or 1.0)


@dataclass(frozen=True)
class Wishes:
    wishes: tuple[Wish, ...]
    objective: str


@dataclass(frozen=True)
class Checked:
    """One wish held against one setting. ``reason``: why there is no ``value``. ``missed_by``: see :meth:`Wish.missed_by`."""

    wish: str
    value: float | None
    holds: bool
    missed_by: float | None
    reason: str | None


@dataclass(frozen=True)
class Candidate:
    setting: str
    name: str
    checked: tuple[Checked, ...]

    @property
    def meets_all(self) -> bool:
        return all(found.holds for found in self.checked)


@dataclass(frozen=True)
class Picked:
    """The choice. ``setting`` is ``None`` where nothing meets all wishes; ``remarks`` then say what is in the way. ``export``: the command that makes it."""

    asked: str
    objective: str
    setting: str | None
    name: str | None
    export: str | None
    remarks: tuple[str, ...]
    candidates: tuple[Candidate, ...]


def parse_wishes(text: str) -> Wishes:
    """``"kl<0.01,vram<6GB;smallest"``. Without an objective it is ``fastest``.

    Raises:
        UsageError: no wish, an unknown metric, unit or objective, or a number without the unit it needs.
    """
    listed, semicolon, objective = text.partition(";")
    objective = objective.strip().lower() if semicolon else "fastest"
    if objective not in OBJECTIVES:
        raise UsageError(f"--pick: `{objective}` is not an objective", hint=f"write one of {', '.join(OBJECTIVES)} behind the semicolon")
    wishes = tuple(_wish(part) for part in listed.split(",") if part.strip())
    if not wishes and not semicolon:
        raise UsageError("--pick: there is no wish", hint='write for example "kl<0.01,vram<6GB"')
    return Wishes(wishes, objective)


def _wish(text: str) -> Wish:
    match = _WISH.fullmatch(text)
    if match is None:
        raise UsageError(f"--pick: `{text.strip()}` is not a wish", hint="write metric, one of < <= > >=, and a number with its unit: vram<6GB")
    name, sign, number, unit = match[1].lower(), match[2], float(match[3]), match[4].lower()
    metric = METRICS.get(name)
    if metric is None:
        close = f"; did you mean {' or '.join(found)}" if (found := nearest(name, METRICS, 2)) else ""
        raise UsageError(f"--pick: `{name}` is not a metric{close}", hint=f"metrics: {', '.join(METRICS)}")
    units = _UNITS[metric.kind]
    if unit not in units:
        found_unit = f"`{match[4]}` is no unit of {name}" if unit else f"{name} needs a unit"
        raise UsageError(f"--pick: {found_unit}", hint=f"write {name}{sign}{_EXAMPLES[metric.kind]}; units: {', '.join(filter(None, units))}")
    limit = number * units[unit]
    if metric.kind == "share" and limit > 1:
        raise UsageError(f"--pick: {name} is a share, {number:g}{unit} is above all of it", hint=f"write {name}{sign}98% or {name}{sign}0.98")
    return Wish(name, sign, limit, f"{name}{sign}{match[3]}{match[4]}")


def figure_of(record: BenchRecord, setting: str, name: str) -> tuple[float | None, str | None]:
    """The worst figure of a setting over all its cases, or ``None`` and the reason."""
    metric, found = METRICS[name], []
    for row in (row for row in record.rows if row.setting == setting):
        value = metric.read(record, row) if row.status == "ok" else None
        if value is None:
            return None, _why(record, row, metric)
        found.append(value)
    if not found:
        return None, "it was not measured"
    return (min if metric.higher_is_better else max)(found), None


def _why(record: BenchRecord, row: Row, metric: Metric) -> str:
    if row.status != "ok":
        return f"it did not run: {row.reason}"
    if metric.name in QUALITY:
        judged = record.quality_of(row.setting)
        if judged is None:
            return "quality was not judged"
        return judged.reason or judged.unknown.get(metric.name) or ("the untuned model was not measured beside" if metric.name == "retention" else "not known")
    said = (
        next((reason for key, reason in row.unknown.items() if key == metric.missing or key.startswith(f"{metric.missing}.")), None) if metric.missing else None
    )
    return said or ("no accelerator was measured" if metric.name == "vram" else "it was not measured")


def pick(record: BenchRecord, text: str) -> Picked:
    """The setting of ``record`` that meets every wish in ``text`` and is best by its objective.

    Raises:
        UsageError: see :func:`parse_wishes`.
    """
    asked = parse_wishes(text)
    candidates = tuple(_candidate(record, setting.id, setting.name, asked.wishes) for setting in _choices(record))
    able = [item for item in candidates if item.meets_all and any(row.setting == item.setting and row.status == "ok" for row in record.rows)]
    if not able:
        return Picked(text, asked.objective, None, None, None, tuple(_in_the_way(asked.wishes, candidates)), candidates)
    best = min(able, key=lambda item: _rank(record, item.setting, asked.objective))
    others = [item.name for item in able if item is not best]
    by = next((name for name in OBJECTIVES[asked.objective] if figure_of(record, best.setting, name)[0] is not None), None)
    figure = f" ({by} {write_figure(by, figure_of(record, best.setting, by)[0])})" if by else ""
    remarks = [f"the {asked.objective} of {len(able)} settings that meet all wishes{figure}" if others else f"the only setting that meets all wishes{figure}"]
    return Picked(text, asked.objective, best.setting, best.name, record.setting(best.setting).export, tuple(remarks), candidates)


def _choices(record: BenchRecord) -> Sequence[Setting]:
    """All settings but the untuned base, unless nothing else was measured."""
    return [setting for setting in record.settings if setting.label != UNTUNED] or record.settings


def _candidate(record: BenchRecord, setting: str, name: str, wishes: tuple[Wish, ...]) -> Candidate:
    checked = []
    for wish in wishes:
        value, reason = figure_of(record, setting, wish.metric)
        holds = wish.holds(value)
        checked.append(Checked(wish.text, value, holds, None if holds or value is None else wish.missed_by(value), reason))
    return Candidate(setting, name, tuple(checked))


def _rank(record: BenchRecord, setting: str, objective: str) -> list[float]:
    """Smaller is better; what is not known comes last."""
    ranked = []
    for name in OBJECTIVES[objective]:
        value, _ = figure_of(record, setting, name)
        ranked.append(float("inf") if value is None else -value if METRICS[name].higher_is_better else value)
    return ranked


def _in_the_way(wishes: tuple[Wish, ...], candidates: tuple[Candidate, ...]) -> list[str]:
    """Which wish nobody meets and by how much; where each is met by somebody, who comes nearest to all of them."""
    if not wishes:
        return ["no setting ran"]
    said = []
    for at, wish in enumerate(wishes):
        found = [(item, item.checked[at]) for item in candidates]
        if any(checked.holds for _, checked in found):
            continue
        known = [(checked.missed_by, item, checked) for item, checked in found if checked.missed_by is not None]
        if not known:
            (reason, _), *_ = Counter(str(checked.reason) for _, checked in found).most_common(1)
            said.append(f"nobody meets {wish.text}: it is known of no setting ({reason})")
            continue
        _, item, checked = min(known, key=lambda one: one[0])
        said.append(f"nobody meets {wish.text}: {item.name} comes nearest with {_missed(wish, checked)}")
    if said:
        return said
    near = min(candidates, key=lambda item: (sum(not found.holds for found in item.checked), sum(map(_distance, item.checked))))
    misses = [
        f"{wish.text} with {_missed(wish, found)}" if found.value is not None else f"{wish.text} (not known: {found.reason})"
        for wish, found in zip(wishes, near.checked, strict=True)
        if not found.holds
    ]
    return [f"each wish is met by some setting, but all of them by none; {near.name} comes nearest and misses {' and '.join(misses)}"]


def _distance(checked: Checked) -> float:
    """How far a setting is from a wish; further than anything where that is not known."""
    if checked.holds:
        return 0.0
    return 1e9 if checked.missed_by is None else checked.missed_by


def _missed(wish: Wish, checked: Checked) -> str:
    assert checked.value is not None and checked.missed_by is not None
    return f"{write_figure(wish.metric, checked.value)}, off by {100 * checked.missed_by:.3g} %"


def write_figure(metric: str, value: float | None) -> str:
    """A figure in the unit that people use for it."""
    if value is None:
        return "n/a"
    kind = METRICS[metric].kind
    if kind == "bytes":
        scale, unit = next((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if value >= scale or scale == 1)
        return f"{value / scale:.4g} {unit}"
    if kind == "seconds":
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    return f"{100 * value:.4g} %" if kind == "share" else f"{value:.3g} tok/s" if kind == "rate" else f"{value:.4g}"
