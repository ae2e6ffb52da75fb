"""How time, speed and memory follow the batch and the length of the prompt: one line per setting. Record in, series or SVG text out.

A sweep needs two cases that differ in nothing else. Where several groups of cases do, the largest is drawn; the table has all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from qlora_tools.bench.cells import is_forward
from qlora_tools.bench.pareto import decode_milliseconds, deployed_megabytes, peak_megabytes, prefill_milliseconds
from qlora_tools.bench.record import BenchRecord, Case, Row
from qlora_tools.bench.svg import Scale, amount, figure, fine_log_scale, label_room, line, linear_scale, shorten, spread, text, ticks, vertical_title

_WIDTH, _LEFT, _TOP, _BOTTOM = 500.0, 62.0, 12.0, 250.0
_STYLES = 8  # of lines, in the page's style
_LOG_FROM = 3.0  # spans as wide as this or wider are drawn in powers

AXES = {"batch": "batch (sequences)", "prompt_tokens": "prompt (tokens)"}


@dataclass(frozen=True)
class Series:
    """One setting's figures along an axis; ``style`` is its number in the record, so that it looks alike in all drawings."""

    setting: str
    style: int
    at: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Sweep:
    """One drawing: ``metric`` (its title and unit) over ``axis``, with all that did not vary in ``fixed``."""

    key: str
    title: str
    unit: str
    axis: str
    fixed: str
    series: tuple[Series, ...]

    @property
    def is_time(self) -> bool:
        """Times and speeds multiply, so powers suit them; bytes add up and are drawn from 0."""
        return self.unit != "MB"


def swept(record: BenchRecord, axis: str) -> list[Case]:
    """The largest group of cases that differ in ``axis`` alone, in its order; empty where there is none of two or more."""
    groups: dict[tuple[int, ...], list[Case]] = {}
    for case in record.workload.cases:
        rest = tuple(getattr(case, field) for field in ("prompt_tokens", "new_tokens", "batch") if field != axis)
        groups.setdefault(rest, []).append(case)
    largest = max(groups.values(), key=len)
    return sorted(largest, key=lambda case: int(getattr(case, axis))) if len(largest) > 1 else []


def sweeps(record: BenchRecord) -> list[Sweep]:
    """All drawings that the record has two points of a line for."""
    drawn = []
    first = "forward" if all(is_forward(row) for row in record.rows if row.status == "ok") else "prefill"
    for axis in AXES:
        cases = swept(record, axis)
        metrics: list[tuple[str, str, str, Callable[[Row], float | None]]] = [
            ("prefill", f"{first.capitalize()}, median", "ms", prefill_milliseconds),
            ("prefill-speed", f"Tokens through {first}", "tokens/s", lambda row: row.prefill_tokens_per_s),
            ("decode", "Decode step, median", "ms", decode_milliseconds),
            ("decode-speed", "Tokens written", "tokens/s", lambda row: row.decode_tokens_per_s),
            ("memory", "Peak RSS", "MB", peak_megabytes),
            ("device-memory", "VRAM as deployed", "MB", deployed_megabytes),
        ]
        for key, title, unit, read in metrics if cases else ():
            lines = _lines(record, cases, axis, read)
            if any(len(found.at) > 1 for found in lines):
                drawn.append(Sweep(f"{key}-by-{axis.split('_')[0]}", title, unit, axis, _fixed(cases[0], axis), tuple(lines)))
    return drawn


def _lines(record: BenchRecord, cases: Sequence[Case], axis: str, read: Callable[[Row], float | None]) -> list[Series]:
    lines = []
    for style, setting in enumerate(record.settings):
        rows = {row.case: row for row in record.rows if row.setting == setting.id and row.status == "ok"}
        at = tuple((float(getattr(case, axis)), value) for case in cases if case in rows and (value := read(rows[case])) is not None and value > 0)
        if at:
            lines.append(Series(setting.name, style, at))
    return lines


def _fixed(case: Case, axis: str) -> str:
    named = {"batch": f"batch {case.batch}", "prompt_tokens": f"prompt of {case.prompt_tokens:,}", "new_tokens": f"{case.new_tokens:,} new"}
    return ", ".join(said for field, said in named.items() if field != axis)


def is_log(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _LOG_FROM


def sweep_chart(sweep: Sweep) -> str:
    """Lines with marks, each named at its right end."""
    right = _WIDTH - label_room([found.setting for found in sweep.series], most=176.0)
    places = sorted({x for found in sweep.series for x, _ in found.at})
    values = [y for found in sweep.series for _, y in found.at]
    x = Scale(places[0], places[-1], _LEFT + 8, right - 8, is_log=is_log(places))
    y = fine_log_scale(values, _BOTTOM, _TOP) if sweep.is_time and is_log(values) else linear_scale(values, _BOTTOM, _TOP)
    parts = []
    for value, label in ticks(y):
        parts += [line(_LEFT, y(value), right, y(value), "grid"), text(_LEFT - 8, y(value) + 4, label, "tick", "end")]
    for value in thinned(places, x):
        parts += [line(x(value), _TOP, x(value), _BOTTOM, "grid"), text(x(value), _BOTTOM + 19, amount(value), "tick", "middle")]
    parts += [text((_LEFT + right) / 2, _BOTTOM + 40, AXES[sweep.axis], "title", "middle"), vertical_title(sweep.unit, (_TOP + _BOTTOM) / 2, 13.0)]
    heights = spread([y(found.at[-1][1]) for found in sweep.series], 15.0, _TOP + 4, _BOTTOM)
    for found, height in zip(sweep.series, heights, strict=True):
        parts.append(_drawn(found, sweep, x, y, right, height))
    return figure(parts, _WIDTH, _BOTTOM + 50, f"{sweep.title} ({sweep.unit}) by {AXES[sweep.axis]}")


def thinned(places: Sequence[float], x: Scale, room: float = 40.0) -> list[float]:
    """The places with room for a label each: first and last, and between them those far enough from the ones before."""
    kept = [places[0]]
    for place in places[1:-1]:
        if x(place) - x(kept[-1]) >= room and x(places[-1]) - x(place) >= room:
            kept.append(place)
    return [*kept, *places[-1:]] if len(places) > 1 else kept


def _drawn(found: Series, sweep: Sweep, x: Scale, y: Scale, right: float, height: float) -> str:
    kind = f"line s{found.style % _STYLES}{' again' if found.style >= _STYLES else ''}"
    corners = [(x(place), y(value)) for place, value in found.at]
    parts = [line(*a, *b, kind) for a, b in pairwise(corners)]
    for (place, value), (px, py) in zip(found.at, corners, strict=True):
        tip = f"{found.setting}: {amount(value)} {sweep.unit} at {AXES[sweep.axis].split(' ')[0]} {amount(place)}"
        parts.append(f'<circle cx="{px:.2f}" cy="{py:.2f}" r="4" class="{kind}"><title>{escape(tip)}</title></circle>')
    end = corners[-1]
    parts.append(line(end[0] + 6, end[1], right + 2, height, "lead"))
    parts.append(text(right + 5, height + 4, shorten(found.setting, _WIDTH - right - 5), f"label {kind}"))
    return f'<g data-setting="{escape(found.setting, quote=True)}">{"".join(parts)}</g>'
