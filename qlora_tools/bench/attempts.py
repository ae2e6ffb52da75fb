"""What one worker process is asked, and what becomes of its answer. One function per job; nothing here raises for what a worker did wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_tools.bench.accelerator import Accelerator, device_of
from qlora_tools.bench.device.energy import LEAST_S, energy_j
from qlora_tools.bench.launch import run_worker
from qlora_tools.bench.plain import to_plain
from qlora_tools.bench.record import Attempt, Case, Quality, Setting, Workload
from qlora_tools.bench.worker import CONTEXT, DEVICE_MEMORY, LATENCY
from qlora_tools.errors import QltError


@dataclass(frozen=True)
class QualityTask:
    """``probe`` is the import path of ``probe(engine, reference, options) -> dict``; ``reference`` is the setting to judge against, in the list or not."""

    probe: str
    reference: Setting
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 3600.0


def measure_once(
    setting: Setting,
    workload: Workload,
    case: Case,
    number: int,
    *,
    threads: int,
    timeout_s: float,
    accelerator: Accelerator | None = None,
    energy_s: float = 0.0,
) -> Attempt:
    """Time one setting at one case. On an accelerator the work goes on for ``energy_s``, since counters of energy are coarse."""
    job = {"job": LATENCY, **_asked(setting, threads, accelerator, memory="deployed"), "workload": workload.job(case)}
    if accelerator is not None and not accelerator.is_shared:
        job["workload"] |= {"energy_s": energy_s}
    outcome, device = _run(setting, job, timeout_s, accelerator)
    joules = None
    if accelerator is not None and outcome["status"] == "ok":
        joules, reason = _energy_per_token(outcome, case, accelerator, energy_s)
        device |= {} if reason is None else {"energy_reason": reason}
    return _attempt(number, outcome, setting, device, joules)


def measure_lean(
    setting: Setting, workload: Workload, case: Case, *, threads: int, timeout_s: float, accelerator: Accelerator, limit_bytes: int | None = None
) -> Attempt:
    """What the case takes where the runtime's allocator grows by just what is asked for; under ``limit_bytes`` of it, if given."""
    job = {"job": DEVICE_MEMORY, **_asked(setting, threads, accelerator, memory="lean"), "workload": workload.job(case), "arena": accelerator.instruments.arena}
    if limit_bytes is not None:
        job["options"] |= {"memory_limit": limit_bytes}
    outcome, device = _run(setting, job, timeout_s, accelerator)
    return _attempt(0, outcome, setting, {**device, "arena": outcome["arena"]} if "arena" in outcome else device)


def measure_context(setting: Setting, *, threads: int, timeout_s: float, accelerator: Accelerator) -> Attempt:
    """What the setting's runtime takes of the device before any model is there."""
    job = {"job": CONTEXT, **_asked(setting, threads, accelerator), "context": accelerator.instruments.context}
    job["options"] |= {"device": "cuda"}  # an operator alone has no device of its own to choose
    outcome, device = _run(setting, job, timeout_s, accelerator)
    return _attempt(0, outcome, setting, device)


def judge_once(
    setting: Setting, task: QualityTask, *, threads: int, accelerator: Accelerator | None = None, reference_accelerator: Accelerator | None = None
) -> Quality:
    """One probe process for one setting."""
    reference = _asked(task.reference, threads, reference_accelerator)
    job = {
        "job": task.probe,
        **_asked(setting, threads, accelerator),
        "reference": {"engine": reference["engine"], "options": reference["options"]},
        "probe_options": dict(task.options),
    }
    environment = {**(reference_accelerator.environment() if reference_accelerator else {}), **_environment(setting, accelerator)}
    outcome = run_worker(job, timeout_s=task.timeout_s, environment=environment)
    reason = without_folder_names(without_folder_names(outcome["reason"], setting), task.reference)
    return Quality(setting.id, task.reference.id, outcome["status"], reason, to_plain(outcome.get("figures", {})))


def without_folders(setting: Setting) -> Setting:
    """Paths by their last part: a record may be published."""

    def shorten(value: Any) -> Any:
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    options = {name: shorten(value) for name, value in setting.options.items()}
    environment = {name: shorten(value) for name, value in setting.environment.items()}
    return replace(
        setting, options=options, path=shorten(setting.path), environment=environment, unavailable=without_folder_names(setting.unavailable, setting)
    )


def without_folder_names(reason: str | None, setting: Setting) -> str | None:
    """A worker's message with the setting's own paths by their last part."""
    paths = {value for value in (*setting.options.values(), setting.path) if isinstance(value, str) and Path(value).is_absolute()}
    for path in sorted(paths, key=len, reverse=True):
        reason = reason and reason.replace(path, Path(path).name)
    return reason


def _asked(setting: Setting, threads: int, accelerator: Accelerator | None, **more: Any) -> dict[str, Any]:
    """The part of a worker's configuration that every job has. ``more``: options for an engine on an accelerator alone."""
    options = dict(setting.options)
    found = {"engine": setting.engine, "options": options, "threads": setting.threads or threads}
    if accelerator is None:
        return found
    # the environment lets the worker see one device, whatever its number was
    options |= {**more, "device": "auto" if device_of(setting) == "auto" else "cuda"}
    return {**found, "meter": {"open": accelerator.instruments.meter, "device": accelerator.uuid}}


def _environment(setting: Setting, accelerator: Accelerator | None) -> dict[str, str]:
    return {**(accelerator.environment() if accelerator else {}), **setting.environment}


def _run(setting: Setting, job: Mapping[str, Any], timeout_s: float, accelerator: Accelerator | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the outcome, the readings of the accelerator before, during and after). One that is lost meanwhile costs an attempt, not the benchmark: without a
    reading before nothing is run; without one after, ``reason`` says why."""
    environment = _environment(setting, accelerator)
    if accelerator is None:
        return run_worker(job, timeout_s=timeout_s, environment=environment), {}
    try:
        device: dict[str, Any] = {"before": accelerator.read()}
    except QltError as error:
        return {"status": "error", "reason": f"the accelerator cannot be read: {error}", "wall_s": 0.0, "cpu_s": None, "cpu_stall": None}, {}
    outcome = run_worker(job, timeout_s=timeout_s, environment=environment)
    if outcome.get("device") is not None:
        device["during"] = outcome["device"]
    try:
        device["after"] = accelerator.read()
    except QltError as error:
        device["reason"] = f"the accelerator could not be read afterwards: {error}"
    return outcome, device


def _attempt(number: int, outcome: Mapping[str, Any], setting: Setting, device: Mapping[str, Any], joules: float | None = None) -> Attempt:
    runs = outcome.get("runs", [])
    return Attempt(
        round=number,
        status=outcome["status"],
        reason=without_folder_names(outcome["reason"], setting),
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
        device=device,
        energy_j=joules,
    )


def _energy_per_token(outcome: Mapping[str, Any], case: Case, accelerator: Accelerator, energy_s: float) -> tuple[float | None, str | None]:
    """(joules per new token, or per input of a model that looks once; why not)."""
    if accelerator.is_shared:
        return None, "other processes run on the device, and its counter of energy is everybody's"
    energy = outcome["energy"]
    joules, reason = energy_j(energy["before"], energy["after"], seconds=energy["seconds"], least_s=energy_s or LEAST_S)
    runs_tokens = any(run["decode_s"] for run in outcome["runs"])
    return (None, reason) if joules is None else (joules / (energy["runs"] * case.batch * (case.new_tokens if runs_tokens else 1)), None)
