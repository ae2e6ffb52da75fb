"""Which settings are worth having: what they may cost, what they may lose, and the frontier of the two.

The page's plots are drawn from the same numbers twice, here for readers without a script and by ``page_pareto.js`` for the others, so
the costs and losses that can be chosen are listed once (:data:`COSTS`, :data:`LOSSES`) and handed to the page as data. Both are to be small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora_tools.bench.cells import is_forward
from qlora_tools.bench.record import BenchRecord, Case, Row
from qlora_tools.bench.samples import Timing

#: Two fp32 runtimes of one model differ by about 1e-12; a divergence below this is no reason to prefer either.
ROUNDING_NATS = 1e-9


@dataclass(frozen=True)
class Point:
    """One setting at a cost ``x`` and a loss ``y``; ``interval`` is y's. ``on_frontier``: no other is at least as good in both and better in one."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None
    on_frontier: bool = False


@dataclass(frozen=True)
class Cost:
    """What a setting takes, of its row at one case; ``by_case`` where another case costs something else."""

    key: str
    title: str
    by_case: bool
    read: Callable[[Row], float | None]


@dataclass(frozen=True)
class Loss:
    """What a setting loses: ``of`` the figure ``figure``. ``scale``: ``log`` with a foot for what is near 0, from ``zero``, or ``free``.

    Differences below ``rounding`` do not put a setting on the frontier or take it off.
    """

    key: str
    title: str
    figure: str
    of: Callable[[float], float]
    scale: str
    rounding: float = 0.0
    unless: str = ""  # another figure beside which this one says nothing more


def _megabytes(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def _milliseconds(timing: Timing | None) -> float | None:
    return None if timing is None or timing.p50_s is None else timing.p50_s * 1e3


def file_megabytes(row: Row) -> float | None:
    return _megabytes(row.file_bytes)


def weights_megabytes(row: Row) -> float | None:
    told = row.weights_bytes if row.weights_bytes is not None or row.device_memory is None else row.device_memory.weights_bytes
    return _megabytes(told)


def deployed_megabytes(row: Row) -> float | None:
    return None if row.device_memory is None else _megabytes(row.device_memory.as_deployed_peak_bytes)


def peak_megabytes(row: Row) -> float | None:
    return None if row.memory is None else _megabytes(row.memory.peak_bytes)


def decode_milliseconds(row: Row) -> float | None:
    return _milliseconds(row.decode)


def prefill_milliseconds(row: Row) -> float | None:
    return _milliseconds(row.prefill)


COSTS = (
    Cost("file", "file size (MB)", False, file_megabytes),
    Cost("weights", "weights (MB)", False, weights_megabytes),
    Cost("rss", "peak RSS (MB)", True, peak_megabytes),
    Cost("vram", "VRAM as deployed (MB)", True, deployed_megabytes),
    Cost("decode", "decode step, median (ms)", True, decode_milliseconds),
    Cost("prefill", "prefill, median (ms)", True, prefill_milliseconds),
    Cost("energy", "energy per new token (J)", True, lambda row: row.energy_j),
)
LOSSES = (
    Loss("kl", "KL to the reference (nats)", "kl_mean", lambda value: value, "log", ROUNDING_NATS),
    Loss("error", "relative error of the outputs (%)", "relative_error", lambda value: 100 * value, "log", ROUNDING_NATS),
    Loss("ppl", "perplexity", "ppl_candidate", lambda value: value, "free"),
    Loss("top1", "1 - top-1 agreement (%)", "top1_agreement", lambda value: 100 * (1 - value), "zero"),
    Loss("cosine", "1 - cosine", "cosine_mean", lambda value: 1 - value, "log", ROUNDING_NATS, unless="ppl_candidate"),
    Loss("wrong", "answers that are wrong (%)", "accuracy", lambda value: 100 * (1 - value), "zero"),
    Loss("lost", "gain of the fine-tune lost (%)", "retention", lambda value: 100 * (1 - value), "free"),
)


def cost(key: str) -> Cost:
    return next(found for found in COSTS if found.key == key)


def loss(key: str) -> Loss:
    return next(found for found in LOSSES if found.key == key)


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (x, y), both to be small, whether nothing dominates it. Equal points do not dominate each other."""
    return [not any((a <= x and b <= y) and (a < x or b < y) for a, b in points) for x, y in points]


def loss_of(record: BenchRecord, setting: str, wanted: Loss) -> tuple[float, tuple[float, float] | None] | None:
    """A setting's loss and the interval of it, ``None`` where quality was not judged."""
    quality = record.quality_of(setting)
    value = quality.figures.get(wanted.figure) if quality is not None and quality.status == "ok" else None
    if quality is None or value is None or wanted.unless in quality.figures:
        return None
    bounds: Mapping[str, Any] = quality.figures.get("ci95") or {}
    interval = bounds.get(wanted.figure)
    ends = sorted(wanted.of(bound) for bound in interval) if interval else None
    return wanted.of(value), (ends[0], ends[1]) if ends else None


def points(record: BenchRecord, wanted_cost: Cost, wanted_loss: Loss, case: Case | None = None) -> list[Point]:
    """Every setting with both figures at ``case`` (the first unless named), by cost. The reference itself is shown too."""
    found = []
    for row in _paying(record, wanted_cost, case):
        x, y = wanted_cost.read(row), loss_of(record, row.setting, wanted_loss)
        if x is not None and y is not None:
            found.append((record.setting(row.setting).name, x, *y))
    found.sort(key=lambda item: (item[1], item[2], item[0]))
    marked = frontier([(x, max(y, wanted_loss.rounding) if wanted_loss.rounding else y) for _, x, y, _ in found])
    return [Point(name, x, y, interval, on) for (name, x, y, interval), on in zip(found, marked, strict=True)]


def _paying(record: BenchRecord, wanted: Cost, case: Case | None) -> list[Row]:
    """The rows to read a cost from: those at the case or, where all cases cost the same, the first of each setting that tells."""
    ran = [row for row in record.rows if row.status == "ok" and wanted.read(row) is not None]
    if wanted.by_case:
        return [row for row in ran if row.case == (case or record.workload.cases[0])]
    return list({row.setting: row for row in reversed(ran)}.values())


def offered(record: BenchRecord) -> tuple[list[Cost], list[Loss]]:
    """The costs and losses that two settings or more have at some case."""
    judged = {found.key: {row.setting for row in record.rows if loss_of(record, row.setting, found) is not None} for found in LOSSES}

    def is_filled(wanted: Cost) -> bool:
        return any(sum(row.status == "ok" and wanted.read(row) is not None for row in record.rows_at(case)) > 1 for case in record.workload.cases)

    return [_called(found, record) for found in COSTS if is_filled(found)], [found for found in LOSSES if len(judged[found.key]) > 1]


def _called(wanted: Cost, record: BenchRecord) -> Cost:
    """The cost by its name in this record: what is a prefill elsewhere is all that some models do."""
    kinds = {is_forward(row) for row in record.rows if row.status == "ok"} if wanted.key == "prefill" else set()
    return replace(wanted, title=f"{'forward' if kinds == {True} else 'prefill or forward'}, median (ms)") if True in kinds else wanted


def views(record: BenchRecord) -> list[tuple[Cost, Loss]]:
    """The plots shown at first: size, memory of the device and speed, each against the first loss there is."""
    costs, losses = offered(record)
    named = {item.key: item for item in costs}
    wanted = [
        next((key for key in ("file", "weights") if key in named), None),
        next((key for key in ("decode", "prefill") if key in named), None),
        "vram" if "vram" in named else None,
    ]
    return [(named[key], losses[0]) for key in wanted if key is not None] if losses else []


def plot_data(record: BenchRecord) -> dict[str, Any]:
    """What the page's script draws from, as plain JSON: per setting the losses ``[value, low, high]`` and the costs per case."""
    costs, losses = offered(record)
    settings = []
    for setting in record.settings:
        rows = {row.case: row for row in record.rows if row.setting == setting.id and row.status == "ok"}
        judged = {item.key: loss_of(record, setting.id, item) for item in losses}
        if rows and any(judged.values()):
            settings.append(
                {
                    "name": setting.name,
                    "losses": {key: [found[0], *(found[1] or (None, None))] for key, found in judged.items() if found is not None},
                    "costs": {item.key: [item.read(rows[case]) if case in rows else None for case in record.workload.cases] for item in costs},
                }
            )
    return {
        "cases": [case.name for case in record.workload.cases],
        "costs": [{"key": item.key, "title": item.title, "byCase": item.by_case} for item in costs],
        "losses": [{"key": item.key, "title": item.title, "scale": item.scale, "rounding": item.rounding} for item in losses],
        "settings": settings,
    }
