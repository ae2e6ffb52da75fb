"""What a setting takes of its accelerator at one case, after the timed rounds and in processes of its own: figures of memory do not disturb those of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from qlora_tools.bench.accelerator import Accelerator
from qlora_tools.bench.attempts import measure_context, measure_lean
from qlora_tools.bench.device import LimitSearch, figure, kept_within, smallest_limit, summarise_device
from qlora_tools.bench.journal import Journal
from qlora_tools.bench.record import Attempt, Row, Setting, Workload
from qlora_tools.bench.rows import counted

_MOST_TRIES = 3
_SAYS_NO_LIMIT = "memory_limit"


@dataclass
class DeviceRounds:
    """Measures rows' device memory; contexts are measured once per engine and device."""

    workload: Workload
    threads: int
    timeout_s: float
    limits: bool
    contexts: int
    journal: Journal
    _contexts: dict[tuple[str, str], list[Attempt]] = field(default_factory=dict)

    def measured(self, setting: Setting, row: Row, accelerator: Accelerator) -> Row:
        """The row with its ``device_memory``."""
        lean = self._lean(setting, row, accelerator)
        limit = self._limit(setting, row, accelerator, lean) if self.limits else None
        memory, unknown = summarise_device(counted(row.attempts), lean, self._context(setting, accelerator), row.weights_bytes, limit=limit)
        return replace(row, device_memory=memory, unknown={**row.unknown, **unknown})

    def _lean(self, setting: Setting, row: Row, accelerator: Accelerator) -> list[Attempt]:
        """Attempts until one was not disturbed."""
        found: list[Attempt] = []
        while len(found) < _MOST_TRIES:
            found.append(self._once(["device-memory", setting.id, row.case, len(found)], setting, row, accelerator))
            if found[-1].status != "ok" or figure(found[-1].device).reason is None:
                break
        return found

    def _once(self, key: Sequence[Any], setting: Setting, row: Row, accelerator: Accelerator, limit_bytes: int | None = None) -> Attempt:
        """One attempt with an arena that extends by just what is asked for, from the journal if it is there."""

        def measure() -> Attempt:
            return measure_lean(
                setting, self.workload, row.case, threads=self.threads, timeout_s=self.timeout_s, accelerator=accelerator, limit_bytes=limit_bytes
            )

        return self.journal.once(key, Attempt, measure)

    def _context(self, setting: Setting, accelerator: Accelerator) -> list[Attempt]:
        key = (setting.engine, accelerator.uuid)
        if key not in self._contexts:
            self._contexts[key] = [
                self.journal.once(
                    ["context", *key, number],
                    Attempt,
                    lambda: measure_context(setting, threads=self.threads, timeout_s=self.timeout_s, accelerator=accelerator),
                )
                for number in range(self.contexts)
            ]
        return self._contexts[key]

    def _limit(self, setting: Setting, row: Row, accelerator: Accelerator, lean: Sequence[Attempt]) -> LimitSearch:
        most_bytes = accelerator.facts.get("memory_bytes")
        if most_bytes is None or row.weights_bytes is None or lean[-1].status != "ok":
            return LimitSearch(None, (), "where to look is not known: the device, the weights or the run without a limit does not tell its size")

        numbers = count()

        def attempt(limit_bytes: int) -> Attempt:
            return self._once(["limit", setting.id, row.case, limit_bytes, next(numbers)], setting, row, accelerator, limit_bytes)

        first = attempt(most_bytes)
        if first.status != "ok":
            refused = _SAYS_NO_LIMIT in (first.reason or "")
            return LimitSearch(None, (), "the memory of this runtime cannot be limited" if refused else f"with all of the device as its limit: {first.reason}")

        def runs(limit_bytes: int) -> bool:
            found = attempt(limit_bytes)
            return found.status == "ok" and kept_within(found.device["arena"], limit_bytes)

        return smallest_limit(runs, row.weights_bytes, most_bytes=most_bytes)
