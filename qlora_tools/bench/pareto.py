"""Which settings are worth having: the frontier of two costs, and the points that a plot of them shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_tools.bench.record import BenchRecord, Row

#: Two fp32 runtimes of one model differ by about 1e-12; a divergence below this is no reason to prefer either.
ROUNDING_NATS = 1e-9


@dataclass(frozen=True)
class Point:
    """One setting at a cost ``x`` and a divergence ``y``; ``interval`` is y's. ``on_frontier``: no other is at least as good in both and better in one."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None
    on_frontier: bool = False


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (x, y), both to be small, whether nothing dominates it. Equal points do not dominate each other."""
    return [not any((a <= x and b <= y) and (a < x or b < y) for a, b in points) for x, y in points]


def divergence_points(record: BenchRecord, cost: Callable[[Row], float | None]) -> list[Point]:
    """Every setting with both a ``cost`` and a KL figure, by cost. The reference itself is shown too, at its KL of 0."""
    found = []
    for row in record.rows:
        quality, x = record.quality_of(row.setting), cost(row)
        kl = quality.figures.get("kl_mean") if quality is not None else None
        if row.status == "ok" and quality is not None and x is not None and kl is not None:
            interval = (quality.figures.get("ci95") or {}).get("kl_mean")
            found.append((record.setting(row.setting).name, x, kl, tuple(interval) if interval else None))
    found.sort(key=lambda item: (item[1], item[2], item[0]))
    marked = frontier([(x, max(y, ROUNDING_NATS)) for _, x, y, _ in found])
    return [Point(name, x, y, interval, on) for (name, x, y, interval), on in zip(found, marked, strict=True)]


def file_megabytes(row: Row) -> float | None:
    return None if row.file_bytes is None else row.file_bytes / 1e6


def decode_milliseconds(row: Row) -> float | None:
    return None if row.decode is None or row.decode.p50_s is None else row.decode.p50_s * 1e3
