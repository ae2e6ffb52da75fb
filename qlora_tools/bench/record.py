"""``bench.json``, schema ``qlt.bench/2``: the truth that the table, the page and the plots are drawn from.

Frozen records that turn into JSON and back. Rules of the schema: every raw sample is kept; what is not known
is ``null`` and its reason stands in the ``unknown`` map beside it under the same name, never a 0; a setting
that failed stays as a row with ``status`` and ``reason``; paths are reduced to their last part. A reader of
this version ignores keys it does not know and refuses other schemas.

Times are seconds (``_s``), sizes bytes (``_bytes``), quality figures as ``quality`` defines them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_tools.bench.plain import to_plain
from qlora_tools.bench.samples import Timing
from qlora_tools.errors import UsageError
from qlora_tools.manifest import canonical_json

SCHEMA = "qlt.bench/2"
FILE_NAME = "bench.json"
#: The label of the base without its adapters, measured beside for comparison.
UNTUNED = "untuned"
Status = Literal["ok", "oom", "timeout", "unsupported", "error"]


@dataclass(frozen=True)
class Setting:
    """One way to run the model. ``engine`` and ``options`` as in ``engine.py``; ``path`` is what its file size is counted on.

    ``export`` is the command that makes it, for readers; ``environment`` is added to the worker's. ``unavailable``: why it cannot be run at all (its
    export failed, say); its rows then hold that reason.
    """

    id: str
    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str | None = None
    scheme: str | None = None
    path: str | None = None
    export: str | None = None
    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    unavailable: str | None = None

    @property
    def name(self) -> str:
        return self.label or self.id


@dataclass(frozen=True)
class Case:
    """One shape of work: ``batch`` sequences of ``prompt_tokens`` in, ``new_tokens`` out of each (the first by prefill).

    A model that only looks forward once (an encoder, a classifier of images) is asked for the first of them alone.
    """

    prompt_tokens: int = 128
    new_tokens: int = 65
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UsageError(f"{name} is {value}, expected 1 or more")

    @property
    def longest(self) -> int:
        """Positions an engine must have room for."""
        return self.prompt_tokens + self.new_tokens

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.prompt_tokens} + {self.new_tokens}"


@dataclass(frozen=True)
class Workload:
    """What every setting is asked to do: each case ``repeats`` times per round, in a process of its own.

    ``ids`` are the tokens to use, repeated as needed; without them seeded random ones are. At least ``warmup`` runs,
    at most ``most_warmup``, come first, until three lie within 5 %.
    """

    cases: tuple[Case, ...] = (Case(),)
    repeats: int = 5
    warmup: int = 3
    most_warmup: int = 8
    seed: int = 0
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("repeats", "warmup"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not self.cases or len(set(self.cases)) < len(self.cases):
            raise UsageError("the workload names no case, or one twice")
        if self.ids is not None and not self.ids:
            raise UsageError("the token ids of the workload are empty")

    @property
    def longest(self) -> int:
        """Positions an engine must have room for."""
        return max(case.longest for case in self.cases)

    def job(self, case: Case) -> dict[str, Any]:
        """What a worker is told, as plain JSON."""
        return {**{name: value for name, value in vars(self).items() if name != "cases"}, **vars(case)}


@dataclass(frozen=True)
class Attempt:
    """One worker process: what it measured, or why it did not. Two of one round: the machine was busy, so it was measured again (``rows.counted``).

    ``memory`` holds the readings per phase as ``process_memory.py`` takes them; ``device`` the accelerator's ``before``, ``during`` and ``after``.
    ``energy_j`` is per new token, the prompt's share included.
    """

    round: int
    status: Status
    reason: str | None
    wall_s: float
    cpu_s: float | None
    cpu_stall: float | None
    import_s: float | None = None
    load_s: float | None = None
    warmup_s: tuple[float, ...] = ()
    is_steady: bool | None = None
    prefill_s: tuple[float, ...] = ()
    ttft_s: tuple[float, ...] = ()
    decode_s: tuple[tuple[float, ...], ...] = ()
    total_s: tuple[float, ...] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    energy_j: float | None = None


@dataclass(frozen=True)
class Identity:
    """What must hold between two figures of one row: ``left <= right``, or both equal ``within`` a share. ``held`` is ``None`` where either is not known."""

    name: str
    left_bytes: int | None
    right_bytes: int | None
    within: float | None
    held: bool | None


def at_most(name: str, left_bytes: int | None, right_bytes: int | None, slack: float = 0.0) -> Identity:
    """``left <= right``, give or take a share ``slack`` of the right for counters that were not read at the same instant."""
    known = left_bytes is not None and right_bytes is not None
    return Identity(name, left_bytes, right_bytes, None, left_bytes <= right_bytes * (1 + slack) if known else None)  # type: ignore[operator]


def same(name: str, left_bytes: int | None, right_bytes: int | None, within: float) -> Identity:
    """Both equal within a share of the larger."""
    if left_bytes is None or right_bytes is None:
        return Identity(name, left_bytes, right_bytes, within, None)
    return Identity(name, left_bytes, right_bytes, within, abs(left_bytes - right_bytes) <= within * max(left_bytes, right_bytes))


@dataclass(frozen=True)
class Memory:
    """Bytes, the largest over the rounds. Peaks are the kernel's high-water marks; ``anon`` and ``file`` are what was resident after the timed runs.

    ``runtime_bytes`` was resident once the runtime was imported and before the model was loaded; it is part of
    everything that follows. ``load_peak_bytes`` is since the process began, ``steady_peak_bytes`` since loading ended.
    """

    peak_bytes: int | None
    load_peak_bytes: int | None
    steady_peak_bytes: int | None
    runtime_bytes: int | None
    anon_bytes: int | None
    file_bytes: int | None
    pss_bytes: int | None
    identities: tuple[Identity, ...] = ()


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on an accelerator: five numbers and never one, since each answers another question; a sixth, the least limit, on request.

    ``weights_bytes``: the exact sum of the stored weights. ``arena_peak_bytes``: the runtime's own allocator, extended by just what is asked for.
    ``context_bytes``: a process that holds one operator. ``process_peak_bytes``: all of the process while the arena is so. ``as_deployed_peak_bytes``: all
    of the process under the runtime's defaults. ``smallest_limit_bytes``: the least ``gpu_mem_limit`` under which the case runs. ``method``: ``process``
    (the driver's figure for our process) or ``bracket`` (what the whole device lost, with ``residual_bytes`` between taken and given back).
    """

    weights_bytes: int | None = None
    arena_peak_bytes: int | None = None
    context_bytes: int | None = None
    process_peak_bytes: int | None = None
    as_deployed_peak_bytes: int | None = None
    smallest_limit_bytes: int | None = None
    method: str | None = None
    residual_bytes: int | None = None
    identities: tuple[Identity, ...] = ()


@dataclass(frozen=True)
class Row:
    """One setting's figures at one case, over all rounds. ``status`` is the worst of its attempts' unless one went well. ``energy_j`` is per new token."""

    setting: str
    case: Case
    status: Status
    reason: str | None
    attempts: tuple[Attempt, ...]
    file_bytes: int | None = None
    weights_bytes: int | None = None
    load: Timing | None = None
    prefill: Timing | None = None
    ttft: Timing | None = None
    decode: Timing | None = None
    tpot_s: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    memory: Memory | None = None
    device_memory: DeviceMemory | None = None
    energy_j: float | None = None
    cpu_stall: float | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Quality:
    """What a probe said of one setting against ``reference``; ``figures`` is the probe's own JSON."""

    setting: str
    reference: str
    status: Status
    reason: str | None
    figures: Mapping[str, Any] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One extracted layer, for the report's own section. Energies are shares of the squared norm of the change.

    ``retention``: the share of the adapter's change that the stored weights hold after a merge. Without an extraction ``shape`` is empty and ``rank`` 0.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    kept_energy: float | None = None
    best_energy: float | None = None
    relative_error: float | None = None
    singular_values: tuple[float, ...] | None = None
    retention: float | None = None


@dataclass(frozen=True)
class BenchRecord:
    """All of one benchmark. ``stall_limit``: the share of waiting for a CPU, declared before, above which an attempt was taken once more."""

    created: str
    command: tuple[str, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    workload: Workload
    rounds: int
    threads: int
    settings: tuple[Setting, ...]
    rows: tuple[Row, ...]
    quality: tuple[Quality, ...] = ()
    comparisons: tuple[Mapping[str, Any], ...] = ()
    stall_limit: float | None = None
    layers: tuple[Layer, ...] = ()
    notes: tuple[str, ...] = ()
    title: str = "Benchmark"
    schema: str = SCHEMA

    def row(self, setting: str, case: Case | None = None) -> Row:
        """The row of a setting, at the first case unless another is named."""
        return next(row for row in self.rows if row.setting == setting and row.case == (case or self.workload.cases[0]))

    def rows_at(self, case: Case) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.case == case)

    def setting(self, setting: str) -> Setting:
        return next(found for found in self.settings if found.id == setting)

    def quality_of(self, setting: str) -> Quality | None:
        return next((found for found in self.quality if found.setting == setting), None)

    def to_json(self) -> bytes:
        """Canonical bytes; a number that is not finite is written as ``null``."""
        return canonical_json(to_plain(self))
