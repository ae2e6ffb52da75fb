"""The course of a run, or of several side by side, as a PNG: losses above, the learning rate below.

Drawn with matplotlib's object interface, so no window system is touched and no global figure is left behind; the file holds
no date and no version, so equal metrics give equal bytes. Left out: reading the metrics (``metrics.py``).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.folder import explained_disk_errors
from qlora_tools.errors import UsageError
from qlora_tools.training.events import Evaluation, Event, Step

FILE_NAME = "loss.png"
_COLOURS = ("#2a6fdb", "#c2571a", "#1b9e8a", "#8a4fbf", "#b8860b", "#d0457e")
_GREY, _INK = "#9a9992", "#1d1d1b"
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "grid.color": "#e5e4df",
    "axes.axisbelow": True,
    "agg.path.chunksize": 10_000,  # a long noisy line overflows the renderer in one piece
}
#: The smoothed line looks back over about this share of the run.
_SMOOTHED_SHARE = 0.04


def plot_loss(metrics: Sequence[Event] | Mapping[str, Sequence[Event]], path: Path, *, dpi: int = 150) -> Path:
    """Draw one run, or several by name, into the file ``path``; returns it.

    Raises:
        UsageError: a run holds no step. StorageError: the disk refused.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = dict(metrics) if isinstance(metrics, Mapping) else {"": metrics}
    empty = [name for name, events in runs.items() if not any(isinstance(event, Step) for event in events)]
    if empty or not runs:
        raise UsageError(f"no step to draw{f' in {empty[0]}' if empty and empty[0] else ''}", hint="the run ended before its first step")
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        for (name, events), colour in zip(runs.items(), _cycled(len(runs)), strict=True):
            _draw(upper, lower, name, events, colour, alone=len(runs) == 1)
        _limit(upper, runs)
        upper.set_ylabel("loss (nats)")
        upper.legend(frameon=False, fontsize=8)
        lower.set_ylabel("rate")
        lower.set_ylim(bottom=0)
        lower.set_xlabel("step")
        lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    with explained_disk_errors(path):
        path.write_bytes(image.getvalue())
    return path


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential mean that looks back over about ``span`` values, without a pull towards 0 at the start. NaN and infinity are skipped."""
    keep = 1 - 2 / (max(1.0, span) + 1)
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        means.append(total / weight if weight else math.nan)
    return means


def _draw(upper: Any, lower: Any, name: str, events: Sequence[Event], colour: str, *, alone: bool) -> None:
    steps = [event for event in events if isinstance(event, Step)]
    judged = [event for event in events if isinstance(event, Evaluation) and math.isfinite(event.loss)]
    x, losses = [event.step for event in steps], [_gap(event.loss) for event in steps]
    upper.plot(x, losses, color=colour, alpha=0.25, linewidth=0.8)
    upper.plot(x, smoothed(losses, _SMOOTHED_SHARE * len(x)), color=colour, linewidth=1.6, label="training, smoothed" if alone else name)
    if judged:
        mark = _INK if alone else colour
        upper.plot(
            [event.step for event in judged],
            [event.loss for event in judged],
            "o--",
            color=mark,
            markersize=3.5,
            linewidth=0.9,
            label="validation" if alone else None,
        )
        best = min(judged, key=lambda event: event.loss)
        upper.plot(
            [best.step], [best.loss], "o", color=mark, fillstyle="none", markersize=8, label=f"best: {best.loss:.4f} at step {best.step}" if alone else None
        )
    lower.plot(x, [_gap(event.lr) for event in steps], color=colour, linewidth=1.2)


def _limit(axes: Any, runs: Mapping[str, Sequence[Event]]) -> None:
    """Let a spike not flatten the rest: the top is the first loss, the worst evaluation or the worst step but two in a hundred."""
    tops: list[float] = []
    bottoms: list[float] = []
    for events in runs.values():
        losses = [event.loss for event in events if isinstance(event, Step) and math.isfinite(event.loss)]
        judged = [event.loss for event in events if isinstance(event, Evaluation) and math.isfinite(event.loss)]
        tops += [*losses[:1], sorted(losses)[int(0.98 * (len(losses) - 1))], *judged] if losses else judged
        bottoms += [*losses, *judged]
    if not tops:
        return
    top, bottom = max(tops), min(bottoms)
    if top > bottom:
        axes.set_ylim(bottom - 0.05 * (top - bottom), top + 0.1 * (top - bottom))


def _gap(value: float) -> float:
    """Infinity as NaN: both leave a gap in the line."""
    return value if math.isfinite(value) else math.nan


def _cycled(count: int) -> list[str]:
    return [_COLOURS[position % len(_COLOURS)] for position in range(count)]
