"""One HTML page from a record: table, drawings, method. Self-contained: style and script inside, nothing fetched.

The page is drawn from the record and nothing else, so the same record gives the same bytes. It reads on light and dark
screens, on paper and without a script (only sorting needs one).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from qlora_tools.bench.charts import decay_chart, energy_chart, memory_chart, pareto_chart, rank_chart, timing_chart
from qlora_tools.bench.pareto import decode_milliseconds, divergence_points, file_megabytes
from qlora_tools.bench.record import BenchRecord
from qlora_tools.bench.table import Cell, Column, Table, bench_table, failures, leaders, method, ties
from qlora_tools.names import shortened

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_QUALITY = frozenset({"ppl", "kl", "top1", "retention"})  # the reference wins these by definition


def bench_page(record: BenchRecord) -> str:
    """The whole page."""
    here = resources.files("qlora_tools.bench")
    style, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = [
        _head(record),
        _tiles(record),
        _remarks(record),
        "<h2>Settings</h2>",
        _table(bench_table(record), record),
        _charts(record),
        _layers(record),
        _origin(record),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(record.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _head(record: BenchRecord) -> str:
    cpu = record.machine.get("cpu") or "unknown processor"
    return f'<h1>{escape(record.title)}</h1>\n<p class="lead">{escape(record.created[:10])} · {escape(str(cpu))} · {record.threads} thread{"s" * (record.threads > 1)}</p>'


def _tiles(record: BenchRecord) -> str:
    """The first answers, each with the settings that cannot be told from the best; nothing where the samples do not decide."""
    table, references = bench_table(record), {quality.reference for quality in record.quality}
    questions = (
        ("file", "smallest file: {} MB"),
        ("decode_p50", "fastest decode: {} ms per token"),
        ("peak", "lowest peak memory: {} MB"),
        ("kl", "closest to the reference: KL {}"),
    )
    names, tiles = table.column("setting"), []
    for column, cells in zip(table.columns, zip(*table.rows, strict=True), strict=True):
        words = dict(questions).get(column.key)
        best = leaders(column, _rivals(column, cells, record, references))
        if words and best:
            tied = [names[i].text for i in best[1:]]
            said = words.format(cells[best[0]].text) + (f"; tied with {shortened(tied, 2)}" if tied else "")
            tiles.append(f'<div class="tile"><b>{escape(names[best[0]].text)}</b><span>{escape(said)}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if len(record.rows) > 1 and tiles else ""


def _rivals(column: Column, cells: Sequence[Cell], record: BenchRecord, references: set[str]) -> list[Cell]:
    """The cells that compete for best in a column: a reference does not compete in likeness to itself."""
    return [Cell("") if column.key in _QUALITY and row.setting in references else cell for cell, row in zip(cells, record.rows, strict=True)]


def _remarks(record: BenchRecord) -> str:
    items = [f'<li class="failure">{escape(text)}</li>' for text in failures(record)]
    items += [f"<li>{escape(text)}</li>" for text in (*ties(record), *record.notes)]
    return f'<ul class="notes">{"".join(items)}</ul>' if items else ""


def _table(table: Table, record: BenchRecord) -> str:
    heads = "".join(_heading(column) for column in table.columns)
    references = {quality.reference for quality in record.quality}
    marked = {
        column.key: _marked(column, _rivals(column, cells, record, references))
        for column, cells in zip(table.columns, zip(*table.rows, strict=True), strict=True)
    }
    lines = []
    for i, (cells, row) in enumerate(zip(table.rows, record.rows, strict=True)):
        is_reference = row.setting in references
        drawn = "".join(
            _cell(cell, i in marked[column.key], is_reference and column.key == "setting") for cell, column in zip(cells, table.columns, strict=True)
        )
        lines.append(f"<tr>{drawn}</tr>" if row.status == "ok" else f'<tr class="failed">{drawn}</tr>')
    return f'<div class="scroll"><table class="sortable">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody>\n</table></div>"


def _heading(column: Column) -> str:
    return f'<th scope="col"><button type="button">{escape(column.title)}</button><small>{escape(column.unit) or "&nbsp;"}</small></th>'


def _marked(column: Column, cells: Sequence[Cell]) -> set[int]:
    """The rows to mark: the best and its ties, unless that is everyone."""
    best = leaders(column, cells)
    return set(best) if len(best) < sum(cell.value is not None for cell in cells) else set()


def _cell(cell: Cell, is_best: bool, is_reference: bool) -> str:
    kind = ' class="best"' if is_best else ' class="none"' if cell.value is None else ""
    note = f' title="{escape(cell.note, quote=True)}"' if cell.note else ""
    value = "" if cell.value is None else f"{cell.value:.9g}" if isinstance(cell.value, (int, float)) else escape(cell.value, quote=True)
    return f'<td{kind}{note} data-value="{value}">{escape(cell.text)}{"<em>reference</em>" if is_reference else ""}</td>'


def _charts(record: BenchRecord) -> str:
    marks = '<i class="key frontier"></i>on the frontier <i class="key rest"></i>another setting is at least as good in both. Whiskers: 95 % interval.'
    split = '<i class="key a"></i>anonymous <i class="key b"></i>file-backed <i class="key peak"></i>peak of the process. Left of the dashed mark: the runtime itself, before the model was loaded.'
    sure = "Median; whisker: 95 % interval from whole runs, where there are six or more."
    work = record.workload.cases[0]
    drawn = [
        ("Size against divergence", marks, pareto_chart(divergence_points(record, file_megabytes), "file size (MB)")),
        ("Speed against divergence", marks, pareto_chart(divergence_points(record, decode_milliseconds), "decode, median per token (ms)")),
        ("Decode", sure, timing_chart(record, "decode", "milliseconds per token")),
        (f"Prefill of {work.prompt_tokens} tokens", sure, timing_chart(record, "prefill", "milliseconds")),
        ("Memory", split, memory_chart(record)),
        ("Load", "From the call to a model that is ready; import of the runtime not included.", timing_chart(record, "load", "milliseconds")),
    ]
    return _figures("Trade-offs", drawn)


def _layers(record: BenchRecord) -> str:
    drawn = [
        ("Energy kept per layer", "Percent of the squared norm of the change that the adapter holds; darker keeps more.", energy_chart(record.layers)),
        ("Rank per layer", "As chosen; darker is higher.", rank_chart(record.layers)),
        ("Decay of the singular values", "One line per layer; point at one for its name.", decay_chart(record.layers)),
    ]
    return _figures("Extracted layers", drawn)


def _figures(title: str, drawn: list[tuple[str, str, str | None]]) -> str:
    shown = [f"<figure><h3>{escape(name)}</h3><figcaption>{caption}</figcaption>{svg}</figure>" for name, caption, svg in drawn if svg]
    return f'<h2>{escape(title)}</h2>\n<div class="charts">\n' + "\n".join(shown) + "\n</div>" if shown else ""


def _origin(record: BenchRecord) -> str:
    machine = record.machine
    ram = machine.get("ram_bytes")
    facts = [
        ("Measured", record.created),
        ("Method", method(record)),
        ("Machine", f"{machine.get('cpu') or 'unknown'}, {machine.get('cores')} cores, {ram / 2**30:.0f} GiB" if ram else str(machine.get("cpu"))),
        ("System", f"{machine.get('system')} {machine.get('kernel')} {machine.get('architecture')}, Python {machine.get('python')}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))),
    ]
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts]
    if record.command:
        lines.append(f"<dt>Command</dt><dd><code>{escape(' '.join(record.command))}</code></dd>")
    lines += [f"<dt>{escape(setting.name)}</dt><dd><code>{escape(setting.export)}</code></dd>" for setting in record.settings if setting.export]
    return "<h2>How this was measured</h2>\n<dl>" + "\n".join(lines) + "</dl>"
