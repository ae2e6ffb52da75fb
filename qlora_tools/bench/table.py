"""The record as a table: plain cells with the number behind each, for the terminal, Markdown and the page alike.

A cell that has no figure says why in ``note`` and shows ``n/a``; a setting that failed shows its status and reason.
What a table cannot hold is said beside it (:func:`remarks`). Drawing with colours is the command line's, cells are ``cells.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qlora_tools.bench.cells import (
    NOT_KNOWN,
    Cell,
    Column,
    bytes_cell,
    cosine_cell,
    device_cell,
    energy_cell,
    failed_cell,
    figure_cell,
    is_forward,
    number_cell,
    peak_cell,
    quantile_cell,
    reads_length,
    reason_of,
    speedup_cell,
    time_cell,
)
from qlora_tools.bench.pairs import METRICS as LATENCIES
from qlora_tools.bench.pick import QUALITY
from qlora_tools.bench.record import BenchRecord, Case, Row
from qlora_tools.names import shortened

_METRIC_NAMES = {"kl": "KL", "ppl": "perplexity", "top1": "top-1 agreement", "error": "the error of the outputs", "accuracy": "accuracy"}
_DEVICE_COLUMNS = (
    ("arena_peak_bytes", "VRAM arena"),
    ("context_bytes", "context"),
    ("process_peak_bytes", "process"),
    ("as_deployed_peak_bytes", "deployed"),
    ("smallest_limit_bytes", "least limit"),
)


_ROW_NAMES = frozenset({"setting", "batch", "prompt_tokens", "new_tokens"})
_KINDS = {
    "sizes": frozenset({"file", "weights", "load"}),
    "memory": frozenset({"peak", *(field.removesuffix("_bytes") for field, _ in _DEVICE_COLUMNS)}),
    "quality": QUALITY,
}


@dataclass(frozen=True)
class Table:
    """``rows`` stand by case and, within one, in the record's order; ``sources`` are the records they came from."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    sources: tuple[Row, ...]

    def column(self, key: str) -> tuple[Cell, ...]:
        at = next(i for i, column in enumerate(self.columns) if column.key == key)
        return tuple(row[at] for row in self.rows)

    def parts(self, most_chars: int) -> list[Table]:
        """Tables of at most so many characters a line, for terminals: the names of the rows in each, and kinds of figures together where they fit.

        A column takes the longest of its texts and of the lines of its stacked heading, and three for the gap.
        """
        named = [i for i, column in enumerate(self.columns) if column.key in _ROW_NAMES]
        room = most_chars - sum(map(self._chars, named))
        kinds = [list(found) for _, found in groupby((i for i in range(len(self.columns)) if i not in named), key=lambda i: _kind(self.columns[i].key))]
        lines: list[list[int]] = [[]]
        for kind in kinds:
            for piece in [kind] if sum(map(self._chars, kind)) <= room else [[i] for i in kind]:
                if lines[-1] and sum(map(self._chars, [*lines[-1], *piece])) > room:
                    lines.append([])
                lines[-1] += piece
        return [self._only([*named, *line]) for line in lines]

    def _chars(self, at: int) -> int:
        texts = [*(row[at].text for row in self.rows), *self.columns[at].stacked.splitlines()]
        return max(map(len, texts)) + 3

    def _only(self, kept: Sequence[int]) -> Table:
        return Table(tuple(self.columns[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in self.rows), self.sources)


def _kind(key: str) -> str:
    return next((kind for kind, keys in _KINDS.items() if key in keys), "times")


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


def rows_by_case(record: BenchRecord) -> list[Row]:
    """The record's rows, case after case as the workload names them."""
    return [row for case in record.workload.cases for row in record.rows_at(case)]


def bench_table(record: BenchRecord) -> Table:
    """One line per setting and case. Columns that no setting fills are left out, and what is the same in all cases has none."""
    rows = rows_by_case(record)
    columns = [*_names(record), *_sizes(), *_times(record), *_memory(), *_quality(record)]
    made = [(column, [failed_cell(row, column.key) or cell(row) for row in rows]) for column, cell in columns]
    shown = [(column, cells) for column, cells in made if column.key == "setting" or any(cell.value is not None for cell in cells)]
    return Table(tuple(column for column, _ in shown), tuple(zip(*(cells for _, cells in shown), strict=True)), tuple(rows))


_Maker = tuple[Column, Callable[[Row], Cell]]


def _names(record: BenchRecord) -> list[_Maker]:
    def of_case(field: str) -> Callable[[Row], Cell]:
        return lambda row: Cell(f"{getattr(row.case, field):,}", getattr(row.case, field))

    varying = [(field, title) for field, title in (("batch", "Batch"), ("prompt_tokens", "Prompt"), ("new_tokens", "New")) if _varies(record, field)]
    named: list[_Maker] = [(Column("setting", "Setting"), lambda row: Cell(record.setting(row.setting).name, record.setting(row.setting).name))]
    return [*named, *((Column(field, title), of_case(field)) for field, title in varying)]


def _sizes() -> list[_Maker]:
    return [
        (Column("file", "File", "MB", "low"), lambda row: bytes_cell(row.file_bytes, row.unknown.get("file_bytes", ""))),
        (Column("weights", "Weights", "MB", "low"), _weights),
        (Column("load", "Load", "s", "low"), lambda row: time_cell(row.load, 1.0, 2)),
    ]


def _times(record: BenchRecord) -> list[_Maker]:
    length = "" if _varies(record, "prompt_tokens") or not reads_length(record) else f" {record.workload.cases[0].prompt_tokens}"
    columns: list[_Maker] = [
        (Column("prefill", f"Prefill{length}", "ms", "low"), lambda row: _no_decoder() if is_forward(row) else time_cell(row.prefill, 1e3, 2)),
        (Column("forward", f"Forward{length}", "ms", "low"), lambda row: time_cell(row.prefill, 1e3, 2) if is_forward(row) else Cell(NOT_KNOWN)),
        (Column("decode_p50", "Decode p50", "ms", "low"), lambda row: time_cell(row.decode, 1e3, 3, row.unknown.get("decode", ""))),
        (Column("decode_p95", "p95", "ms", "low"), lambda row: quantile_cell(row.decode, "p95_s")),
        (Column("decode_p99", "p99", "ms", "low"), lambda row: quantile_cell(row.decode, "p99_s")),
        (
            Column("tokens", "Decode", "tok/s", "high"),
            lambda row: number_cell(row.decode_tokens_per_s, "{:,.0f}", row.unknown.get("decode_tokens_per_s", "")),
        ),
        (Column("energy", "Energy", "J/token", "low"), energy_cell),
    ]
    compared = {str(found.get("metric")) for found in record.comparisons if found.get("ci95")} & set(LATENCIES)
    words = {"prefill": "Forward" if all(is_forward(row) for row in record.rows if row.status == "ok") else "Prefill", "decode": "Decode"}
    return [
        *columns,
        *((Column(f"{metric}_vs", f"{words[metric]} vs first"), _against(record, metric)) for metric in ("prefill", "decode") if metric in compared),
    ]


def _against(record: BenchRecord, metric: str) -> Callable[[Row], Cell]:
    return lambda row: speedup_cell(record, row, metric)


def _no_decoder() -> Cell:
    return Cell(NOT_KNOWN, None, "this model looks once")


def _weights(row: Row) -> Cell:
    told = row.weights_bytes if row.weights_bytes is not None or row.device_memory is None else row.device_memory.weights_bytes
    return bytes_cell(told, row.unknown.get("weights_bytes", "") if told is None else "")


def _memory() -> list[_Maker]:
    def on_device(field: str) -> Callable[[Row], Cell]:
        return lambda row: device_cell(row, field)

    peak: _Maker = (Column("peak", "Peak RSS", "MB", "low"), peak_cell)
    return [peak, *((Column(field.removesuffix("_bytes"), title, "MB", "low"), on_device(field)) for field, title in _DEVICE_COLUMNS)]


def _quality(record: BenchRecord) -> list[_Maker]:
    return [
        (Column("ppl", "Perplexity", "", "low"), lambda row: figure_cell(record, row, "ppl_candidate", "{:.2f}")),
        (Column("kl", "KL", "nats", "low"), lambda row: figure_cell(record, row, "kl_mean", "kl")),
        (Column("top1", "Top-1", "%", "high"), lambda row: figure_cell(record, row, "top1_agreement", "{:.1f}", 100.0)),
        (Column("accuracy", "Accuracy", "%", "high"), lambda row: figure_cell(record, row, "accuracy", "{:.1f}", 100.0)),
        (Column("error", "Output error", "%", "low"), lambda row: figure_cell(record, row, "relative_error", "{:.3g}", 100.0)),
        (Column("cosine", "Cosine", "", "high"), lambda row: cosine_cell(record, row)),
        (Column("retention", "Gain kept", "%", "high"), lambda row: figure_cell(record, row, "retention", "{:.1f}", 100.0)),
    ]


def to_markdown(record: BenchRecord) -> str:
    """A Markdown table, and below it what it cannot hold."""
    table = bench_table(record)
    lines = [_line([column.heading for column in table.columns]), _line(["---"] + ["---:"] * (len(table.columns) - 1))]
    lines += [_line([cell.text for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {remark}" for remark in [*remarks(record), method(record)]) + "\n"


def remarks(record: BenchRecord) -> list[str]:
    """All that must be said beside the table: what failed, what does not add up, what is not known, what must not be ranked, and the notes."""
    return [*failures(record), *broken_identities(record), *unknowns(record), *undecided(record), *ties(record), *record.notes]


def failures(record: BenchRecord) -> list[str]:
    """One sentence per setting that has no figures, or only some; its cases together where they failed alike."""
    found: dict[str, list[Case]] = {}
    for row in rows_by_case(record):
        if row.status != "ok" or row.reason:
            what = f"{row.status}: {row.reason}" if row.status != "ok" else f"{row.reason}"
            found.setdefault(f"{record.setting(row.setting).name}: {what}", []).append(row.case)
    said = [sentence + _at(record, cases) for sentence, cases in found.items()]
    ran = {row.setting for row in record.rows if row.status == "ok"}
    said += [f"{record.setting(q.setting).name}: quality {q.status}: {q.reason}" for q in record.quality if q.status != "ok" and q.setting in ran]
    return said


def broken_identities(record: BenchRecord) -> list[str]:
    """Figures of memory that contradict each other, by name: they are shown, and not to be trusted."""
    said = []
    for row in rows_by_case(record):
        for found in (*(row.memory.identities if row.memory else ()), *(row.device_memory.identities if row.device_memory else ())):
            if found.held is False:
                sides = f"{(found.left_bytes or 0) / 1e6:,.1f} MB against {(found.right_bytes or 0) / 1e6:,.1f} MB"
                margin = "" if found.within is None else f", more than {found.within:.0%} apart"
                said.append(f"{record.setting(row.setting).name}{_at(record, [row.case])}: does not hold: {found.name} ({sides}{margin})")
    return said


def unknowns(record: BenchRecord) -> list[str]:
    """Why figures of the device are missing where a reader expects them: one sentence per reason."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    has_limits = any(row.device_memory is not None and row.device_memory.smallest_limit_bytes is not None for row in record.rows)
    asked = [(field, title) for field, title in _DEVICE_COLUMNS if field != "smallest_limit_bytes" or has_limits]  # looked for on request alone
    for row in rows_by_case(record):
        if row.status != "ok" or (row.device_memory is None and "device_memory" not in row.unknown):
            continue
        fields = [(title, reason_of(row, field)) for field, title in asked if getattr(row.device_memory, field, None) is None]
        fields += [("energy", row.unknown["energy_j"])] if row.energy_j is None and "energy_j" in row.unknown else []
        for title, reason in fields:
            if reason:
                titles, names = found.setdefault(reason, ([], []))
                titles += [title] * (title not in titles)
                name = record.setting(row.setting).name
                names += [name] * (name not in names)
    return [f"{', '.join(titles)} not known for {shortened(names, 4)}: {reason}" for reason, (titles, names) in found.items()]


def undecided(record: BenchRecord) -> list[str]:
    """Why speeds have no verdict, where they have none: a sentence per reason."""
    reasons = dict.fromkeys(str(found["reason"]) for found in record.comparisons if found["metric"] in LATENCIES and found.get("reason"))
    return [f"who is faster is not sure: {reason}" for reason in reasons]


def ties(record: BenchRecord) -> list[str]:
    """Pairs that must not be ranked in quality; ties in latency stand in the table."""
    pairs = [(found["a"], found["b"], found["metric"]) for found in record.comparisons if found.get("verdict") == "tie" and found["metric"] not in LATENCIES]
    names = {setting.id: setting.name for setting in record.settings}
    return [f"{names.get(a, a)} and {names.get(b, b)} tie in {_METRIC_NAMES.get(metric, metric)}" for a, b, metric in pairs]


def method(record: BenchRecord) -> str:
    """How the numbers were made, in one sentence or two."""
    work = record.workload
    once = all(is_forward(row) for row in record.rows if row.status == "ok")
    by_length = reads_length(record)
    shapes = [f"{case.batch} x {case.prompt_tokens}" if once and by_length else f"{case.batch}" if once else case.name for case in work.cases]
    said = (
        f"Latency: {', '.join(shapes)} ({('inputs x length' if by_length else 'inputs') if once else 'sequences x tokens in + out'}), {record.threads} thread{'s' * (record.threads > 1)}, "
        f"{work.repeats} runs in each of {record.rounds} fresh processes per setting{' and case' * (len(work.cases) > 1)}, interleaved."
    )
    judged = next((quality.figures for quality in record.quality if quality.status == "ok"), None)
    if judged:
        reference = next(quality.reference for quality in record.quality if quality.status == "ok")
        said += f" Quality against {_name(record, reference)}: {_measure(judged)}"
    return said


def _measure(figures: Mapping[str, Any]) -> str:
    """What quality was measured on: tokens of a text, or inputs of a model that looks once."""
    how, text = figures["method"], figures["corpus"]
    source = f"{text['name']}" + (f" (sha256 {text['sha256'][:12]})" if "sha256" in text else "")
    name = f", {how['name']}" if "name" in how else ""
    if "n_tokens" in how:
        return f"{how['n_tokens']:,} tokens of {source}{name}; intervals are 95 %, from a paired bootstrap over windows."
    return f"{source}{name}; intervals are 95 %, from a paired bootstrap over {how['n_inputs']:,} inputs."


def _varies(record: BenchRecord, field: str) -> bool:
    return len({getattr(case, field) for case in record.workload.cases}) > 1


def _at(record: BenchRecord, cases: Sequence[Case]) -> str:
    """`` at <case>``, where that does not go without saying."""
    return "" if len(set(cases)) == len(record.workload.cases) else f" at {', '.join(case.name for case in cases)}"


def _name(record: BenchRecord, setting: str) -> str:
    return next((found.name for found in record.settings if found.id == setting), setting)


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"
