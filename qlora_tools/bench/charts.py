"""The page's drawings: cost against divergence, bars with intervals, memory split, extracted layers. Record in, SVG text out.

Each returns ``None`` where the record has nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qlora_tools.bench.pareto import Point
from qlora_tools.bench.record import BenchRecord, Layer
from qlora_tools.bench.samples import Timing
from qlora_tools.bench.svg import CHAR_WIDTH, Scale, bar, figure, line, linear_scale, log_scale, place_labels, text, ticks
from qlora_tools.bench.table import write_kl
from qlora_tools.names import layer_index

WIDTH = 620.0
_BAR_HEIGHT, _BAR_STEP = 18.0, 32.0
_DECADES = 5  # float rounding alone gives divergences of 1e-12, which would squeeze all others together


def pareto_chart(points: Sequence[Point], x_title: str) -> str | None:
    """Scatter of KL (log; what is too small to matter lies at the foot) over a cost. Filled marks and the step line are the frontier."""
    if len(points) < 2:
        return None
    left, right, top, bottom = 66.0, WIDTH - 20, 16.0, 340.0
    x = linear_scale([point.x for point in points], left, right)
    y = log_scale(
        [value for point in points for value in (point.y, *(point.interval or ()))], bottom, top, most_decades=_DECADES
    )  # an interval of 0 belongs to a KL of 0
    parts = []
    for value, label in ticks(x):
        parts += [line(x(value), top, x(value), bottom, "grid"), text(x(value), bottom + 20, label, "tick", "middle")]
    for value, label in ticks(y):
        parts += [line(left, y(value), right, y(value), "axis" if value == 0 else "grid"), text(left - 9, y(value) + 4, label, "tick", "end")]
    parts += [text((left + right) / 2, bottom + 42, x_title, "title", "middle"), _vertical_title("KL to the reference (nats per token)", (top + bottom) / 2)]
    parts.append(_frontier_line([(x(p.x), y(p.y)) for p in points if p.on_frontier]))
    for point in points:
        kind = "point best" if point.on_frontier else "point"
        if point.interval and y(point.y) < bottom:
            parts.append(line(x(point.x), y(point.interval[0]), x(point.x), y(point.interval[1]), "whisker soft"))
        tip = f"{point.name}: {point.x:,.4g}, KL {write_kl(point.y)}" + (
            f" ({write_kl(point.interval[0])} to {write_kl(point.interval[1])})" if point.interval else ""
        )
        parts.append(f'<circle cx="{x(point.x):.2f}" cy="{y(point.y):.2f}" r="6" class="{kind}"><title>{escape(tip)}</title></circle>')
    anchors = [(x(point.x), y(point.y), point.name) for point in points]
    for (tx, ty, anchor), point in zip(place_labels(anchors, left, right, top, bottom), points, strict=True):
        parts.append(text(tx, ty, point.name, "label" if point.on_frontier else "label muted", anchor))
    return figure(parts, WIDTH, bottom + 56, f"{x_title} against KL")


def _frontier_line(corners: Sequence[tuple[float, float]]) -> str:
    """Steps: between two settings of the frontier nothing better than the costlier one's price can be had."""
    if len(corners) < 2:
        return ""
    path = f"M{corners[0][0]:.2f} {corners[0][1]:.2f}" + "".join(f"H{x:.2f}V{y:.2f}" for x, y in corners[1:])
    return f'<path d="{path}" class="frontier"/>'


def _vertical_title(content: str, y: float) -> str:
    return f'<text transform="translate(15 {y:.2f}) rotate(-90)" class="title" text-anchor="middle">{escape(content)}</text>'


def timing_chart(record: BenchRecord, field: str, unit_title: str) -> str | None:
    """Horizontal bars of a row's :class:`Timing` medians in milliseconds, with the interval of the median as a whisker."""
    found: list[tuple[str, Timing]] = []
    for row in record.rows:
        timing = getattr(row, field)
        if timing is not None and timing.p50_s is not None:
            found.append((record.setting(row.setting).name, timing))
    if not found:
        return None
    left = _label_room([name for name, _ in found])
    x = linear_scale([1e3 * max(t.p50_s or 0.0, *(t.ci95_p50_s or (0.0,))) for _, t in found], left, WIDTH - 70)
    parts, bottom = _bar_frame(x, len(found), unit_title)
    for i, (name, timing) in enumerate(found):
        y = 10 + i * _BAR_STEP
        value = 1e3 * (timing.p50_s or 0.0)
        ends = [1e3 * bound for bound in timing.ci95_p50_s] if timing.ci95_p50_s else None
        sure = f", 95 % interval {ends[0]:.3g} to {ends[1]:.3g}" if ends else f", no interval: {timing.unknown.get('ci95_p50_s', '')}"
        parts += [text(left - 9, y + 13.5, name, "label", "end"), bar(left, y, x(value) - left, _BAR_HEIGHT, "fill-a", f"{name}: {value:.4g} ms{sure}")]
        if ends:
            middle = y + _BAR_HEIGHT / 2
            parts += [line(x(ends[0]), middle, x(ends[1]), middle, "whisker"), *(line(x(end), middle - 4, x(end), middle + 4, "whisker") for end in ends)]
        parts.append(text(max(x(value), x(ends[1]) if ends else 0.0) + 7, y + 13.5, f"{value:,.0f}" if value >= 100 else f"{value:.3g}", "value"))
    return figure(parts, WIDTH, bottom + 44, unit_title)


def memory_chart(record: BenchRecord) -> str | None:
    """What is resident after the runs, split, with the peak of the whole process as a tick."""
    found = [(record.setting(row.setting).name, row.memory) for row in record.rows if row.memory is not None and row.memory.peak_bytes is not None]
    if not found:
        return None
    left = _label_room([name for name, _ in found])
    x = linear_scale([(m.peak_bytes or 0) / 1e6 for _, m in found], left, WIDTH - 70)
    parts, bottom = _bar_frame(x, len(found), "resident after the runs, and peak (MB)")
    for i, (name, memory) in enumerate(found):
        y = 10 + i * _BAR_STEP
        parts.append(text(left - 9, y + 13.5, name, "label", "end"))
        start = 0.0
        for kind, what, amount in (("fill-a", "anonymous", memory.anon_bytes), ("fill-b", "file-backed", memory.file_bytes)):
            if amount:
                parts.append(
                    bar(x(start / 1e6) + 1, y, x((start + amount) / 1e6) - x(start / 1e6) - 1, _BAR_HEIGHT, kind, f"{name}: {amount / 1e6:,.1f} MB {what}")
                )
                start += amount
        peak = x((memory.peak_bytes or 0) / 1e6)
        parts += [line(peak, y - 4, peak, y + _BAR_HEIGHT + 4, "peak"), text(peak + 7, y + 13.5, f"{(memory.peak_bytes or 0) / 1e6:,.0f}", "value")]
        if memory.runtime_bytes is not None:
            base = x(memory.runtime_bytes / 1e6)
            parts.append(line(base, y + 2, base, y + _BAR_HEIGHT - 2, "mark"))
    return figure(parts, WIDTH, bottom + 44, "Memory")


def energy_chart(layers: Sequence[Layer]) -> str | None:
    """A map of modules over layer numbers: the share of the change's energy that each one's rank keeps."""
    found = [layer for layer in layers if layer.kept_energy is not None]
    tips = [
        f"{100 * (layer.kept_energy or 0.0):.2f} % kept at rank {layer.rank}"
        + ("" if layer.best_energy is None else f", at most {100 * layer.best_energy:.2f} %")
        for layer in found
    ]
    return _layer_map(found, [100 * (layer.kept_energy or 0.0) for layer in found], tips, "Energy kept per layer, percent")


def rank_chart(layers: Sequence[Layer]) -> str | None:
    """The same map of ranks; nothing to draw where all are equal."""
    if len({layer.rank for layer in layers}) < 2:
        return None
    return _layer_map(layers, [float(layer.rank) for layer in layers], [f"rank {layer.rank}" for layer in layers], "Rank per layer")


def _layer_map(layers: Sequence[Layer], values: Sequence[float], tips: Sequence[str], title: str) -> str | None:
    if not layers:
        return None
    numbers = [layer_index(layer.name) for layer in layers]
    kinds = [layer.name if number is None else layer.name.split(f"{number}.", 1)[-1] for layer, number in zip(layers, numbers, strict=True)]
    rows, columns = list(dict.fromkeys(kinds)), sorted({number or 0 for number in numbers})
    left = _label_room(rows)
    step, height = (WIDTH - left - 8) / len(columns), 26.0
    low, high = min(values), max(values)
    parts = []
    for layer, kind, number, value, tip in zip(layers, kinds, numbers, values, tips, strict=True):
        x, y = left + columns.index(number or 0) * step, 6 + rows.index(kind) * height
        strength = 0.15 + 0.85 * ((value - low) / (high - low) if high > low else 1.0)
        shape = f'x="{x + 1:.2f}" y="{y + 1:.2f}" width="{step - 2:.2f}" height="{height - 2:.2f}" rx="3" fill-opacity="{strength:.3f}"'
        parts.append(f'<rect {shape} class="fill-a"><title>{escape(f"{layer.name} {list(layer.shape)}: {tip}")}</title></rect>')
        if step >= 27:
            parts.append(text(x + step / 2, y + height / 2 + 4, f"{value:.0f}", "on-dark" if strength > 0.65 else "on-light", "middle"))
    parts += [text(left - 9, 6 + i * height + height / 2 + 4, _shorten(kind, left - 12), "label muted", "end") for i, kind in enumerate(rows)]
    bottom = 6 + len(rows) * height
    every = max(1, -(-len(columns) // 16))
    parts += [text(left + (i + 0.5) * step, bottom + 17, str(number), "tick", "middle") for i, number in enumerate(columns) if i % every == 0]
    parts.append(text(left + (WIDTH - left - 8) / 2, bottom + 38, "layer", "title", "middle"))
    return figure(parts, WIDTH, bottom + 48, title)


def decay_chart(layers: Sequence[Layer]) -> str | None:
    """Singular values of each layer's change, relative to the first, on a log axis."""
    found = [layer for layer in layers if layer.singular_values and layer.singular_values[0] > 0]
    if not found:
        return None
    left, right, top, bottom = 66.0, WIDTH - 20, 16.0, 320.0
    curves = [(layer, [s / layer.singular_values[0] for s in layer.singular_values if s > 0]) for layer in found if layer.singular_values]
    longest = max(len(curve) for _, curve in curves)
    x = linear_scale([1.0, float(max(longest, 2))], left, right, from_zero=False)
    y = log_scale([value for _, curve in curves for value in curve], bottom, top)
    parts = []
    for value, label in ticks(x):
        parts += [line(x(value), top, x(value), bottom, "grid"), text(x(value), bottom + 20, label, "tick", "middle")]
    for value, label in ticks(y):
        parts += [line(left, y(value), right, y(value), "grid"), text(left - 9, y(value) + 4, label, "tick", "end")]
    for layer, curve in curves:
        path = "M" + "L".join(f"{x(i + 1):.2f} {y(value):.2f}" for i, value in enumerate(curve))
        parts.append(f'<path d="{path}" class="curve"><title>{escape(layer.name)}</title></path>')
    parts += [text((left + right) / 2, bottom + 42, "index", "title", "middle"), _vertical_title("singular value, relative to the largest", (top + bottom) / 2)]
    return figure(parts, WIDTH, bottom + 54, "Singular values per layer")


def _bar_frame(x: Scale, count: int, title: str) -> tuple[list[str], float]:
    """Grid, ticks and title of a bar chart with ``count`` bars; also where the plot ends."""
    bottom = 10 + _BAR_STEP * count - (_BAR_STEP - _BAR_HEIGHT) + 8
    parts = [text((x.start + x.end) / 2, bottom + 38, title, "title", "middle")]
    for value, label in ticks(x):
        parts += [line(x(value), 2, x(value), bottom, "grid"), text(x(value), bottom + 18, label, "tick", "middle")]
    return parts, bottom


def _label_room(names: Sequence[str]) -> float:
    return min(max(CHAR_WIDTH * max(map(len, names)) + 20, 60.0), 220.0)


def _shorten(name: str, room: float) -> str:
    fits = int(room / CHAR_WIDTH)
    return name if len(name) <= fits else "…" + name[-(fits - 1) :]
