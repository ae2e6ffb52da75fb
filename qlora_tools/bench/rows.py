"""From the attempts of one setting at one case to its row: times, rates, memory, energy, and what is not known with its reason.

Nothing here starts a process or reads a clock; ``run.py`` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_tools.bench.forward import LOOKS_ONCE, is_forward
from qlora_tools.bench.record import Attempt, Case, Identity, Memory, Row, Setting, Status, at_most
from qlora_tools.bench.samples import summarise

WORST_FIRST: tuple[Status, ...] = ("oom", "timeout", "error", "unsupported")
_WEIGHT_SUFFIXES = frozenset({".onnx", ".data", ".onnx_data", ".safetensors"})
_SLACK = 0.02  # the kernel gathers a process's page counters per core and may lag behind by some pages each
_ONE_TOKEN = "one new token has no decode step"


def summarise_row(setting: Setting, case: Case, attempts: Sequence[Attempt]) -> Row:
    """Figures from the attempts that count; a row without any keeps the worst one's reason."""
    file_bytes = weight_file_bytes(setting.path)
    unknown = {} if file_bytes is not None else {"file_bytes": "the setting names no path" if setting.path is None else "the path holds no weights"}
    good = counted(attempts)
    if not good:
        worst = min(attempts, key=lambda attempt: WORST_FIRST.index(attempt.status))
        return Row(setting.id, case, worst.status, worst.reason, tuple(attempts), file_bytes=file_bytes, unknown=unknown)
    weights_bytes = good[0].info.get("weights_bytes")
    if weights_bytes is None:
        unknown["weights_bytes"] = "the engine does not tell"
    memory, missing = summarise_memory(good)
    stalls = [attempt.cpu_stall for attempt in good if attempt.cpu_stall is not None]
    times, untimed = _times(case, good)
    energy_j, without = summarise_energy([attempt for attempt in attempts if attempt.status == "ok"])
    return Row(
        setting=setting.id,
        case=case,
        status="ok",
        reason=_failed_rounds(attempts),
        attempts=tuple(attempts),
        file_bytes=file_bytes,
        weights_bytes=weights_bytes,
        **times,
        memory=memory,
        energy_j=energy_j,
        cpu_stall=max(stalls) if stalls else None,
        unknown={**unknown, **missing, **untimed, **without},
    )


def counted(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The attempts that figures are made of: of each round the one that went well; of two, that beside which the machine was calmer."""
    calmest: dict[int, Attempt] = {}
    for attempt in attempts:
        if attempt.status == "ok":
            rival = calmest.get(attempt.round)
            if rival is None or (attempt.cpu_stall or 0.0) < (rival.cpu_stall or 0.0):
                calmest[attempt.round] = attempt
    return [calmest[number] for number in sorted(calmest)]


def peak_bytes(attempt: Attempt) -> int | None:
    """The high-water mark of one process, loading included."""
    return max((peak for phase in ("loaded", "steady") if (peak := _reading(attempt, phase, "peak_bytes"))), default=None)


def summarise_memory(attempts: Sequence[Attempt]) -> tuple[Memory, dict[str, str]]:
    """The largest readings of the rounds, what must hold between them, and why some are missing."""

    def largest(phase: str, name: str) -> int | None:
        return max((found for attempt in attempts if (found := _reading(attempt, phase, name)) is not None), default=None)

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
        identities=_identities(attempts, was_reset) if peaks else (),
    )
    reasons = {} if peaks else {"memory": "this system does not tell a process its memory"}
    if peaks and not was_reset:
        reasons["memory.steady_peak_bytes"] = "the kernel does not let the peak be reset, so it includes loading"
    return memory, reasons


def summarise_energy(attempts: Sequence[Attempt]) -> tuple[float | None, dict[str, str]]:
    """Joules per new token as the rounds' mean, the prompt's share included; ``None`` where no accelerator was asked, with a reason where it did not tell."""
    if not any(attempt.device for attempt in attempts):
        return None, {}
    told = [attempt.energy_j for attempt in attempts if attempt.energy_j is not None]
    if not told:
        return None, {"energy_j": str(attempts[0].device.get("energy_reason", "the accelerator does not tell its energy"))}
    return sum(told) / len(told), {}


def identities_of(row: Row) -> tuple[Identity, ...]:
    """All that must hold in a row, of the host's memory and of the accelerator's."""
    return tuple(found for memory in (row.memory, row.device_memory) if memory is not None for found in memory.identities)


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


def _times(case: Case, good: Sequence[Attempt]) -> tuple[dict[str, Any], dict[str, str]]:
    once = is_forward(good[0].info)
    prefill = summarise([attempt.prefill_s for attempt in good])
    steps = [sum(run) / len(run) for attempt in good for run in attempt.decode_s if run]
    tpot = summarise([[step] for step in steps]).p50_s
    reads_tokens = good[0].info.get("prompt") != "ignored"
    unknown = {} if tpot else dict.fromkeys(("tpot_s", "decode_tokens_per_s"), LOOKS_ONCE if once else _ONE_TOKEN)
    if once:
        unknown["decode"] = LOOKS_ONCE
    if not reads_tokens:
        unknown["prefill_tokens_per_s"] = "this model reads no tokens"
    return {
        "load": summarise([[attempt.load_s] for attempt in good if attempt.load_s is not None]),
        "prefill": prefill,
        "ttft": summarise([attempt.ttft_s for attempt in good]),
        "decode": None if once else summarise([[step for run in attempt.decode_s for step in run] for attempt in good]),
        "tpot_s": tpot,
        "prefill_tokens_per_s": case.batch * case.prompt_tokens / prefill.p50_s if prefill.p50_s and reads_tokens else None,
        "decode_tokens_per_s": case.batch / tpot if tpot else None,
    }, unknown


def _failed_rounds(attempts: Sequence[Attempt]) -> str | None:
    """Rounds without a single good attempt, in words."""
    well = {attempt.round for attempt in attempts if attempt.status == "ok"}
    failed = [attempt for attempt in attempts if attempt.round not in well]
    lost = {attempt.round for attempt in failed}
    return f"{len(lost)} of {len(well | lost)} rounds failed: {failed[0].reason}" if failed else None


def _identities(attempts: Sequence[Attempt], was_reset: bool) -> tuple[Identity, ...]:
    """What one process's readings owe each other; of several processes the one that comes nearest to breaking it speaks."""
    pairs = [
        ("before loading <= peak of loading", ("imported", "rss_bytes"), ("loaded", "peak_bytes")),
        ("resident after loading <= peak of loading", ("loaded", "rss_bytes"), ("loaded", "peak_bytes")),
        ("anonymous and file-backed <= resident", ("steady", "anon_bytes", "file_bytes"), ("steady", "rss_bytes")),
        ("proportional <= resident", ("steady", "pss_bytes"), ("steady", "rss_bytes")),
        ("resident after running <= peak of running", ("steady", "rss_bytes"), ("steady", "peak_bytes")),
    ]
    if was_reset:
        pairs.append(("resident after loading <= peak of running", ("loaded", "rss_bytes"), ("steady", "peak_bytes")))
    return tuple(_nearest([at_most(name, _sum(attempt, left), _sum(attempt, right), _SLACK) for attempt in attempts]) for name, left, right in pairs)


def _nearest(found: Sequence[Identity]) -> Identity:
    known = [item for item in found if item.held is not None]
    return max(known, key=lambda item: (item.left_bytes or 0) / max(item.right_bytes or 1, 1)) if known else found[0]


def _sum(attempt: Attempt, where: Sequence[str]) -> int | None:
    readings = [_reading(attempt, where[0], name) for name in where[1:]]
    return None if None in readings else sum(reading for reading in readings if reading is not None)


def _reading(attempt: Attempt, phase: str, name: str) -> int | None:
    found: Mapping[str, Any] = attempt.memory.get(phase) or {}
    return found.get(name)
