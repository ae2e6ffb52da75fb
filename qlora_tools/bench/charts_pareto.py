"""Cost against loss as an SVG, for readers without a script; with one, ``page_pareto.js`` draws the same and lets the axes be chosen.

The two must stay alike: a test in a browser compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from qlora_tools.bench.cells import write_kl
from qlora_tools.bench.pareto import Cost, Loss, Point
from qlora_tools.bench.svg import CHAR_WIDTH, Scale, amount, figure, line, linear_scale, log_scale, place_labels, text, ticks, vertical_title

#: Where the plot lies in its drawing, how wide a letter is, and the decades a log axis shows: float rounding alone gives divergences of 1e-12,
#: which would squeeze all others together.
FRAME: dict[str, Any] = {"width": 620, "height": 396, "left": 66, "right": 600, "top": 16, "bottom": 340, "decades": 5, "charWidth": CHAR_WIDTH}


def pareto_chart(points: Sequence[Point], cost: Cost, loss: Loss) -> str | None:
    """Scatter of a loss over a cost. Filled marks and the step line are the frontier; what is too small for a log axis lies at its foot."""
    if len(points) < 2:
        return None
    left, right, top, bottom = (float(FRAME[side]) for side in ("left", "right", "top", "bottom"))
    x = linear_scale([point.x for point in points], left, right)
    y = loss_scale(loss, [value for point in points for value in (point.y, *(point.interval or ()))], bottom, top)
    parts = []
    for value, label in ticks(x):
        parts += [line(x(value), top, x(value), bottom, "grid"), text(x(value), bottom + 20, label, "tick", "middle")]
    for value, label in ticks(y):
        parts += [line(left, y(value), right, y(value), "axis" if value == 0 else "grid"), text(left - 9, y(value) + 4, label, "tick", "end")]
    parts += [text((left + right) / 2, bottom + 42, cost.title, "title", "middle"), vertical_title(loss.title, (top + bottom) / 2)]
    steps = frontier_steps([(x(p.x), y(p.y)) for p in points if p.on_frontier])
    parts += [line(*step, "frontier") for step in steps]
    for point in sorted(points, key=lambda point: point.on_frontier):  # the frontier lies on top
        if point.interval and y(point.y) < bottom:
            parts.append(line(x(point.x), y(point.interval[0]), x(point.x), y(point.interval[1]), "whisker soft"))
        kind = "point best" if point.on_frontier else "point"
        parts.append(f'<circle cx="{x(point.x):.2f}" cy="{y(point.y):.2f}" r="6" class="{kind}"><title>{escape(tip(point, cost, loss))}</title></circle>')
    anchors = [(x(point.x), y(point.y), point.name) for point in points]
    for (tx, ty, anchor), point in zip(place_labels(anchors, left, right, top, bottom, steps), points, strict=True):
        parts.append(text(tx, ty, point.name, "label" if point.on_frontier else "label muted", anchor))
    return figure(parts, FRAME["width"], FRAME["height"], headline(cost, loss))


def loss_scale(loss: Loss, values: Sequence[float], start: float, end: float) -> Scale:
    if loss.scale == "log":
        return log_scale(values, start, end, most_decades=FRAME["decades"])  # an interval of 0 belongs to a loss of 0
    return linear_scale(values, start, end, from_zero=loss.scale == "zero")


def headline(cost: Cost, loss: Loss) -> str:
    """``File size against KL to the reference``: the titles without their units."""
    said = f"{cost.title.rsplit(' (', 1)[0]} against {loss.title.rsplit(' (', 1)[0]}"
    return said[0].upper() + said[1:]


def tip(point: Point, cost: Cost, loss: Loss) -> str:
    """``name: file size 940 MB, KL to the reference 0.0340 nats [0.0306 to 0.0374], on the frontier``."""
    write = write_kl if loss.scale == "log" else amount
    sure = f" [{write(point.interval[0])} to {write(point.interval[1])}]" if point.interval else ""
    return f"{point.name}: {_with_unit(cost.title, amount(point.x))}, {_with_unit(loss.title, write(point.y))}{sure}{', on the frontier' if point.on_frontier else ''}"


def _with_unit(title: str, value: str) -> str:
    name, _, unit = title.removesuffix(")").rpartition(" (")
    return f"{name} {value} {unit}" if name else f"{title} {value}"


def frontier_steps(corners: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Between two settings of the frontier nothing better than the costlier one's price can be had: across, then down."""
    steps = []
    for (x1, y1), (x2, y2) in pairwise(corners):
        steps += [(x1, y1, x2, y1), (x2, y1, x2, y2)]
    return steps
