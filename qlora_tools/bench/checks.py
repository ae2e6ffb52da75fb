"""What drawing and comparing take for granted of a record that came from a file, beyond the kinds of its fields, which ``plain.py`` checks.

Every setting has a row at every case and nothing speaks of others; times are times; what stands in maps that are free in kind (readings of memory,
figures of quality, comparisons, the machine) is of the kind that is computed with. Left out: whether the figures are true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from qlora_tools.bench.record import Attempt, BenchRecord
from qlora_tools.manifest import misfit

#: Between these no ratio of two times overflows; 0 is what a clock says of nothing.
_LEAST_S, _MOST_S = 1e-12, 1e12
_MAYBE = (float, None)
_FIGURES = {
    **dict.fromkeys(("kl_mean", "ppl_candidate", "top1_agreement", "accuracy", "relative_error", "cosine_mean", "retention"), _MAYBE),
    "ci95": ({str: ([_MAYBE], None)}, None),
    "corpus": ({"name": (str, None), "sha256": (str, None)}, None),
    "method": ({"name": (str, None), "n_tokens": (int, None), "n_inputs": (int, None)}, None),
    "windows": ({str: [_MAYBE]}, None),  # null: a sum that was infinite
    "inputs": ({str: [_MAYBE]}, None),
}
_COMPARISON = {
    **dict.fromkeys(("a", "b", "metric"), str),
    **dict.fromkeys(("verdict", "reason"), (str, None)),
    "effect": _MAYBE,
    "ci95": ([_MAYBE], None),
    "case": ([int], None),
}
_PHASES = dict.fromkeys(("imported", "loaded", "steady"), ({str: (int, None)}, None))
_MACHINE = {"ram_bytes": _MAYBE, "gpu": ({"name": (str, None)}, None), "gpus": ([{"name": (str, None)}], None)}


def check_record(record: BenchRecord) -> None:
    """Refuse a record that cannot be drawn.

    Raises:
        ValueError: the first fault, with its place.
    """
    fault = next(chain(_of_rows(record), _of_names(record), _of_readings(record), _of_figures(record)), None)
    if fault is not None:
        raise ValueError(fault)


def _of_rows(record: BenchRecord) -> Iterator[str]:
    """A row of something unlisted, or none of something listed."""
    if not record.settings:
        yield "`settings` is empty"
    yield from (f"`settings` lists {name[:40]!r} twice" for name in _twice(setting.id for setting in record.settings))
    listed = dict.fromkeys((setting.id, case) for setting in record.settings for case in record.workload.cases)
    found = [(row.setting, row.case) for row in record.rows]
    for i, (setting, case) in enumerate(found):
        if (setting, case) not in listed:
            yield f"`rows[{i}]` is of {setting[:40]!r} at {case.name}, which `settings` and `workload.cases` do not list"
    yield from (f"`rows` holds {setting[:40]!r} at {case.name} twice" for setting, case in _twice(found))
    held = set(found)
    yield from (f"`rows` lacks {setting[:40]!r} at {case.name}" for setting, case in listed if (setting, case) not in held)


def _twice(items: Iterable[Any]) -> list[Any]:
    return [item for item, count in Counter(items).items() if count > 1]


def _of_names(record: BenchRecord) -> Iterator[str]:
    """Quality or a comparison of something unlisted. The reference of quality need not be among the settings."""
    settings = {setting.id for setting in record.settings}
    cases = [[case.batch, case.prompt_tokens, case.new_tokens] for case in record.workload.cases]
    for i, quality in enumerate(record.quality):
        if quality.setting not in settings:
            yield f"`quality[{i}].setting` is {quality.setting[:40]!r}, which `settings` does not list"
    for i, found in enumerate(record.comparisons):
        where = f"comparisons[{i}]"
        if fault := misfit(found, _COMPARISON, where) or _unpaired(found.get("ci95"), f"{where}.ci95"):
            yield fault
            continue
        yield from (f"`{where}.{side}` is {found[side][:40]!r}, which `settings` does not list" for side in "ab" if found[side] not in settings)
        if found.get("case") is not None and found["case"] not in cases:
            yield f"`{where}.case` is {found['case'][:4]}, which `workload.cases` does not list"


def _of_readings(record: BenchRecord) -> Iterator[str]:
    """The machine, and what its clocks and counters said."""
    if fault := misfit(record.machine, _MACHINE, "machine"):
        yield fault
    for i, row in enumerate(record.rows):
        for j, attempt in enumerate(row.attempts):
            where = f"rows[{i}].attempts[{j}]"
            if fault := misfit(attempt.memory, _PHASES, f"{where}.memory"):
                yield fault
                continue
            readings = (attempt.memory.get(phase) or {} for phase in _PHASES)
            yield from (f"`{where}.memory` holds {value} bytes" for reading in readings for value in reading.values() if value is not None and value < 0)
            yield from (f"`{where}` took {value} s" for value in _times(attempt) if value != 0 and not _LEAST_S < value < _MOST_S)


def _times(attempt: Attempt) -> Iterator[float]:
    yield from attempt.prefill_s
    yield from attempt.ttft_s
    yield from chain.from_iterable(attempt.decode_s)


def _of_figures(record: BenchRecord) -> Iterator[str]:
    """Figures of quality that are none, intervals without two ends, columns of windows or inputs that do not stand beside each other."""
    for i, quality in enumerate(record.quality):
        where, figures = f"quality[{i}].figures", quality.figures
        if fault := misfit(figures, _FIGURES, where):
            yield fault
            continue
        yield from filter(None, (_unpaired(bounds, f"{where}.ci95.{name}") for name, bounds in (figures.get("ci95") or {}).items()))
        for name in ("windows", "inputs"):
            columns: Mapping[str, Any] = figures.get(name) or {}
            if len({len(column) for column in columns.values()}) > 1:
                yield f"`{where}.{name}` has columns of different lengths"


def _unpaired(bounds: Any, where: str) -> str | None:
    return None if bounds is None or len(bounds) == 2 else f"`{where}` has {len(bounds)} values, expected 2"
