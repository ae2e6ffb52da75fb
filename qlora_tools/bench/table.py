"""The record as a table: plain cells with the number behind each, for the terminal, Markdown and the page alike.

A cell that has no figure says why in ``note`` and shows ``n/a``; a setting that failed shows its status and reason.
Drawing with colours is the command line's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_tools.bench.record import BenchRecord, Row
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


@dataclass(frozen=True)
class Table:
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def column(self, key: str) -> tuple[Cell, ...]:
        at = next(i for i, column in enumerate(self.columns) if column.key == key)
        return tuple(row[at] for row in self.rows)


def leaders(column: Column, cells: Sequence[Cell]) -> list[int]:
    """The best cell of a column and all that cannot be told from it: their intervals overlap its own. Best first.

    None at all where the column has no better end, or where the best figure has no interval to go by.
    """
    found = [(cell.value, i) for i, cell in enumerate(cells) if isinstance(cell.value, (int, float))]
    if not column.better or not found:
        return []
    found.sort(key=lambda item: item[0] if column.better == "low" else -item[0])
    best = cells[found[0][1]].interval
    if best is None:
        return []

    def overlaps(cell: Cell) -> bool:
        return cell.interval is None or (cell.interval[0] <= best[1] and best[0] <= cell.interval[1])

    return [i for _, i in found if overlaps(cells[i])]


def bench_table(record: BenchRecord) -> Table:
    """One line per setting and case, in the record's order. Columns that no setting fills are left out."""
    work = record.workload.cases[0]
    columns: list[tuple[Column, Callable[[Row], Cell]]] = [
        (Column("setting", "Setting"), lambda row: Cell(record.setting(row.setting).name, record.setting(row.setting).name)),
        (Column("file", "File", "MB", "low"), lambda row: _bytes(row.file_bytes, row.unknown.get("file_bytes", ""))),
        (Column("weights", "Weights", "MB", "low"), lambda row: _bytes(row.weights_bytes, row.unknown.get("weights_bytes", ""))),
        (Column("load", "Load", "s", "low"), lambda row: _time(row.load, 1.0, 2)),
        (Column("prefill", f"Prefill {work.prompt_tokens}", "ms", "low"), lambda row: _time(row.prefill, 1e3, 2)),
        (Column("decode_p50", "Decode p50", "ms", "low"), lambda row: _time(row.decode, 1e3, 3)),
        (Column("decode_p95", "p95", "ms", "low"), lambda row: _quantile(row.decode, "p95_s")),
        (Column("decode_p99", "p99", "ms", "low"), lambda row: _quantile(row.decode, "p99_s")),
        (Column("tokens", "Decode", "tok/s", "high"), lambda row: _number(row.decode_tokens_per_s, "{:,.0f}", row.unknown.get("decode_tokens_per_s", ""))),
        (Column("peak", "Peak RSS", "MB", "low"), _peak),
        (Column("ppl", "Perplexity", "", "low"), lambda row: _figure(record, row, "ppl_candidate", "{:.2f}")),
        (Column("kl", "KL", "nats", "low"), lambda row: _figure(record, row, "kl_mean", "kl")),
        (Column("top1", "Top-1", "%", "high"), lambda row: _figure(record, row, "top1_agreement", "{:.1f}", 100.0)),
        (Column("retention", "Gain kept", "%", "high"), lambda row: _figure(record, row, "retention", "{:.1f}", 100.0)),
    ]
    made = [(column, [_failed(row, column.key) or cell(row) for row in record.rows]) for column, cell in columns]
    shown = [(column, cells) for column, cells in made if column.key == "setting" or any(cell.value is not None for cell in cells)]
    return Table(tuple(column for column, _ in shown), tuple(zip(*(cells for _, cells in shown), strict=True)))


def to_markdown(record: BenchRecord) -> str:
    """A Markdown table, the failures in words, the method, and the comparisons that are ties."""
    table = bench_table(record)
    lines = [_line([column.heading for column in table.columns]), _line(["---"] + ["---:"] * (len(table.columns) - 1))]
    lines += [_line([cell.text for cell in row]) for row in table.rows]
    remarks = [*failures(record), *ties(record), *record.notes, method(record)]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {remark}" for remark in remarks if remark) + "\n"


def to_text(record: BenchRecord) -> str:
    """The same for a terminal without markup: right-aligned columns."""
    table = bench_table(record)
    grid = [[column.heading for column in table.columns], *[[cell.text for cell in row] for row in table.rows]]
    widths = [max(len(line[i]) for line in grid) for i in range(len(table.columns))]
    drawn = ["  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]).rstrip() for line in grid]
    remarks = [*failures(record), *ties(record), *record.notes, method(record)]
    return "\n".join([*drawn, "", *(remark for remark in remarks if remark)]) + "\n"


def failures(record: BenchRecord) -> list[str]:
    """One sentence per setting that has no figures, or only some."""
    said = [f"{record.setting(row.setting).name}: {row.status}: {row.reason}" for row in record.rows if row.status != "ok"]
    said += [f"{record.setting(row.setting).name}: {row.reason}" for row in record.rows if row.status == "ok" and row.reason]
    ran = {row.setting for row in record.rows if row.status == "ok"}
    said += [f"{record.setting(q.setting).name}: quality {q.status}: {q.reason}" for q in record.quality if q.status != "ok" and q.setting in ran]
    return said


def ties(record: BenchRecord) -> list[str]:
    """Pairs that must not be ranked."""
    pairs = [(found["a"], found["b"], found["metric"]) for found in record.comparisons if found.get("verdict") == "tie"]
    names = {setting.id: setting.name for setting in record.settings}
    return [f"{names.get(a, a)} and {names.get(b, b)} tie in {_METRIC_NAMES.get(metric, metric)}" for a, b, metric in pairs]


def method(record: BenchRecord) -> str:
    """How the numbers were made, in one sentence or two."""
    work = record.workload
    cases = ", ".join(case.name for case in work.cases)
    said = (
        f"Latency: {cases} (sequences x tokens in + out), {record.threads} thread{'s' * (record.threads > 1)}, "
        f"{work.repeats} runs in each of {record.rounds} fresh processes per setting, interleaved."
    )
    judged = next((quality.figures for quality in record.quality if quality.status == "ok"), None)
    if judged:
        how, text = judged["method"], judged["corpus"]
        reference = next(quality.reference for quality in record.quality if quality.status == "ok")
        said += (
            f" Quality against {_name(record, reference)}: {how['n_tokens']:,} tokens of {text['name']} (sha256 {text['sha256'][:12]}), {how['name']};"
            " intervals are 95 %, from a paired bootstrap over windows."
        )
    return said


_METRIC_NAMES = {"kl": "KL", "ppl": "perplexity", "top1": "top-1 agreement"}


def _name(record: BenchRecord, setting: str) -> str:
    return next((found.name for found in record.settings if found.id == setting), setting)


def _failed(row: Row, key: str) -> Cell | None:
    """The first figure column of a failed row tells its status; the others stay empty."""
    if row.status == "ok" or key in ("setting", "file"):
        return None
    return Cell(row.status if key == "load" else "", None, row.reason or "")


def _bytes(value: int | None, note: str) -> Cell:
    if value is None:
        return Cell(NOT_KNOWN, None, note)
    return Cell(f"{value / 1e6:,.1f}", value / 1e6, "; ".join(filter(None, (f"{value:,} bytes", note))), (value / 1e6, value / 1e6))


def _peak(row: Row) -> Cell:
    """The largest peak of the rounds; what it may be instead is the range over the rounds."""
    cell = _bytes(row.memory.peak_bytes if row.memory else None, _memory_note(row))
    phases = [[attempt.memory.get(phase, {}).get("peak_bytes") or 0 for phase in ("loaded", "steady")] for attempt in row.attempts if attempt.status == "ok"]
    peaks = [max(found) / 1e6 for found in phases if max(found)]
    return replace(cell, interval=(min(peaks), max(peaks))) if cell.value is not None and peaks else cell


def _number(value: float | None, form: str, note: str) -> Cell:
    return Cell(NOT_KNOWN, None, note) if value is None else Cell(form.format(value), value, note)


def _time(timing: Timing | None, scale: float, digits: int) -> Cell:
    if timing is None or timing.p50_s is None:
        return Cell(NOT_KNOWN, None, "" if timing is None else timing.unknown.get("p50_s", ""))
    if timing.ci95_p50_s is None:
        sure = timing.unknown.get("ci95_p50_s", "")
        sure = f"no interval: {sure}" if sure else ""
    else:
        sure = f"95 % interval {timing.ci95_p50_s[0] * scale:.{digits}f} to {timing.ci95_p50_s[1] * scale:.{digits}f}"
    bounds = (timing.ci95_p50_s[0] * scale, timing.ci95_p50_s[1] * scale) if timing.ci95_p50_s else None
    return Cell(f"{timing.p50_s * scale:.{digits}f}", timing.p50_s * scale, "; ".join(filter(None, (f"median of {timing.n}", sure))), bounds)


def _quantile(timing: Timing | None, name: str) -> Cell:
    value = getattr(timing, name, None)
    note = f"of {timing.n} samples" if timing is not None and value is not None else (timing.unknown.get(name, "") if timing is not None else "")
    return _number(None if value is None else value * 1e3, "{:.3f}", note)


def _memory_note(row: Row) -> str:
    if row.memory is None or row.memory.anon_bytes is None or row.memory.file_bytes is None:
        return row.unknown.get("memory", "")
    return f"then resident: {row.memory.anon_bytes / 1e6:,.1f} MB anonymous, {row.memory.file_bytes / 1e6:,.1f} MB file-backed"


def _figure(record: BenchRecord, row: Row, name: str, form: str, scale: float = 1.0) -> Cell:
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


def write_kl(value: float) -> str:
    """Four decimals, fewer digits below: a small divergence must not read as none."""
    return "0" if value == 0 else f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"
