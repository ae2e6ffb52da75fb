"""The page's bars: times with intervals, memory split by what holds it. Record in, SVG text out.

Each returns ``None`` where the record has nothing to draw. Bars show the first case; how figures follow the case is
``charts_sweep.py``'s, cost against loss ``charts_pareto.py``'s, extracted layers ``charts_layers.py``'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tools.bench.record import BenchRecord, DeviceMemory, Memory
from qlora_tools.bench.samples import Timing
from qlora_tools.bench.svg import Scale, amount, bar, figure, label_room, line, linear_scale, shorten, text, ticks

WIDTH = 620.0
_BAR_HEIGHT, _BAR_STEP = 18.0, 32.0
_VALUE_ROOM = 70.0


def timed(record: BenchRecord, field: str) -> list[tuple[str, Timing]]:
    """(setting's name, a row's :class:`Timing`) of what has one at the first case."""
    rows = record.rows_at(record.workload.cases[0])
    return [(record.setting(row.setting).name, timing) for row in rows if (timing := getattr(row, field)) is not None and timing.p50_s is not None]


def resident(record: BenchRecord) -> list[tuple[str, Memory]]:
    """(setting's name, memory of its process) of what tells its peak at the first case."""
    rows = record.rows_at(record.workload.cases[0])
    return [(record.setting(row.setting).name, row.memory) for row in rows if row.memory is not None and row.memory.peak_bytes is not None]


def timing_chart(record: BenchRecord, field: str, unit_title: str) -> str | None:
    """Horizontal bars of a row's :class:`Timing` medians in milliseconds, with the interval of the median as a whisker."""
    found = timed(record, field)
    if not found:
        return None
    left = label_room([name for name, _ in found])
    x = linear_scale([1e3 * max(t.p50_s or 0.0, *(t.ci95_p50_s or (0.0,))) for _, t in found], left, WIDTH - _VALUE_ROOM)
    parts, bottom = _bar_frame(x, len(found), unit_title)
    for i, (name, timing) in enumerate(found):
        y = 10 + i * _BAR_STEP
        value = 1e3 * (timing.p50_s or 0.0)
        ends = [1e3 * bound for bound in timing.ci95_p50_s] if timing.ci95_p50_s else None
        sure = f", 95 % interval {ends[0]:.3g} to {ends[1]:.3g}" if ends else f", no interval: {timing.unknown.get('ci95_p50_s', '')}"
        parts += [_name(name, left, y), bar(left, y, x(value) - left, _BAR_HEIGHT, "fill-a", f"{name}: {value:.4g} ms{sure}")]
        if ends:
            middle = y + _BAR_HEIGHT / 2
            parts += [line(x(ends[0]), middle, x(ends[1]), middle, "whisker"), *(line(x(end), middle - 4, x(end), middle + 4, "whisker") for end in ends)]
        parts.append(text(max(x(value), x(ends[1]) if ends else 0.0) + 7, y + 13.5, f"{value:,.0f}" if value >= 100 else f"{value:.3g}", "value"))
    return figure(parts, WIDTH, bottom + 44, unit_title)


def memory_chart(record: BenchRecord) -> str | None:
    """What is resident after the runs, split, with the peak of the whole process as a tick."""
    found = resident(record)
    if not found:
        return None
    left = label_room([name for name, _ in found])
    x = linear_scale([(m.peak_bytes or 0) / 1e6 for _, m in found], left, WIDTH - _VALUE_ROOM)
    parts, bottom = _bar_frame(x, len(found), "resident after the runs, and peak (MB)")
    for i, (name, memory) in enumerate(found):
        y = 10 + i * _BAR_STEP
        parts.append(_name(name, left, y))
        split = [Piece("fill-a", "anonymous", memory.anon_bytes or 0), Piece("fill-b", "file-backed", memory.file_bytes or 0)]
        parts += _stack(name, split, x, y)
        peak = x((memory.peak_bytes or 0) / 1e6)
        parts += [line(peak, y - 4, peak, y + _BAR_HEIGHT + 4, "peak"), text(peak + 7, y + 13.5, f"{(memory.peak_bytes or 0) / 1e6:,.0f}", "value")]
        if memory.runtime_bytes is not None:
            base = x(memory.runtime_bytes / 1e6)
            parts.append(line(base, y + 2, base, y + _BAR_HEIGHT - 2, "mark"))
    return figure(parts, WIDTH, bottom + 44, "Memory")


@dataclass(frozen=True)
class Piece:
    """One part of a stacked bar: its style, what it is, and how much."""

    kind: str
    what: str
    amount_bytes: int


def device_pieces(memory: DeviceMemory) -> list[Piece]:
    """The device's memory as parts that add up to the largest figure known; a part whose end is not known is in the next one, and named there.

    Figures that contradict each other (the arena below its weights, say) give parts of 0 here; the table's remarks name them.
    """
    marks = [
        ("fill-a", "weights", memory.weights_bytes),
        ("fill-b", "rest of the arena", memory.arena_peak_bytes),
        ("fill-c", "context", None if memory.arena_peak_bytes is None or memory.context_bytes is None else memory.arena_peak_bytes + memory.context_bytes),
        ("fill-d", "rest of the process", memory.process_peak_bytes),
        ("fill-e", "more as deployed", memory.as_deployed_peak_bytes),
    ]
    pieces: list[Piece] = []
    waiting: list[str] = []
    reached = 0
    for kind, what, mark in marks:
        if mark is None:
            waiting.append(what)
        elif mark > reached:
            pieces.append(Piece(kind, " and ".join([*waiting, what]), mark - reached))
            reached, waiting = mark, []
    return pieces


def on_device(record: BenchRecord) -> list[tuple[str, DeviceMemory, list[Piece]]]:
    """(setting's name, its memory of the device, the pieces of its bar) of what has any at the first case."""
    rows = record.rows_at(record.workload.cases[0])
    known = [(record.setting(row.setting).name, row.device_memory) for row in rows if row.device_memory is not None]
    return [(name, memory, pieces) for name, memory in known if (pieces := device_pieces(memory))]


def device_chart(record: BenchRecord) -> str | None:
    """The device's memory per setting: weights, rest of the arena, context, rest of the process, and what the defaults take beyond.

    A tick stands at the least limit.
    """
    found = on_device(record)
    if not found:
        return None
    left = label_room([name for name, _, _ in found])
    totals = [max(sum(piece.amount_bytes for piece in pieces), memory.smallest_limit_bytes or 0) / 1e6 for _, memory, pieces in found]
    x = linear_scale(totals, left, WIDTH - _VALUE_ROOM)
    parts, bottom = _bar_frame(x, len(found), "memory of the device (MB)")
    for i, ((name, memory, pieces), total) in enumerate(zip(found, totals, strict=True)):
        y = 10 + i * _BAR_STEP
        parts += [_name(name, left, y), *_stack(name, pieces, x, y)]
        if memory.smallest_limit_bytes is not None:
            limit = x(memory.smallest_limit_bytes / 1e6)
            parts.append(line(limit, y - 4, limit, y + _BAR_HEIGHT + 4, "peak"))
        parts.append(text(x(total) + 7, y + 13.5, f"{total:,.0f}", "value"))
    return figure(parts, WIDTH, bottom + 44, "Memory of the device")


def _stack(name: str, pieces: list[Piece], x: Scale, y: float) -> list[str]:
    parts, start = [], 0
    for piece in pieces:
        if piece.amount_bytes > 0:
            low, high = x(start / 1e6), x((start + piece.amount_bytes) / 1e6)
            gap = 1.0 if start and high - low > 2 else 0.0
            parts.append(bar(low + gap, y, high - low - gap, _BAR_HEIGHT, piece.kind, f"{name}: {amount(piece.amount_bytes / 1e6)} MB {piece.what}"))
            start += piece.amount_bytes
    return parts


def _name(name: str, left: float, y: float) -> str:
    return text(left - 9, y + 13.5, shorten(name, left - 12), "label", "end")


def _bar_frame(x: Scale, count: int, title: str) -> tuple[list[str], float]:
    """Grid, ticks and title of a bar chart with ``count`` bars; also where the plot ends."""
    bottom = 10 + _BAR_STEP * count - (_BAR_STEP - _BAR_HEIGHT) + 8
    parts = [text((x.start + x.end) / 2, bottom + 38, title, "title", "middle")]
    for value, label in ticks(x):
        parts += [line(x(value), 2, x(value), bottom, "grid"), text(x(value), bottom + 18, label, "tick", "middle")]
    return parts, bottom
