"""PNG drawings of what a benchmark has only sometimes: sweeps over batch and length, and an extraction's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_tools.bench.charts_layers import map_places
from qlora_tools.bench.charts_sweep import AXES, Sweep, is_log
from qlora_tools.bench.record import Layer
from qlora_tools.bench.svg import amount, fine_log_scale, ticks
from qlora_tools.plot_style import BLUE, COLOURS, GREY, number_powers


def draw_sweeps(figure: Any, found: Sequence[Sweep]) -> bool:
    """One panel per figure, two in a row, with one legend for all."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    panels = figure.subplots(-(-len(found) // 2), 2, squeeze=False)
    write = FuncFormatter(lambda value, _: amount(value))
    handles: dict[str, Any] = {}
    for axes, sweep in zip(panels.flat, found, strict=False):
        places = sorted({x for line in sweep.series for x, _ in line.at})
        values = [y for line in sweep.series for _, y in line.at]
        for line in sweep.series:
            style = {"color": COLOURS[line.style % len(COLOURS)], "linestyle": "-" if line.style < len(COLOURS) else "--"}
            (handles[line.setting],) = axes.plot(*zip(*line.at, strict=True), marker="o", markersize=3.5, linewidth=1.3, **style)
        if is_log(places):
            axes.set_xscale("log")
        if sweep.is_time and is_log(values):
            scale = fine_log_scale(values, 0, 1)
            axes.set_yscale("log")
            axes.set_ylim(scale.low, scale.high)
            axes.set_yticks([value for value, _ in ticks(scale)])
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(places)
        axes.xaxis.set_major_formatter(write)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(write)
        axes.set_title(sweep.title, fontsize=9, loc="left")
        axes.set_ylabel(sweep.unit)
        axes.set_xlabel(f"{AXES[sweep.axis]}, {sweep.fixed}", fontsize=8)
    for axes in panels.flat[len(found) :]:
        axes.set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return True


def draw_layer_map(figure: Any, found: Sequence[tuple[Layer, float | None]], title: str) -> bool:
    """Modules over layer numbers, darker where more is kept."""
    from matplotlib.colors import LinearSegmentedColormap

    known = [(layer, value) for layer, value in found if value is not None]
    if not known:
        return False
    rows, columns, places = map_places([layer.name for layer, _ in known])
    grid = [[float("nan")] * len(columns) for _ in rows]
    for (_, value), (row, column) in zip(known, places, strict=True):
        grid[row][column] = 100 * value
    axes = figure.add_subplot()
    drawn = axes.imshow(grid, aspect="auto", cmap=LinearSegmentedColormap.from_list("kept", ["#dfe9fa", BLUE]))
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    every = max(1, -(-len(columns) // 16))
    axes.set_xticks(range(0, len(columns), every), columns[::every])
    axes.grid(visible=False)
    axes.set_xlabel("layer")
    figure.colorbar(drawn, ax=axes, label=title).outline.set_edgecolor(GREY)
    return True


def draw_decay(axes: Any, layers: Sequence[Layer]) -> bool:
    """One line per layer, relative to its largest singular value."""
    curves = [layer.singular_values for layer in layers if layer.singular_values and layer.singular_values[0] > 0]
    for values in curves:
        axes.semilogy(range(1, len(values) + 1), [value / values[0] for value in values], color=BLUE, alpha=0.35, linewidth=0.9)
    if curves:
        number_powers(axes.yaxis, amount)
    axes.set_xlabel("index")
    axes.set_ylabel("singular value / largest")
    return bool(curves)
