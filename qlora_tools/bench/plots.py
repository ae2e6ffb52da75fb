"""The same drawings as PNG files for papers, through matplotlib without a display."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_tools.bench.pareto import Point, decode_milliseconds, divergence_points, file_megabytes
from qlora_tools.bench.record import BenchRecord
from qlora_tools.bench.svg import place_labels
from qlora_tools.plot_style import BLUE, GREY, INK, TEAL, new_figure, png, styled


def write_plots(record: BenchRecord, folder: Path, *, dpi: int = 200) -> list[Path]:
    """Write the plots that the record has data for into ``folder``; returns their paths. The same record gives the same bytes."""
    painters: dict[str, Callable[[Any], bool]] = {
        "size-kl.png": lambda axes: _pareto(axes, divergence_points(record, file_megabytes), "file size (MB)"),
        "latency-kl.png": lambda axes: _pareto(axes, divergence_points(record, decode_milliseconds), "decode, median per token (ms)"),
        "decode.png": lambda axes: _timing(axes, record, "decode", "decode, median per token (ms)"),
        "prefill.png": lambda axes: _timing(axes, record, "prefill", f"prefill of {record.workload.cases[0].prompt_tokens} tokens (ms)"),
        "memory.png": lambda axes: _memory(axes, record),
        "singular-values.png": lambda axes: _decay(axes, record),
    }
    written = []
    with styled():
        for name, paint in painters.items():
            figure = new_figure(5.2, 3.4)
            if paint(figure.add_subplot()):
                (folder / name).write_bytes(png(figure, dpi))
                written.append(folder / name)
    return written


def _pareto(axes: Any, points: list[Point], x_title: str) -> bool:
    if len(points) < 2:
        return False
    positive = [point.y for point in points if point.y > 0]
    axes.set_yscale("symlog", linthresh=max(min(positive) / 2, max(positive) / 1e5) if positive else 1e-6)
    front = [point for point in points if point.on_frontier]
    axes.step([p.x for p in front], [p.y for p in front], where="post", color=BLUE, alpha=0.5, linewidth=1.2)
    for point in points:
        colour = BLUE if point.on_frontier else GREY
        if point.interval:
            axes.vlines(point.x, *point.interval, color=colour, linewidth=1)
        axes.plot(point.x, point.y, "o", color=colour, markersize=5)
    axes.set_xlim(left=0, right=1.15 * max(point.x for point in points))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x_title)
    axes.set_ylabel("KL to the reference (nats)")
    _label_points(axes, points)
    return True


def _label_points(axes: Any, points: list[Point]) -> None:
    """Names beside their marks, where the page's placement would put them."""
    from matplotlib.patheffects import withStroke

    axes.figure.canvas.draw()  # settles the layout, so that marks have pixels
    box = axes.get_window_extent()
    scale = 12 / (8 * axes.figure.dpi / 72)  # the placement thinks in a 12-unit font
    marks = [(x * scale, -y * scale, point.name) for point, (x, y) in zip(points, axes.transData.transform([(p.x, p.y) for p in points]), strict=True)]
    places = place_labels(marks, box.x0 * scale, box.x1 * scale, -box.y1 * scale, -box.y0 * scale)
    inverse = axes.transData.inverted()
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for point, (x, y, anchor) in zip(points, places, strict=True):
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
    found = [(record.setting(row.setting).name, timing) for row in record.rows if (timing := getattr(row, field)) is not None and timing.p50_s is not None]
    if not found:
        return False
    for i, (_, timing) in enumerate(found):
        axes.barh(i, 1e3 * timing.p50_s, height=0.6, color=BLUE)
        if timing.ci95_p50_s:
            axes.hlines(i, *(1e3 * bound for bound in timing.ci95_p50_s), color=INK, linewidth=1.4)
    _name_bars(axes, [name for name, _ in found], title)
    return True


def _memory(axes: Any, record: BenchRecord) -> bool:
    found = [(record.setting(row.setting).name, row.memory) for row in record.rows if row.memory is not None and row.memory.peak_bytes is not None]
    if not found:
        return False
    for i, (_, memory) in enumerate(found):
        anon, file = (memory.anon_bytes or 0) / 1e6, (memory.file_bytes or 0) / 1e6
        axes.barh(i, anon, height=0.6, color=BLUE, label="anonymous" if i == 0 else None)
        axes.barh(i, file, left=anon, height=0.6, color=TEAL, label="file-backed" if i == 0 else None)
        axes.vlines((memory.peak_bytes or 0) / 1e6, i - 0.4, i + 0.4, color=INK, linewidth=1.6, label="peak" if i == 0 else None)
    _name_bars(axes, [name for name, _ in found], "resident after the runs, and peak (MB)")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return True


def _decay(axes: Any, record: BenchRecord) -> bool:
    curves = [layer.singular_values for layer in record.layers if layer.singular_values and layer.singular_values[0] > 0]
    for values in curves:
        axes.semilogy(range(1, len(values) + 1), [value / values[0] for value in values], color=BLUE, alpha=0.35, linewidth=0.9)
    axes.set_xlabel("index")
    axes.set_ylabel("singular value / largest")
    return bool(curves)


def _name_bars(axes: Any, names: list[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(title)
