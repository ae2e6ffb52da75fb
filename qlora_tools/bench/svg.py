"""The few drawing parts the charts share: scales with round ticks, text, placement of labels.

Colours are CSS classes, so that one drawing reads on light and dark pages. All numbers are written with two
decimals: the same record gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CHAR_WIDTH = 7.0  # of the 12-unit label font, on average, where that is a wide one


@dataclass(frozen=True)
class Scale:
    """A value axis mapped onto the pixels ``start``..``end``. A log axis may show 0 too, apart from its decades."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False
    foot: float = 0.0  # the share of the length kept for what lies below ``low``, shown all alike
    foot_label: str = "0"
    is_fine: bool = False  # log, from one of 1, 2, 5 times a power to another, with all of them between as ticks

    def __call__(self, value: float) -> float:
        if self.is_log:
            if value <= 0 or (self.foot and value < self.low):
                return self.start
            share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
            first = self.start + self.foot * (self.end - self.start)
            return first + min(max(share, 0.0), 1.0) * (self.end - first)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def linear_scale(values: Sequence[float], start: float, end: float, *, from_zero: bool = True) -> Scale:
    """From 0 (or a round value below the least) to a round value above the largest."""
    high = max(values, default=1.0)
    low = min(0.0, *values) if from_zero and values else 0.0 if from_zero else min(values)
    step = _round_step((high - low) or abs(high) or 1.0)
    low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    return Scale(low, high if high > low else low + 5 * step, start, end)


def log_scale(values: Sequence[float], start: float, end: float, *, most_decades: int | None = None) -> Scale:
    """Whole decades around the positive values, the upper ``most_decades`` of them; a foot for 0 and for what is smaller still."""
    positive = [value for value in values if value > 0] or [1e-3, 1e-2]
    low, high = math.floor(math.log10(min(positive)) + 1e-9), math.ceil(math.log10(max(positive)) - 1e-9)
    high = max(high, low + 1)
    is_cut = most_decades is not None and high - low > most_decades
    if most_decades is not None and is_cut:
        low = high - most_decades
    foot = 0.1 if is_cut or min(values, default=0.0) <= 0 else 0.0
    return Scale(10.0**low, 10.0**high, start, end, is_log=True, foot=foot, foot_label=f"<{_power(low)}" if is_cut else "0")


def fine_log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """For values that span little: from the 1, 2 or 5 times a power of ten below the least to the one above the largest."""
    low, high = min(values), max(values)
    steps = [step for power in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2) for step in _fine_steps(power)]
    below = max(step for step in steps if step <= low * (1 + 1e-9))
    above = min(step for step in steps if step >= high * (1 - 1e-9))
    return Scale(below, above if above > below else min(step for step in steps if step > below), start, end, is_log=True, is_fine=True)


def _fine_steps(power: int) -> list[float]:
    return [float(f"{digit}e{power}") for digit in (1, 2, 5)]


def ticks(scale: Scale) -> list[tuple[float, str]]:
    """(value, label) along an axis."""
    if scale.is_fine:
        powers = range(math.floor(math.log10(scale.low) + 1e-9), math.ceil(math.log10(scale.high) - 1e-9) + 1)
        steps = [step for power in powers for step in _fine_steps(power) if scale.low <= step <= scale.high]
        return [(step, amount(step)) for step in (steps if len(steps) < 9 else [step for step in steps if f"{step:e}"[0] == "1"])]
    if scale.is_log:
        low, high = round(math.log10(scale.low)), round(math.log10(scale.high))
        every = max(1, math.ceil((high - low) / 6))
        decades = [(10.0**power, _power(power)) for power in range(low, high + 1, every)]
        return [(0.0, scale.foot_label), *decades] if scale.foot else decades
    step = _round_step(scale.high - scale.low)
    count = round((scale.high - scale.low) / step)
    return [(scale.low + i * step, f"{scale.low + i * step:,.10g}") for i in range(count + 1)]


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if exponent > -4 else f"1e{exponent}"


def _round_step(span: float) -> float:
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if raw <= factor * power * (1 + 1e-9))


def amount(value: float) -> str:
    """Four digits, or all that stand before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" class="{kind}"/>'


def bar(x: float, y: float, width: float, height: float, kind: str, tip: str) -> str:
    """A rectangle; the tip is the browser's own tooltip."""
    shape = f'x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{height:.2f}" rx="2" class="{kind}"'
    return f"<rect {shape}><title>{escape(tip)}</title></rect>"


def figure(parts: Sequence[str], width: float, height: float, label: str) -> str:
    """The whole drawing, with its name for screen readers."""
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg>'


def vertical_title(content: str, y: float, x: float = 15.0) -> str:
    return f'<text transform="translate({x:g} {y:.2f}) rotate(-90)" class="title" text-anchor="middle">{escape(content)}</text>'


def shorten(name: str, room: float) -> str:
    """The end of a name, as much as fits; ends differ where beginnings are alike."""
    fits = max(int(room / CHAR_WIDTH), 2)
    return name if len(name) <= fits else "…" + name[-(fits - 1) :]


def label_room(names: Sequence[str], most: float = 220.0) -> float:
    """The width to keep for names in front of a drawing."""
    return min(max(CHAR_WIDTH * max(map(len, names)) + 20, 60.0), most)


def spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places for labels at the heights ``wanted``, ``gap`` apart or more, as near as that allows; in the order given."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    placed = [0.0] * len(wanted)
    above = top - gap
    for i in order:
        above = placed[i] = max(wanted[i], above + gap)
    below = max(bottom, top + gap * (len(wanted) - 1)) + gap
    for i in reversed(order):
        below = placed[i] = min(placed[i], below - gap)
    return placed


def place_labels(
    anchors: Sequence[tuple[float, float, str]], left: float, right: float, top: float, bottom: float, lines: Sequence[tuple[float, float, float, float]] = ()
) -> list[tuple[float, float, str]]:
    """A place (x, baseline y, anchor) for each (x, y, text), beside its mark, clear of marks, of labels placed before and of ``lines`` where that can be had."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in anchors]
    taken += [(min(x1, x2) - 2, min(y1, y2) - 2, max(x1, x2) + 2, max(y1, y2) + 2) for x1, y1, x2, y2 in lines]
    placed = []
    for x, y, content in anchors:
        width = CHAR_WIDTH * len(content)
        options = [(x + 11, y + 4, "start"), (x - 11, y + 4, "end"), (x, y - 12, "middle"), (x, y + 21, "middle")]
        options += [(x + 11 * side, y + 4 + rise, anchor) for rise in (-16, 18, -32, 34) for side, anchor in ((1, "start"), (-1, "end"))]
        best, best_cost = options[0], math.inf
        for option in options:
            box = _box(option, width)
            outside = box[0] < left or box[2] > right or box[1] < top or box[3] > bottom
            cost = 10.0 * outside + sum(_overlap(box, other) for other in taken) / 100
            if cost < best_cost - 1e-9:
                best, best_cost = option, cost
        taken.append(_box(best, width))
        placed.append(best)
    return placed


def _box(place: tuple[float, float, str], width: float) -> tuple[float, float, float, float]:
    x, y, anchor = place
    start = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return start, y - 11, start + width, y + 3


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
