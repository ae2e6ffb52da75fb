"""Five numbers out of the readings of many processes, and the identities that must hold between them.

A number that cannot be given is ``None`` and its reason stands beside it. The peak of several rounds is the largest; rounds in which somebody
else used the device count for nothing. An arena never shrinks while it runs, so one reading after the last run is the process's peak.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qlora_tools.bench.device.bracket import Figure, figure
from qlora_tools.bench.device.limit import LimitSearch
from qlora_tools.bench.record import Attempt, DeviceMemory, at_most, same

_WITHIN = 0.05


def summarise_device(
    deployed: Sequence[Attempt],
    lean: Sequence[Attempt],
    context: Sequence[Attempt],
    weights_bytes: int | None,
    *,
    limit: LimitSearch | None = None,
) -> tuple[DeviceMemory, dict[str, str]]:
    """(the numbers, name -> why one is missing).

    ``deployed``: attempts under the runtime's defaults; ``lean``: with an arena that extends by just what is asked for, whose
    ``device["arena"]`` is what ``arena.py`` recorded; ``context``: processes that hold one operator.
    """
    unknown: dict[str, str] = {}

    def known(name: str, value: int | None, reason: str | None) -> int | None:
        if value is None:
            unknown[f"device_memory.{name}"] = reason or "it was not measured"
        return value

    deployed_figures, lean_figures, context_figures = _of_attempts(deployed), _of_attempts(lean), _of_attempts(context)
    memory = DeviceMemory(
        weights_bytes=known("weights_bytes", weights_bytes, "the engine does not tell"),
        arena_peak_bytes=known("arena_peak_bytes", *_arena(lean)),
        context_bytes=known("context_bytes", *_middle(context_figures)),
        process_peak_bytes=known("process_peak_bytes", *_largest(lean_figures)),
        as_deployed_peak_bytes=known("as_deployed_peak_bytes", *_largest(deployed_figures)),
        smallest_limit_bytes=known("smallest_limit_bytes", *((None, "it was not asked for") if limit is None else (limit.bytes, limit.reason))),
        method=_method([*deployed_figures, *lean_figures, *context_figures]),
        residual_bytes=_residual([*deployed_figures, *lean_figures, *context_figures]),
    )
    return _with_identities(memory), unknown


def _with_identities(memory: DeviceMemory) -> DeviceMemory:
    parts = None if memory.arena_peak_bytes is None or memory.context_bytes is None else memory.arena_peak_bytes + memory.context_bytes
    identities = (
        at_most("weights <= arena", memory.weights_bytes, memory.arena_peak_bytes),
        same("process = arena + context (and what libraries take for themselves)", memory.process_peak_bytes, parts, _WITHIN),
        at_most("process <= as deployed", memory.process_peak_bytes, memory.as_deployed_peak_bytes, _WITHIN),
    )
    return replace(memory, identities=identities)


def _of_attempts(attempts: Sequence[Attempt]) -> list[Figure]:
    return [figure(attempt.device) if attempt.status == "ok" else Figure(None, reason=attempt.reason) for attempt in attempts]


def _largest(figures: Sequence[Figure]) -> tuple[int | None, str | None]:
    found = [one.bytes for one in figures if one.bytes is not None]
    return (max(found), None) if found else (None, _first_reason(figures))


def _middle(figures: Sequence[Figure]) -> tuple[int | None, str | None]:
    found = [one.bytes for one in figures if one.bytes is not None]
    return (round(statistics.median(found)), None) if found else (None, _first_reason(figures))


def _arena(lean: Sequence[Attempt]) -> tuple[int | None, str | None]:
    told: list[Mapping[str, Any]] = [attempt.device.get("arena") or {} for attempt in lean if attempt.status == "ok"]
    found = [arena["peak_bytes"] for arena in told if arena.get("peak_bytes") is not None]
    if found:
        return max(found), None
    reasons = [str(arena["reason"]) for arena in told if arena.get("reason")] or [str(attempt.reason) for attempt in lean if attempt.status != "ok"]
    return None, reasons[0] if reasons else None


def _first_reason(figures: Sequence[Figure]) -> str | None:
    return next((one.reason for one in figures if one.reason), None)


def _method(figures: Sequence[Figure]) -> str | None:
    """``process`` only where every figure is the driver's own."""
    methods = {one.method for one in figures if one.bytes is not None}
    return "bracket" if "bracket" in methods else "process" if methods else None


def _residual(figures: Sequence[Figure]) -> int | None:
    """The largest of those that count, by size."""
    return max((one.residual_bytes for one in figures if one.bytes is not None and one.residual_bytes is not None), key=abs, default=None)
