"""Warm up until steady, then repeat: the loop around everything that is timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_STEADY_SPREAD = 0.05
_STEADY_RUNS = 3
_MOST_RUNS = 1_000_000  # time ends the loop, this only where a clock stands still


def time_repeats(once: Callable[[], Mapping[str, Any]], workload: Mapping[str, Any], read: Callable[[], Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """``once`` does the work and returns its times, ``total_s`` among them; ``workload`` says how often (``warmup``, ``most_warmup``, ``repeats``).

    Returns ``warmup_s``, ``is_steady`` and ``runs``. With ``read``, a look at the accelerator, also ``energy``: the looks ``before`` and ``after``, and the
    ``seconds`` and ``runs`` between them. Counters of energy are coarse, so further runs follow the timed ones until ``workload["energy_s"]`` are over.
    """
    warmup_s: list[float] = []
    while len(warmup_s) < workload["warmup"] or (len(warmup_s) < workload["most_warmup"] and not is_steady(warmup_s)):
        warmup_s.append(once()["total_s"])
    gc.collect()
    gc.disable()
    try:
        before, started = read() if read else {}, time.perf_counter()
        runs = [dict(once()) for _ in range(workload["repeats"])]
        result: dict[str, Any] = {"warmup_s": warmup_s, "is_steady": is_steady(warmup_s), "runs": runs}
        if read:
            count = len(runs)
            while before.get("energy_mj") is not None and time.perf_counter() - started < workload.get("energy_s", 0) and count < _MOST_RUNS:
                once()
                count += 1
            result["energy"] = {"before": dict(before), "after": dict(read()), "seconds": time.perf_counter() - started, "runs": count}
    finally:
        gc.enable()
    return result


def is_steady(total_s: Sequence[float]) -> bool:
    """True when the last three runs lie within 5 % of each other."""
    last = total_s[-_STEADY_RUNS:]
    return len(last) == _STEADY_RUNS and max(last) - min(last) <= _STEADY_SPREAD * min(last)
