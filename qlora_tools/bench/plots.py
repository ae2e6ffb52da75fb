"""The same drawings as PNG files for papers, through matplotlib without a display. Sweeps and layers are ``plots_more.py``'s."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_tools.bench.cells import is_forward, reads_length
from qlora_tools.bench.charts import on_device, resident, timed
from qlora_tools.bench.charts_pareto import frontier_steps
from qlora_tools.bench.charts_sweep import AXES, sweeps
from qlora_tools.bench.pareto import Cost, Loss, Point, points, views
from qlora_tools.bench.plots_more import draw_decay, draw_layer_map, draw_sweeps
from qlora_tools.bench.record import BenchRecord
from qlora_tools.bench.svg import amount, place_labels
from qlora_tools.checkpoint.folder import replace_file
from qlora_tools.plot_style import BLUE, GOLD, GREY, INK, PURPLE, TEAL, new_figure, number_powers, png, styled

_FILE_NAMES = {"file": "size", "weights": "size", "decode": "latency", "prefill": "latency", "vram": "vram"}
_PIECES = {"fill-a": BLUE, "fill-b": TEAL, "fill-c": GOLD, "fill-d": PURPLE, "fill-e": GREY}
_WIDTH, _HEIGHT = 5.2, 3.4


def write_plots(record: BenchRecord, folder: Path, *, dpi: int = 200) -> list[Path]:
    """Write the plots that the record has data for into ``folder``, each in the place of the one before; returns their paths. The same record gives the
    same bytes."""
    written = []
    with styled():
        for name, paint, size in _painters(record):
            figure = new_figure(*size)
            if paint(figure):
                replace_file(folder / name, png(figure, dpi))
                written.append(folder / name)
    return written


_Painter = tuple[str, Callable[[Any], bool], tuple[float, float]]


def _painters(record: BenchRecord) -> list[_Painter]:
    """File name, what draws it, and its size in inches."""
    case = record.workload.cases[0]
    bars = (_WIDTH, max(_HEIGHT, 0.9 + 0.32 * len(record.settings)))
    first = "forward" if any(is_forward(row) for row in record.rows_at(case)) else "prefill"
    length = f" of {case.prompt_tokens} tokens" if reads_length(record) else ""
    at = f", {case.name}" if len(record.workload.cases) > 1 else ""
    painters: list[_Painter] = [(f"{_FILE_NAMES[cost.key]}-{loss.key}.png", _pareto(record, cost, loss), (_WIDTH, _HEIGHT)) for cost, loss in views(record)]
    painters += [
        ("decode.png", lambda figure: _timing(figure.add_subplot(), record, "decode", f"decode step, median (ms){at}"), bars),
        (f"{first}.png", lambda figure: _timing(figure.add_subplot(), record, "prefill", f"{first}{length} (ms){at}"), bars),
        ("memory.png", lambda figure: _memory(figure.add_subplot(), record, at), bars),
        ("device-memory.png", lambda figure: _device(figure.add_subplot(), record, at), bars),
    ]
    for axis in AXES:
        found = [sweep for sweep in sweeps(record) if sweep.axis == axis]
        if found:
            rows = -(-len(found) // 2)
            painters.append((f"by-{axis.split('_')[0]}.png", _all_of(draw_sweeps, found), (2 * 3.6, 2.6 * rows + 0.4)))
    energy = [(layer, layer.kept_energy) for layer in record.layers]
    kept = [(layer, layer.retention) for layer in record.layers]
    return [
        *painters,
        ("layer-energy.png", lambda figure: draw_layer_map(figure, energy, "energy of the change kept (%)"), (_WIDTH, _HEIGHT)),
        ("layer-change.png", lambda figure: draw_layer_map(figure, kept, "change kept by the merge (%)"), (_WIDTH, _HEIGHT)),
        ("singular-values.png", lambda figure: draw_decay(figure.add_subplot(), record.layers), (_WIDTH, _HEIGHT)),
    ]


def _all_of(draw: Callable[[Any, Any], bool], found: Any) -> Callable[[Any], bool]:
    return lambda figure: draw(figure, found)


def _pareto(record: BenchRecord, cost: Cost, loss: Loss) -> Callable[[Any], bool]:
    return lambda figure: _scatter(figure.add_subplot(), points(record, cost, loss), cost, loss)


def _scatter(axes: Any, found: list[Point], cost: Cost, loss: Loss) -> bool:
    if len(found) < 2:
        return False
    if loss.scale == "log":
        positive = [point.y for point in found if point.y > 0]
        axes.set_yscale("symlog", linthresh=max(min(positive) / 2, max(positive) / 1e5) if positive else 1e-6)
        number_powers(axes.yaxis, amount)
    steps = frontier_steps([(point.x, point.y) for point in found if point.on_frontier])
    for x1, y1, x2, y2 in steps:
        axes.plot([x1, x2], [y1, y2], color=BLUE, alpha=0.5, linewidth=1.2)
    for point in sorted(found, key=lambda point: point.on_frontier):  # the frontier lies on top
        colour = BLUE if point.on_frontier else GREY
        if point.interval:
            axes.vlines(point.x, *point.interval, color=colour, linewidth=1)
        axes.plot(point.x, point.y, "o", color=colour, markersize=5)
    axes.set_xlim(left=0, right=1.15 * max(point.x for point in found))
    if loss.scale != "free":
        axes.set_ylim(bottom=0)
    axes.set_xlabel(cost.title)
    axes.set_ylabel(loss.title)
    _label_points(axes, found, steps)
    return True


def _label_points(axes: Any, found: list[Point], steps: list[tuple[float, float, float, float]]) -> None:
    """Names beside their marks, where the page's placement would put them."""
    from matplotlib.patheffects import withStroke

    axes.figure.canvas.draw()  # settles the layout, so that marks have pixels
    box = axes.get_window_extent()
    scale = 12 / (8 * axes.figure.dpi / 72)  # the placement thinks in a 12-unit font

    def pixels(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y))
        return across * scale, -up * scale

    marks = [(*pixels(point.x, point.y), point.name) for point in found]
    lines = [(*pixels(x1, y1), *pixels(x2, y2)) for x1, y1, x2, y2 in steps]
    places = place_labels(marks, box.x0 * scale, box.x1 * scale, -box.y1 * scale, -box.y0 * scale, lines)
    inverse = axes.transData.inverted()
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for point, (x, y, anchor) in zip(found, places, strict=True):
        where = inverse.transform((x / scale, -y / scale))
        axes.text(
            *where,
            point.name,
            ha={"start": "left", "middle": "center", "end": "right"}[anchor],
            va="baseline",
            fontsize=8,
            color=INK if point.on_frontier else GREY,
            path_effects=halo,
        )


def _timing(axes: Any, record: BenchRecord, field: str, title: str) -> bool:
    found = timed(record, field)
    if not found:
        return False
    for i, (_, timing) in enumerate(found):
        axes.barh(i, 1e3 * (timing.p50_s or 0.0), height=0.6, color=BLUE)
        if timing.ci95_p50_s:
            axes.hlines(i, *(1e3 * bound for bound in timing.ci95_p50_s), color=INK, linewidth=1.4)
    _name_bars(axes, [name for name, _ in found], title)
    return True


def _memory(axes: Any, record: BenchRecord, at: str) -> bool:
    found = resident(record)
    if not found:
        return False
    for i, (_, memory) in enumerate(found):
        anon, file = (memory.anon_bytes or 0) / 1e6, (memory.file_bytes or 0) / 1e6
        axes.barh(i, anon, height=0.6, color=BLUE, label="anonymous" if i == 0 else None)
        axes.barh(i, file, left=anon, height=0.6, color=TEAL, label="file-backed" if i == 0 else None)
        axes.vlines((memory.peak_bytes or 0) / 1e6, i - 0.4, i + 0.4, color=INK, linewidth=1.6, label="peak" if i == 0 else None)
    _name_bars(axes, [name for name, _ in found], f"resident after the runs, and peak (MB){at}")
    _legend(axes)
    return True


def _device(axes: Any, record: BenchRecord, at: str) -> bool:
    found = on_device(record)
    named: set[str] = set()
    for i, (_, memory, pieces) in enumerate(found):
        start = 0.0
        for piece in pieces:
            axes.barh(i, piece.amount_bytes / 1e6, left=start, height=0.6, color=_PIECES[piece.kind], label=None if piece.kind in named else piece.what)
            start += piece.amount_bytes / 1e6
            named.add(piece.kind)
        if memory.smallest_limit_bytes is not None:
            label = None if "least limit" in named else "least limit"
            axes.vlines(memory.smallest_limit_bytes / 1e6, i - 0.4, i + 0.4, color=INK, linewidth=1.6, label=label)
            named.add("least limit")
    if found:
        _name_bars(axes, [name for name, _, _ in found], f"memory of the device (MB){at}")
        _legend(axes)
    return bool(found)


def _legend(axes: Any) -> None:
    """Above the drawing, bars before marks."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] in ("peak", "least limit"))
    axes.figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside upper center", frameon=False, fontsize=7.5, ncols=3)


def _name_bars(axes: Any, names: list[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(title)
