"""What an extraction and a merge kept, layer by layer: energy, change and rank over the depth, and how singular values decay. Record in, SVG text out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qlora_tools.bench.record import Layer
from qlora_tools.bench.svg import figure, label_room, line, linear_scale, log_scale, shorten, text, ticks, vertical_title
from qlora_tools.names import layer_index

_WIDTH = 620.0


def energy_chart(layers: Sequence[Layer]) -> str | None:
    """A map of modules over layer numbers: the share of the change's energy that each one's rank keeps."""
    found = [layer for layer in layers if layer.kept_energy is not None]
    tips = [
        f"{100 * (layer.kept_energy or 0.0):.2f} % kept at rank {layer.rank}"
        + ("" if layer.best_energy is None else f", at most {100 * layer.best_energy:.2f} %")
        for layer in found
    ]
    return layer_map(found, [100 * (layer.kept_energy or 0.0) for layer in found], tips, "Energy kept per layer, percent")


def retention_chart(layers: Sequence[Layer]) -> str | None:
    """The same map of the share of the adapter's change that the stored weights hold after a merge."""
    found = [layer for layer in layers if layer.retention is not None]
    values = [100 * (layer.retention or 0.0) for layer in found]
    return layer_map(found, values, [f"{value:.2f} % of the change kept" for value in values], "Change kept by the merge per layer, percent")


def rank_chart(layers: Sequence[Layer]) -> str | None:
    """The same map of ranks; nothing to draw where all are equal."""
    if len({layer.rank for layer in layers}) < 2:
        return None
    return layer_map(layers, [float(layer.rank) for layer in layers], [f"rank {layer.rank}" for layer in layers], "Rank per layer")


def map_places(names: Sequence[str]) -> tuple[list[str], list[int], list[tuple[int, int]]]:
    """The kinds of module (rows), the layer numbers (columns), and for each name its row and column."""
    numbers = [layer_index(name) for name in names]
    kinds = [name if number is None else name.split(f"{number}.", 1)[-1] for name, number in zip(names, numbers, strict=True)]
    rows, columns = list(dict.fromkeys(kinds)), sorted({number or 0 for number in numbers})
    return rows, columns, [(rows.index(kind), columns.index(number or 0)) for kind, number in zip(kinds, numbers, strict=True)]


def layer_map(layers: Sequence[Layer], values: Sequence[float], tips: Sequence[str], title: str) -> str | None:
    if not layers:
        return None
    rows, columns, places = map_places([layer.name for layer in layers])
    left = label_room(rows)
    step, height = (_WIDTH - left - 8) / len(columns), 26.0
    low, high = min(values), max(values)
    parts = []
    for layer, (row, column), value, tip in zip(layers, places, values, tips, strict=True):
        x, y = left + column * step, 6 + row * height
        strength = 0.15 + 0.85 * ((value - low) / (high - low) if high > low else 1.0)
        shape = f'x="{x + 1:.2f}" y="{y + 1:.2f}" width="{step - 2:.2f}" height="{height - 2:.2f}" rx="3" fill-opacity="{strength:.3f}"'
        name = f"{layer.name} {list(layer.shape)}" if layer.shape else layer.name
        parts.append(f'<rect {shape} class="fill-a"><title>{escape(f"{name}: {tip}")}</title></rect>')
        if step >= 27:
            parts.append(text(x + step / 2, y + height / 2 + 4, f"{value:.0f}", "on-dark" if strength > 0.65 else "on-light", "middle"))
    parts += [text(left - 9, 6 + i * height + height / 2 + 4, shorten(kind, left - 12), "label muted", "end") for i, kind in enumerate(rows)]
    bottom = 6 + len(rows) * height
    every = max(1, -(-len(columns) // 16))
    parts += [text(left + (i + 0.5) * step, bottom + 17, str(number), "tick", "middle") for i, number in enumerate(columns) if i % every == 0]
    parts.append(text(left + (_WIDTH - left - 8) / 2, bottom + 38, "layer", "title", "middle"))
    return figure(parts, _WIDTH, bottom + 48, title)


def decay_chart(layers: Sequence[Layer]) -> str | None:
    """Singular values of each layer's change, relative to the first, on a log axis."""
    found = [layer for layer in layers if layer.singular_values and layer.singular_values[0] > 0]
    if not found:
        return None
    left, right, top, bottom = 66.0, _WIDTH - 20, 16.0, 320.0
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
    parts += [text((left + right) / 2, bottom + 42, "index", "title", "middle"), vertical_title("singular value, relative to the largest", (top + bottom) / 2)]
    return figure(parts, _WIDTH, bottom + 54, "Singular values per layer")
