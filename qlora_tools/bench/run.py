"""Run every setting at every case, round by round, each time in a fresh process, and sum up.

What a worker did wrong becomes its row's reason and touches no other row. After the timed rounds, in processes of their own, come the memory of
accelerators and quality, once per setting: they do not disturb the rounds, and what judging does to memory is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qlora_tools.bench.accelerator import Accelerators, Instruments
from qlora_tools.bench.attempts import QualityTask, judge_once, measure_once, without_folders
from qlora_tools.bench.device.energy import LEAST_S
from qlora_tools.bench.device_rounds import DeviceRounds
from qlora_tools.bench.journal import Journal, digest, plan_of
from qlora_tools.bench.machine import describe_machine, lasting_facts, versions
from qlora_tools.bench.pairs import FEWEST_ROUNDS, latency_comparisons
from qlora_tools.bench.record import Attempt, BenchRecord, Case, Quality, Row, Setting, Workload
from qlora_tools.bench.rounds import impossible, run_rounds
from qlora_tools.bench.rows import identities_of, summarise_row, weight_files
from qlora_tools.errors import UsageError
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress, Task

STALL_LIMIT = 0.10


def run_bench(
    settings: Sequence[Setting],
    workload: Workload,
    *,
    rounds: int = FEWEST_ROUNDS,
    threads: int = 1,
    timeout_s: float = 600.0,
    quality: QualityTask | None = None,
    limits: bool = False,
    contexts: int = 5,
    energy_s: float = LEAST_S,
    stall_limit: float = STALL_LIMIT,
    journal: Path | None = None,
    instruments: Instruments | None = None,
    accelerators: Accelerators | None = None,
    command: Sequence[str] = (),
    title: str = "Benchmark",
    progress: Progress = SILENT,
) -> BenchRecord:
    """Measure ``settings``; times are compared to the first one's.

    ``limits``: also look for the least memory of an accelerator under which each case runs, which takes many processes. ``contexts``: empty processes per
    engine and accelerator. ``energy_s``: how long each case works on in the first round so that an accelerator's counter of energy is worth reading; 0 leaves
    it out. ``stall_limit``: the share of an attempt in which tasks may wait for a CPU before it is taken once more. ``journal``: a file that keeps what is finished; the same benchmark
    called again goes on from it. It is left there: who has stored the record removes it. ``accelerators``: of the settings and the reference, where
    they were looked at before; opened now without.

    Raises:
        UsageError: no settings, two with one id, or a count below 1. IncompatibleError: the journal is of another benchmark.
    """
    _check(settings, rounds, threads, timeout_s, stall_limit)
    accelerators = accelerators or Accelerators([*settings, *([quality.reference] if quality else [])], instruments or Instruments())
    plan = plan_of(
        settings,
        quality.reference if quality else None,
        workload=workload,
        threads=threads,
        timeout_s=timeout_s,
        stall_limit=stall_limit,
        quality=digest(quality),
        versions=versions(),
        machine={**lasting_facts(), "gpus": [facts.get("uuid") for facts in accelerators.all_facts()]},
    )
    run = _Run(settings, workload, rounds, threads, timeout_s, stall_limit, energy_s, limits, contexts, quality, accelerators, Journal(journal, plan))
    with closing(run.journal), progress.task("bench", run.total, "runs") as task:
        rows = run.rows(task)
        judged = run.judged(rows, task)
    return BenchRecord(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=tuple(command),
        machine={**describe_machine(), **accelerators.facts()},
        versions=versions(),
        workload=workload,
        rounds=rounds,
        threads=threads,
        settings=tuple(without_folders(setting) for setting in settings),
        rows=rows,
        quality=judged,
        comparisons=tuple(latency_comparisons(rows, settings[0].id)),
        stall_limit=stall_limit,
        notes=_notes(rows, stall_limit, run.journal.recalled),
        title=title,
    )


@dataclass(frozen=True)
class _Run:
    settings: Sequence[Setting]
    workload: Workload
    rounds: int
    threads: int
    timeout_s: float
    stall_limit: float
    energy_s: float
    limits: bool
    contexts: int
    quality: QualityTask | None
    accelerators: Accelerators
    journal: Journal

    @property
    def total(self) -> int:
        """Processes or small groups of them, as far as they can be counted before."""
        on_device = sum(self.accelerators.of(setting) is not None for setting in self.settings)
        return len(self.workload.cases) * (self.rounds * len(self.settings) + on_device) + (len(self.settings) if self.quality else 0)

    def rows(self, task: Task) -> tuple[Row, ...]:
        attempts = run_rounds(self.settings, self.workload.cases, self.rounds, stall_limit=self.stall_limit, attempt=self._attempt, task=task)
        device = DeviceRounds(self.workload, self.threads, self.timeout_s, self.limits, self.contexts, self.journal)
        rows = []
        for case in self.workload.cases:
            for setting in self.settings:
                row, accelerator = summarise_row(setting, case, attempts[setting.id, case]), self.accelerators.of(setting)
                if accelerator is not None:
                    row = device.measured(setting, row, accelerator) if row.status == "ok" else row
                    task.advance(label=f"memory of {setting.name}")
                rows.append(row)
        return tuple(rows)

    def judged(self, rows: Sequence[Row], task: Task) -> tuple[Quality, ...]:
        """Quality of every setting; one that never ran is not tried again."""
        found = []
        for setting in self.settings if self.quality else ():
            own = [row for row in rows if row.setting == setting.id]
            found.append(self._judged(setting, next((row for row in own if row.status == "ok"), own[0])))
            task.advance(label=f"quality of {setting.name}")
        return tuple(found)

    def _judged(self, setting: Setting, row: Row) -> Quality:
        assert self.quality is not None
        task, of = self.quality, self.accelerators.of
        if row.status != "ok":
            return Quality(setting.id, task.reference.id, row.status, f"not judged: {row.reason}")
        missing = self.accelerators.missing(task.reference) or task.reference.unavailable
        if missing is not None:
            return Quality(setting.id, task.reference.id, "unsupported", f"not judged: the reference cannot run: {missing}")
        return self.journal.once(
            ["quality", setting.id],
            Quality,
            lambda: judge_once(setting, task, threads=self.threads, accelerator=of(setting), reference_accelerator=of(task.reference)),
        )

    def _attempt(self, setting: Setting, case: Case, number: int, is_extra: bool) -> Attempt:
        if setting.unavailable is not None:
            return impossible(setting.unavailable, "error")
        missing = self.accelerators.missing(setting)
        if missing is not None:
            return impossible(missing, "unsupported")

        def measure() -> Attempt:
            _read_ahead(setting)
            accelerator = self.accelerators.of(setting)
            energy_s = self.energy_s if number == 0 else 0.0
            return measure_once(
                setting, self.workload, case, number, threads=self.threads, timeout_s=self.timeout_s, accelerator=accelerator, energy_s=energy_s
            )

        return self.journal.once(["latency", setting.id, case, number, is_extra], Attempt, measure)


def _read_ahead(setting: Setting) -> None:
    """Bring the files into the page cache, so that load times compare and the first round is not the disk's."""
    for file in weight_files(setting.path):
        with file.open("rb") as stream:
            while stream.read(8 << 20):
                pass


def _notes(rows: Sequence[Row], stall_limit: float, recalled: int) -> tuple[str, ...]:
    notes = []
    again = sum(len(row.attempts) - len({attempt.round for attempt in row.attempts}) for row in rows)
    if again:
        notes.append(f"{again} {'attempt was' if again == 1 else 'attempts were'} made again since the machine was busy; both are kept, and the calmer counts.")
    contended = [row.setting for row in rows if (row.cpu_stall or 0) > stall_limit]
    if contended:
        notes.append(
            f"The machine was busy: tasks waited for a CPU more than {stall_limit:.0%} of the time beside {shortened(sorted(set(contended)))}. "
            "Trust ratios, not absolute times."
        )
    unsteady = [row.setting for row in rows if any(attempt.is_steady is False for attempt in row.attempts)]
    if unsteady:
        notes.append(f"Warm-up did not settle within 5 % for {shortened(sorted(set(unsteady)))}.")
    broken = [f"{row.setting} ({row.case.name}): {found.name}" for row in rows for found in identities_of(row) if found.held is False]
    if broken:
        notes.append(f"Figures of memory contradict each other: {shortened(broken)}.")
    if recalled:
        notes.append(f"The benchmark was interrupted and continued: {recalled} of its processes ran before that.")
    return tuple(notes)


def _check(settings: Sequence[Setting], rounds: int, threads: int, timeout_s: float, stall_limit: float) -> None:
    ids = [setting.id for setting in settings]
    if not ids:
        raise UsageError("there is no setting to measure")
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise UsageError(f"two settings are called {shortened(twice)}", hint="give each its own name")
    for name, value in (("rounds", rounds), ("threads", threads), ("timeout_s", timeout_s), ("stall_limit", stall_limit)):
        if value <= 0:
            raise UsageError(f"{name} is {value}, expected more than 0")
