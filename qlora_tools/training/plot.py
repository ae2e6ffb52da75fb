"""The course of a run, or of several side by side, as a PNG: losses above, the learning rate below.

Equal metrics give equal bytes. Left out: reading the metrics (``metrics.py``), and what all drawings share (``plot_style.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.folder import explained_disk_errors
from qlora_tools.errors import UsageError
from qlora_tools.plot_style import COLOURS, INK, new_figure, png, styled
from qlora_tools.training.events import Evaluation, Event, Step

FILE_NAME = "loss.png"
#: The smoothed line looks back over about this share of the run.
_SMOOTHED_SHARE = 0.04


def plot_loss(metrics: Sequence[Event] | Mapping[str, Sequence[Event]], path: Path, *, dpi: int = 150) -> Path:
    """Draw one run, or several by name, into the file ``path``; returns it.

    Raises:
        UsageError: a run holds no step. StorageError: the disk refused.
    """
    runs = dict(metrics) if isinstance(metrics, Mapping) else {"": metrics}
    empty = [name for name, events in runs.items() if not any(isinstance(event, Step) for event in events)]
    if empty or not runs:
        raise UsageError(f"no step to draw{f' in {empty[0]}' if empty and empty[0] else ''}", hint="the run ended before its first step")
    with styled():
        figure = new_figure(6.4, 4.2)
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
        image = png(figure, dpi)
    with explained_disk_errors(path):
        path.write_bytes(image)
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
        mark = INK if alone else colour
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
    return [COLOURS[position % len(COLOURS)] for position in range(count)]
