"""A benchmark that starts no process: rows and figures as a real one leaves them, made of seeded numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from qlora_tools.bench.record import Attempt, BenchRecord, Quality, Row
from qlora_tools.bench.rows import summarise_row
from qlora_tools.quality.corpus import Window
from qlora_tools.quality.divergence import divergence
from qlora_tools.quality.probe import quality_record
from tests.bench.bench_records import attempt

WINDOWS = [Window(np.arange(9, dtype=np.int64) % 7, 1) for _ in range(8)]
CORPUS, METHOD = {"name": "text", "sha256": "ab" * 32}, {"name": "disjoint windows of 9 tokens"}


def logits(name: str, noise: float):
    """Logits of 7 words at every position, seeded by the setting's name, nearer to the reference's the smaller the noise."""

    def of(ids_T):
        right = np.random.default_rng(1).normal(size=(len(ids_T), 7))
        return right + noise * np.random.default_rng(len(name)).normal(size=right.shape)

    return of


@dataclass
class StandIn:
    """Takes the place of ``run_bench``; ``calls`` holds what it was asked. ``step_s``: decode times by label, ``noise``: how far from the reference."""

    calls: list = field(default_factory=list)
    step_s: dict = field(default_factory=dict)
    noise: dict = field(default_factory=dict)
    interrupted: bool = False

    def __call__(self, settings, workload, **words):
        self.calls.append({"settings": list(settings), "workload": workload, **words})
        if self.interrupted:
            words["journal"].write_bytes(b"one line\n")
            raise KeyboardInterrupt
        rows = [self._row(setting, case) for case in workload.cases for setting in settings]
        quality = words.get("quality")
        return BenchRecord(
            created="2026-01-02T03:04:05Z",
            command=tuple(words["command"]),
            machine={"cpu": "none"},
            versions={"torch": "2"},
            workload=replace(workload, ids=None),
            rounds=words["rounds"],
            threads=words["threads"],
            settings=tuple(settings),
            rows=tuple(rows),
            quality=tuple(self._quality(setting, quality.reference) for setting in settings) if quality else (),
            title=words["title"],
        )

    def _row(self, setting, case):
        if setting.unavailable is not None:
            return Row(setting.id, case, "error", setting.unavailable, (Attempt(0, "error", setting.unavailable, 0.0, None, None),))
        return summarise_row(setting, case, [attempt(number, self.step_s.get(setting.name, 2e-3), steps=8, repeats=2) for number in range(3)])

    def _quality(self, setting, reference):
        if setting.unavailable is not None:
            return Quality(setting.id, reference.id, "error", f"not judged: {setting.unavailable}")
        noise = 0.0 if setting.id == reference.id else self.noise.get(setting.name, 0.1)
        found = divergence(logits(reference.id, 0.0), logits(setting.id, noise), WINDOWS)
        return Quality(setting.id, reference.id, "ok", None, quality_record(found, corpus=CORPUS, method=METHOD))
