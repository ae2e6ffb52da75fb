"""Run every setting, round by round, each time in a fresh process, and sum up.

Settings are interleaved: a round measures each once, starting one further along each time, so that a busy minute of the
machine falls on all of them. What a worker did wrong becomes its row's reason and touches no other row.
Quality is judged once per setting, in its own process, after the timed rounds; it does not disturb them and
what it does to memory is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_tools.bench.launch import run_worker
from qlora_tools.bench.machine import describe_machine, versions
from qlora_tools.bench.record import Attempt, BenchRecord, Case, Memory, Quality, Row, Setting, Status, Workload
from qlora_tools.bench.samples import summarise
from qlora_tools.bench.worker import LATENCY
from qlora_tools.errors import UsageError
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress

_WEIGHT_SUFFIXES = frozenset({".onnx", ".data", ".onnx_data", ".safetensors"})
_WORST_FIRST: tuple[Status, ...] = ("oom", "timeout", "error", "unsupported")
_CONTENDED = 0.10


@dataclass(frozen=True)
class QualityTask:
    """``probe`` is the import path of ``probe(engine, reference, options) -> dict``; ``reference`` is the setting to judge against, in the list or not."""

    probe: str
    reference: Setting
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0


def run_bench(
    settings: Sequence[Setting],
    workload: Workload,
    *,
    rounds: int = 3,
    threads: int = 1,
    timeout_s: float = 600.0,
    quality: QualityTask | None = None,
    command: Sequence[str] = (),
    title: str = "Benchmark",
    progress: Progress = SILENT,
) -> BenchRecord:
    """Measure ``settings``.

    Raises:
        UsageError: no settings, two with one id, or a count below 1.
    """
    _check(settings, rounds, threads, timeout_s)
    attempts: dict[tuple[str, Case], list[Attempt]] = {(setting.id, case): [] for case in workload.cases for setting in settings}
    with progress.task("bench", rounds * len(attempts) + (len(settings) if quality else 0), "runs") as task:
        for number in range(rounds):
            shift = number % len(settings)
            for case in workload.cases:
                for setting in [*settings[shift:], *settings[:shift]]:
                    _read_ahead(setting)
                    attempts[setting.id, case].append(measure_once(setting, workload, case, number, threads=threads, timeout_s=timeout_s))
                    task.advance(label=setting.name)
        rows = tuple(summarise_row(setting, case, attempts[setting.id, case]) for case in workload.cases for setting in settings)
        judged = []
        if quality is not None:
            for setting in settings:
                own = [row for row in rows if row.setting == setting.id]
                judged.append(judge_once(setting, quality, next((row for row in own if row.status == "ok"), own[0]), threads=threads))
                task.advance(label=f"quality of {setting.name}")
    return BenchRecord(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=tuple(command),
        machine=describe_machine(),
        versions=versions(),
        workload=workload,
        rounds=rounds,
        threads=threads,
        settings=tuple(_without_folders(setting) for setting in settings),
        rows=rows,
        quality=tuple(judged),
        notes=_notes(rows),
        title=title,
    )


def measure_once(setting: Setting, workload: Workload, case: Case, number: int, *, threads: int, timeout_s: float) -> Attempt:
    """One worker process for one setting at one case."""
    if setting.unavailable is not None:
        return Attempt(number, "error", setting.unavailable, 0.0, None, None)
    job = {"job": LATENCY, "engine": setting.engine, "options": dict(setting.options), "threads": setting.threads or threads, "workload": workload.job(case)}
    outcome = run_worker(job, timeout_s=timeout_s, environment=setting.environment)
    runs = outcome.get("runs", [])
    return Attempt(
        round=number,
        status=outcome["status"],
        reason=_without_folder_names(outcome["reason"], setting),
        wall_s=outcome["wall_s"],
        cpu_s=outcome["cpu_s"],
        cpu_stall=outcome["cpu_stall"],
        import_s=outcome.get("import_s"),
        load_s=outcome.get("load_s"),
        is_steady=outcome.get("is_steady"),
        warmup_s=tuple(outcome.get("warmup_s", ())),
        prefill_s=tuple(run["prefill_s"] for run in runs),
        ttft_s=tuple(run["ttft_s"] for run in runs),
        decode_s=tuple(tuple(run["decode_s"]) for run in runs),
        total_s=tuple(run["total_s"] for run in runs),
        memory=outcome.get("memory", {}),
        info=outcome.get("info", {}),
    )


def judge_once(setting: Setting, task: QualityTask, row: Row, *, threads: int) -> Quality:
    """One probe process for one setting; a setting that never ran is not tried again."""
    if row.status != "ok":
        return Quality(setting.id, task.reference.id, row.status, f"not judged: {row.reason}")
    job = {
        "job": task.probe,
        "engine": setting.engine,
        "options": dict(setting.options),
        "threads": setting.threads or threads,
        "reference": {"engine": task.reference.engine, "options": dict(task.reference.options)},
        "probe_options": dict(task.options),
    }
    outcome = run_worker(job, timeout_s=task.timeout_s, environment=setting.environment)
    reason = _without_folder_names(_without_folder_names(outcome["reason"], setting), task.reference)
    return Quality(setting.id, task.reference.id, outcome["status"], reason, outcome.get("figures", {}))


def summarise_row(setting: Setting, case: Case, attempts: Sequence[Attempt]) -> Row:
    """Figures from the attempts that went well; a row without any keeps the worst one's reason."""
    good = [attempt for attempt in attempts if attempt.status == "ok"]
    file_bytes = weight_file_bytes(setting.path)
    unknown = {} if file_bytes is not None else {"file_bytes": "the setting names no path" if setting.path is None else "the path holds no weights"}
    if not good:
        worst = min(attempts, key=lambda attempt: _WORST_FIRST.index(attempt.status))
        return Row(setting.id, case, worst.status, worst.reason, tuple(attempts), file_bytes=file_bytes, unknown=unknown)
    weights_bytes = good[0].info.get("weights_bytes")
    if weights_bytes is None:
        unknown["weights_bytes"] = "the engine does not tell"
    decode = summarise([run for attempt in good for run in attempt.decode_s])
    prefill = summarise([attempt.prefill_s for attempt in good])
    steps = [sum(run) / len(run) for attempt in good for run in attempt.decode_s if run]
    tpot = summarise([[step] for step in steps]).p50_s
    memory, missing = summarise_memory(good)
    failed = [attempt for attempt in attempts if attempt.status != "ok"]
    stalls = [attempt.cpu_stall for attempt in good if attempt.cpu_stall is not None]
    return Row(
        setting=setting.id,
        case=case,
        status="ok",
        reason=f"{len(failed)} of {len(attempts)} rounds failed: {failed[0].reason}" if failed else None,
        attempts=tuple(attempts),
        file_bytes=file_bytes,
        weights_bytes=weights_bytes,
        load=summarise([[attempt.load_s] for attempt in good if attempt.load_s is not None]),
        prefill=prefill,
        ttft=summarise([attempt.ttft_s for attempt in good]),
        decode=decode,
        tpot_s=tpot,
        prefill_tokens_per_s=case.batch * case.prompt_tokens / prefill.p50_s if prefill.p50_s else None,
        decode_tokens_per_s=case.batch / tpot if tpot else None,
        memory=memory,
        cpu_stall=max(stalls) if stalls else None,
        unknown={
            **unknown,
            **missing,
            **({} if tpot else {"tpot_s": "one new token has no decode step", "decode_tokens_per_s": "one new token has no decode step"}),
        },
    )


def summarise_memory(attempts: Sequence[Attempt]) -> tuple[Memory, dict[str, str]]:
    """The largest readings of the rounds, and why some are missing."""

    def largest(phase: str, name: str) -> int | None:
        found = [attempt.memory[phase][name] for attempt in attempts if attempt.memory.get(phase, {}).get(name) is not None]
        return max(found) if found else None

    was_reset = all(attempt.memory.get("peak_was_reset") for attempt in attempts)
    load_peak, late_peak = largest("loaded", "peak_bytes"), largest("steady", "peak_bytes")
    peaks = [peak for peak in (load_peak, late_peak) if peak is not None]
    memory = Memory(
        peak_bytes=max(peaks) if peaks else None,
        load_peak_bytes=load_peak,
        steady_peak_bytes=late_peak if was_reset else None,
        runtime_bytes=largest("imported", "rss_bytes"),
        anon_bytes=largest("steady", "anon_bytes"),
        file_bytes=largest("steady", "file_bytes"),
        pss_bytes=largest("steady", "pss_bytes"),
    )
    reasons = {} if peaks else {"memory": "this system does not tell a process its memory"}
    if peaks and not was_reset:
        reasons["memory.steady_peak_bytes"] = "the kernel does not let the peak be reset, so it includes loading"
    return memory, reasons


def weight_files(path: str | None) -> list[Path]:
    """The files that hold a model: a file itself, or a folder's graphs and weights."""
    if path is None:
        return []
    root = Path(path)
    return [root] if root.is_file() else sorted(file for file in root.glob("*") if file.suffix in _WEIGHT_SUFFIXES and file.is_file())


def weight_file_bytes(path: str | None) -> int | None:
    """Bytes on disk of :func:`weight_files`, ``None`` without any."""
    files = weight_files(path)
    return sum(file.stat().st_size for file in files) if files else None


def _read_ahead(setting: Setting) -> None:
    """Bring the files into the page cache, so that load times compare and the first round is not the disk's."""
    for file in weight_files(setting.path):
        with file.open("rb") as stream:
            while stream.read(8 << 20):
                pass


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    notes = []
    contended = [row.setting for row in rows if (row.cpu_stall or 0) > _CONTENDED]
    if contended:
        notes.append(
            f"The machine was busy: tasks waited for a CPU more than {_CONTENDED:.0%} of the time beside {shortened(sorted(set(contended)))}. Trust ratios, not absolute times."
        )
    unsteady = [row.setting for row in rows if any(attempt.is_steady is False for attempt in row.attempts)]
    if unsteady:
        notes.append(f"Warm-up did not settle within 5 % for {shortened(sorted(set(unsteady)))}.")
    return tuple(notes)


def _without_folders(setting: Setting) -> Setting:
    """Paths by their last part: a record may be published."""

    def shorten(value: Any) -> Any:
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    options = {name: shorten(value) for name, value in setting.options.items()}
    return replace(setting, options=options, path=shorten(setting.path), environment={name: shorten(value) for name, value in setting.environment.items()})


def _without_folder_names(reason: str | None, setting: Setting) -> str | None:
    """A worker's message with the setting's own paths by their last part."""
    paths = {value for value in (*setting.options.values(), setting.path) if isinstance(value, str) and Path(value).is_absolute()}
    for path in sorted(paths, key=len, reverse=True):
        reason = reason and reason.replace(path, Path(path).name)
    return reason


def _check(settings: Sequence[Setting], rounds: int, threads: int, timeout_s: float) -> None:
    ids = [setting.id for setting in settings]
    if not ids:
        raise UsageError("there is no setting to measure")
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise UsageError(f"two settings are called {shortened(twice)}", hint="give each its own name")
    for name, value in (("rounds", rounds), ("threads", threads), ("timeout_s", timeout_s)):
        if value <= 0:
            raise UsageError(f"{name} is {value}, expected more than 0")
