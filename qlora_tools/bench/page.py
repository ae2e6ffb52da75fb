"""One HTML page from a record: table, drawings, method. Self-contained: style, script and numbers inside, nothing fetched.

The page is drawn from the record and nothing else, so the same record gives the same bytes. It reads on light and dark
screens, on paper and without a script: sorting, choosing axes and hiding settings need one, and a script makes their controls.
What is in the drawings is ``charts*.py``'s, in the table ``table.py``'s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from qlora_tools.bench.cells import Cell, Column, is_forward, reads_length
from qlora_tools.bench.charts import device_chart, memory_chart, timing_chart
from qlora_tools.bench.charts_layers import decay_chart, energy_chart, rank_chart, retention_chart
from qlora_tools.bench.charts_pareto import FRAME, headline, pareto_chart
from qlora_tools.bench.charts_sweep import AXES, sweep_chart, sweeps
from qlora_tools.bench.pareto import plot_data, points, views
from qlora_tools.bench.pick import QUALITY
from qlora_tools.bench.record import BenchRecord
from qlora_tools.bench.table import Table, bench_table, broken_identities, failures, leaders, method, remarks
from qlora_tools.names import shortened

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_QUALITY = QUALITY - {"accuracy"}  # the reference wins these by definition
_MOST_ROWS = 20  # beyond, the table scrolls under its headings
_FRONTIER = '<i class="key frontier"></i>on the frontier <i class="key rest"></i>another setting is at least as good in both. Whiskers: 95 % interval.'
_SPLIT = (
    '<i class="key a"></i>anonymous <i class="key b"></i>file-backed <i class="key peak"></i>peak of the process. '
    "Left of the dashed mark: the runtime itself, before the model was loaded."
)
_DEVICE = (
    '<i class="key a"></i>weights <i class="key b"></i>rest of the arena <i class="key c"></i>context <i class="key d"></i>rest of the process '
    '<i class="key e"></i>more under the runtime\'s defaults <i class="key peak"></i>the least limit it runs under.'
)
_Drawing = tuple[str, str, str | None]  # title, caption (HTML), SVG


def bench_page(record: BenchRecord) -> str:
    """The whole page."""
    here = resources.files("qlora_tools.bench")
    style, *scripts = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page_pareto.js"))
    table = bench_table(record)
    sections = [
        _head(record),
        _tiles(table, record),
        _remarks(record),
        "<h2>Settings</h2>",
        _table(table, record),
        _trade_offs(record),
        _bars(record),
        _sweeps(record),
        _layers(record),
        _origin(record),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(record.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>\n{''.join(scripts)}</script>\n</body>\n</html>\n"
    )


def _head(record: BenchRecord) -> str:
    devices = dict.fromkeys(device.get("name") for device in _devices(record))
    where = [str(item) for item in (record.machine.get("cpu") or "unknown processor", *devices) if item]
    facts = [record.created[:10], *where, f"{record.threads} thread{'s' * (record.threads > 1)}"]
    return f'<h1>{escape(record.title)}</h1>\n<p class="lead">{escape(" · ".join(facts))}</p>'


def _tiles(table: Table, record: BenchRecord) -> str:
    """The first answers at the first case, each with the settings that cannot be told from the best; nothing where the samples do not decide."""
    questions = {
        "file": "smallest file: {} MB",
        "decode_p50": "fastest decode: {} ms per step",
        "forward": "fastest forward: {} ms",
        "peak": "lowest peak memory: {} MB",
        "as_deployed_peak": "least VRAM as deployed: {} MB",
        "kl": "closest to the reference: KL {}",
    }
    at = [i for i, row in enumerate(table.sources) if row.case == record.workload.cases[0]]
    names, tiles = table.column("setting"), []
    for column in table.columns:
        cells = _rivals(table, column, record)
        best = [at[i] for i in leaders(column, [cells[i] for i in at])]
        if column.key in questions and best:
            tied = [names[i].text for i in best[1:]]
            said = questions[column.key].format(cells[best[0]].text) + (f"; tied with {shortened(tied, 2)}" if tied else "")
            tiles.append(f'<div class="tile"><b>{escape(names[best[0]].text)}</b><span>{escape(said)}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if len(at) > 1 and tiles else ""


def _rivals(table: Table, column: Column, record: BenchRecord) -> list[Cell]:
    """The cells that compete for best in a column: a reference does not compete in likeness to itself."""
    references = {quality.reference for quality in record.quality}
    pairs = zip(table.column(column.key), table.sources, strict=True)
    return [Cell("") if column.key in _QUALITY and row.setting in references else cell for cell, row in pairs]


def _remarks(record: BenchRecord) -> str:
    wrong = {*failures(record), *broken_identities(record)}
    items = ['<li class="failure">' * (text in wrong) + "<li>" * (text not in wrong) + f"{escape(text)}</li>" for text in remarks(record)]
    return f'<ul class="notes">{"".join(items)}</ul>' if items else ""


def _table(table: Table, record: BenchRecord) -> str:
    heads = "".join(_heading(column) for column in table.columns)
    references = {quality.reference for quality in record.quality}
    marked = {column.key: _marked(table, column, record) for column in table.columns}
    lines, before = [], None
    for i, (cells, row) in enumerate(zip(table.rows, table.sources, strict=True)):
        drawn = "".join(_cell(cell, column, i in marked[column.key], row.setting in references) for cell, column in zip(cells, table.columns, strict=True))
        kinds = " ".join(["failed"] * (row.status != "ok") + ["first"] * (before is not None and row.case != before))
        lines.append(f'<tr class="{kinds}">{drawn}</tr>' if kinds else f"<tr>{drawn}</tr>")
        before = row.case
    tall = " tall" * (len(lines) > _MOST_ROWS)
    return f'<div class="scroll{tall}"><table class="sortable">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n' + "\n".join(lines) + "\n</tbody>\n</table></div>"


def _heading(column: Column) -> str:
    return f'<th scope="col"><button type="button">{escape(column.title)}</button><small>{escape(column.unit) or "&nbsp;"}</small></th>'


def _marked(table: Table, column: Column, record: BenchRecord) -> set[int]:
    """The rows to mark: of each case the best and its ties, unless that is everyone."""
    cells, marked = _rivals(table, column, record), set()
    for case in record.workload.cases:
        at = [i for i, row in enumerate(table.sources) if row.case == case]
        best = leaders(column, [cells[i] for i in at])
        if len(best) < sum(cells[i].value is not None for i in at):
            marked |= {at[i] for i in best}
    return marked


def _cell(cell: Cell, column: Column, is_best: bool, is_reference: bool) -> str:
    kinds = ["words"] * column.key.endswith("_vs") + ["best"] * is_best + ["none"] * (cell.value is None)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    note = f' title="{escape(cell.note, quote=True)}"' if cell.note else ""
    value = "" if cell.value is None else f"{cell.value:.9g}" if isinstance(cell.value, (int, float)) else escape(cell.value, quote=True)
    mark = "<em>reference</em>" if is_reference and column.key == "setting" else ""
    return f'<td{kind}{note} data-value="{value}">{escape(cell.text)}{mark}</td>'


def _trade_offs(record: BenchRecord) -> str:
    """Cost against loss: drawn here, and the numbers for the script that draws them anew. The numbers serve the sweeps' switches too."""
    figures = []
    for cost, loss in views(record):
        svg = pareto_chart(points(record, cost, loss), cost, loss)
        if svg:
            title = f"<h3>{escape(headline(cost, loss))}</h3><figcaption>{_FRONTIER}</figcaption>"
            figures.append(f'<figure class="pareto" data-x="{cost.key}" data-y="{loss.key}">{title}{svg}</figure>')
    if not figures and not sweeps(record):
        return ""
    ran = {row.setting for row in record.rows if row.status == "ok"}
    numbers = {**plot_data(record), "frame": FRAME, "shown": list(dict.fromkeys(setting.name for setting in record.settings if setting.id in ran))}
    head = "<h2>Trade-offs</h2>\n" if figures else ""
    drawn = '<div class="charts">\n' + "\n".join(figures) + "\n</div>\n" if figures else ""
    return f'{head}<fieldset id="settings" hidden></fieldset>\n{drawn}<script type="application/json" id="bench-data">{embedded(numbers)}</script>'


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element or open a comment."""
    written = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _bars(record: BenchRecord) -> str:
    case = record.workload.cases[0]
    at = f" At {case.name.replace(' ', chr(0xA0))}." if len(record.workload.cases) > 1 else ""
    sure = "Median; whisker: 95 % interval from whole processes, where there are six or more." + at
    first = "Forward" if any(is_forward(row) for row in record.rows_at(case)) else "Prefill"
    drawn = [
        ("Decode", sure, timing_chart(record, "decode", "milliseconds per step")),
        (f"{first} of {case.prompt_tokens} tokens" if reads_length(record) else first, sure, timing_chart(record, "prefill", "milliseconds")),
        ("Memory of the device", _DEVICE + at, device_chart(record)),
        ("Memory", _SPLIT + at, memory_chart(record)),
        ("Load", "From the call to a model that is ready; import of the runtime not included.", timing_chart(record, "load", "milliseconds")),
    ]
    return _figures("Time and memory", drawn)


def _sweeps(record: BenchRecord) -> str:
    drawn: list[_Drawing] = [
        (f"{found.title}, by {AXES[found.axis].split(' ')[0]}", f"{escape(found.unit)} at {escape(found.fixed)}.", sweep_chart(found))
        for found in sweeps(record)
    ]
    return _figures("By batch and length", drawn, "charts small")


def _layers(record: BenchRecord) -> str:
    drawn = [
        ("Energy kept per layer", "Percent of the squared norm of the change that the adapter holds; darker keeps more.", energy_chart(record.layers)),
        ("Change kept per layer", "Percent of the adapter's change that the merged weights hold; darker holds more.", retention_chart(record.layers)),
        ("Rank per layer", "As chosen; darker is higher.", rank_chart(record.layers)),
        ("Decay of the singular values", "One line per layer; point at one for its name.", decay_chart(record.layers)),
    ]
    return _figures("Layers", drawn)


def _figures(title: str, drawn: Sequence[_Drawing], kind: str = "charts") -> str:
    shown = [f"<figure><h3>{escape(name)}</h3><figcaption>{caption}</figcaption>{svg}</figure>" for name, caption, svg in drawn if svg]
    return f'<h2>{escape(title)}</h2>\n<div class="{kind}">\n' + "\n".join(shown) + "\n</div>" if shown else ""


def _origin(record: BenchRecord) -> str:
    machine = record.machine
    ram = machine.get("ram_bytes")
    facts = [
        ("Measured", record.created),
        ("Method", method(record)),
        ("Machine", f"{machine.get('cpu') or 'unknown'}, {machine.get('cores')} cores, {ram / 2**30:.0f} GiB" if ram else str(machine.get("cpu"))),
        *(("Device", ", ".join(_told(name, value) for name, value in sorted(device.items()) if value is not None)) for device in _devices(record)),
        ("System", f"{machine.get('system')} {machine.get('kernel')} {machine.get('architecture')}, Python {machine.get('python')}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items()))),
    ]
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts]
    if record.command:
        lines.append(f"<dt>Command</dt><dd><code>{escape(' '.join(record.command))}</code></dd>")
    lines += [f"<dt>{escape(setting.name)}</dt><dd><code>{escape(setting.export)}</code></dd>" for setting in record.settings if setting.export]
    return "<h2>How this was measured</h2>\n<dl>" + "\n".join(lines) + "</dl>"


def _devices(record: BenchRecord) -> list[dict[str, Any]]:
    return record.machine.get("gpus") or ([record.machine["gpu"]] if record.machine.get("gpu") else [])


def _told(name: str, value: Any) -> str:
    """One fact of the device in words: bytes as GiB, lists and maps by their items."""
    if isinstance(value, dict):
        return ", ".join(_told(f"{name}_{item}", value[item]) for item in sorted(value) if value[item] is not None)
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{name.removesuffix('_bytes').replace('_', ' ')} {value / 2**30:.1f} GiB"
    return f"{name.replace('_', ' ')} {value}" if name != "name" else str(value)
