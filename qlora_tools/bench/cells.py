"""Cells of the table: a figure as it is shown, the number behind it, and what must be said of it. Which columns there are is ``table.py``'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_tools.bench import forward
from qlora_tools.bench.record import BenchRecord, Row
from qlora_tools.bench.rows import counted, peak_bytes
from qlora_tools.bench.samples import Timing

NOT_KNOWN = "n/a"


@dataclass(frozen=True)
class Cell:
    """``text`` to show, ``value`` to sort by, ``note`` to explain (interval, reason, raw count). ``interval`` is what ``value`` may be instead."""

    text: str
    value: float | str | None = None
    note: str = ""
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Column:
    """``better`` is ``"low"``, ``"high"`` or ``""`` where neither is. ``key`` is stable, for tests and styles."""

    key: str
    title: str
    unit: str = ""
    better: str = ""

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def stacked(self) -> str:
        """The heading in two lines, for where room is short."""
        return f"{self.title}\n({self.unit})" if self.unit else self.title


def is_forward(row: Row) -> bool:
    """Whether the row times a model that looks once and writes nothing, as its engine says."""
    return any(forward.is_forward(attempt.info) for attempt in counted(row.attempts))


def reads_length(record: BenchRecord) -> bool:
    """Whether the prompt's length means anything to the models of a record: one of images reads what it reads."""
    return not all(attempt.info.get("prompt") == "ignored" for row in record.rows for attempt in counted(row.attempts)) or not any(map(is_forward, record.rows))


def failed_cell(row: Row, key: str) -> Cell | None:
    """The first figure column of a failed row tells its status; the others stay empty."""
    if row.status == "ok" or key in ("setting", "file", "batch", "prompt_tokens", "new_tokens"):
        return None
    return Cell(row.status if key == "load" else "", None, row.reason or "")


def bytes_cell(value: int | None, note: str = "") -> Cell:
    """Megabytes of an exact count."""
    if value is None:
        return Cell(NOT_KNOWN, None, note)
    return Cell(f"{value / 1e6:,.1f}", value / 1e6, "; ".join(filter(None, (f"{value:,} bytes", note))), (value / 1e6, value / 1e6))


def device_cell(row: Row, field: str) -> Cell:
    """A figure of the row's :class:`DeviceMemory`; without one, why."""
    value = None if row.device_memory is None else getattr(row.device_memory, field)
    note = reason_of(row, field) if value is None else _how(row, field)
    return bytes_cell(value, note)


def reason_of(row: Row, field: str) -> str:
    """Why a figure of the device's memory is not known: under its own name, its full name, or that of the whole."""
    names = (f"device_memory.{field}", field, "device_memory")
    return next((row.unknown[name] for name in names if name in row.unknown), "")


def _how(row: Row, field: str) -> str:
    memory = row.device_memory
    if memory is None or field not in ("process_peak_bytes", "as_deployed_peak_bytes"):
        return ""
    if memory.method == "bracket":
        left = "" if memory.residual_bytes is None else f", {memory.residual_bytes / 1e6:,.1f} MB of it not given back"
        return f"what the whole device lost meanwhile{left}"
    return "the driver's figure for the process" if memory.method == "process" else ""


def peak_cell(row: Row) -> Cell:
    """The largest peak of the rounds; what it may be instead is the range over the rounds."""
    cell = bytes_cell(row.memory.peak_bytes if row.memory else None, _memory_note(row))
    peaks = [peak / 1e6 for peak in map(peak_bytes, counted(row.attempts)) if peak]
    return replace(cell, interval=(min(peaks), max(peaks))) if cell.value is not None and peaks else cell


def number_cell(value: float | None, form: str, note: str) -> Cell:
    return Cell(NOT_KNOWN, None, note) if value is None else Cell(form.format(value), value, note)


def energy_cell(row: Row) -> Cell:
    return number_cell(row.energy_j, "{:.3g}", row.unknown.get("energy_j", "") if row.energy_j is None else "the whole device's, divided by the new tokens")


def time_cell(timing: Timing | None, scale: float, digits: int, note: str = "") -> Cell:
    """The median with its interval; ``note`` says why there is none."""
    if timing is None or timing.p50_s is None:
        return Cell(NOT_KNOWN, None, note or ("" if timing is None else timing.unknown.get("p50_s", "")))
    if timing.ci95_p50_s is None:
        sure = timing.unknown.get("ci95_p50_s", "")
        sure = f"no interval: {sure}" if sure else ""
    else:
        sure = f"95 % interval {timing.ci95_p50_s[0] * scale:.{digits}f} to {timing.ci95_p50_s[1] * scale:.{digits}f}"
    bounds = (timing.ci95_p50_s[0] * scale, timing.ci95_p50_s[1] * scale) if timing.ci95_p50_s else None
    return Cell(f"{timing.p50_s * scale:,.{digits}f}", timing.p50_s * scale, "; ".join(filter(None, (f"median of {timing.n}", sure))), bounds)


def quantile_cell(timing: Timing | None, name: str) -> Cell:
    value = getattr(timing, name, None)
    note = f"of {timing.n} samples" if timing is not None and value is not None else (timing.unknown.get(name, "") if timing is not None else "")
    return number_cell(None if value is None else value * 1e3, "{:,.3f}", note)


def _memory_note(row: Row) -> str:
    if row.memory is None or row.memory.anon_bytes is None or row.memory.file_bytes is None:
        return row.unknown.get("memory", "")
    return f"then resident: {row.memory.anon_bytes / 1e6:,.1f} MB anonymous, {row.memory.file_bytes / 1e6:,.1f} MB file-backed"


def cosine_cell(record: BenchRecord, row: Row) -> Cell:
    """Of models that look once; beside a language model's KL the cosine says nothing more, it hides changes of rank."""
    quality = record.quality_of(row.setting)
    return Cell(NOT_KNOWN) if quality is not None and "ppl_candidate" in quality.figures else figure_cell(record, row, "cosine_mean", "{:.5f}")


def figure_cell(record: BenchRecord, row: Row, name: str, form: str, scale: float = 1.0) -> Cell:
    """A figure of the setting's quality; the form ``kl`` keeps small divergences readable."""
    quality = record.quality_of(row.setting)
    if quality is None:
        return Cell(NOT_KNOWN, None, "quality was not asked for")
    if quality.status != "ok":
        return Cell(quality.status, None, quality.reason or "")
    value = quality.figures.get(name)
    if value is None:
        return Cell(NOT_KNOWN, None, quality.unknown.get(name, "not finite" if name in quality.figures else ""))
    written = write_kl if form == "kl" else form.format
    bounds: Mapping[str, Any] = quality.figures.get("ci95") or {}
    interval = bounds.get(name)
    note = f"95 % interval {written(interval[0] * scale)} to {written(interval[1] * scale)}" if interval else ""
    return Cell(written(value * scale), value * scale, note, (interval[0] * scale, interval[1] * scale) if interval else None)


def speedup_cell(record: BenchRecord, row: Row, metric: str) -> Cell:
    """How many times faster than the first setting at the same case, or that it cannot be told; from pairs of rounds."""
    first = record.settings[0]
    if row.setting == first.id:
        return Cell("", None, "the others are compared with this one")
    case = [row.case.batch, row.case.prompt_tokens, row.case.new_tokens]
    for found in record.comparisons:
        if found.get("metric") == metric and list(found.get("case") or ()) == case and {found["a"], found["b"]} == {first.id, row.setting}:
            return _speedup(found, first.id)
    return Cell(NOT_KNOWN, None, f"not compared with {first.name}")


def _speedup(found: Mapping[str, Any], first: str) -> Cell:
    """The record's ratio is a's time over b's."""
    effect, interval = found.get("effect"), found.get("ci95")
    if effect is None or not effect:
        return Cell(NOT_KNOWN, None, "one of the two was not measured")
    ratio, bounds = (
        (effect, interval) if found["a"] == first else (1 / effect, [1 / bound for bound in reversed(interval)] if interval and all(interval) else None)
    )
    shown = f"[{_times(bounds[0])}, {_times(bounds[1])}]" if bounds else ""
    note = f"{found.get('n_pairs')} pairs of rounds"
    if bounds is None:
        return Cell("not sure", ratio, f"x{_times(ratio)}; {found.get('reason') or note}")
    if found.get("verdict") == "tie":
        return Cell("tie", ratio, f"x{_times(ratio)} {shown}; {note}")
    if ratio >= 1:
        return Cell(f"x{_times(ratio)} faster {shown}", ratio, note)
    return Cell(f"x{_times(1 / ratio)} slower [{_times(1 / bounds[1])}, {_times(1 / bounds[0])}]", ratio, note)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def write_kl(value: float) -> str:
    """Four decimals, fewer digits below: a small divergence must not read as none."""
    return "0" if value == 0 else f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
