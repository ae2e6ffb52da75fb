"""What a run tells whoever listens, as records; the loop draws nothing and the command line computes nothing.

Every event has ``as_dict()``: the line that ``metrics.jsonl`` holds for it (``event`` names its kind). Losses are in nats
per trained token (language) or per example (classification); rates in tokens per second; sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    kind: ClassVar[str] = "event"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready content with the kind under ``event``."""
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True)
class Planned(Event):
    """What the run will be, before anything heavy happens, and where its output will lie. ``plan`` is the verb's record."""

    kind: ClassVar[str] = "planned"
    plan: Any
    output: str


@dataclass(frozen=True)
class Started(Event):
    """The resolved run, before its first step. ``resumed_at``: the step it continues from, 0 for a fresh run."""

    kind: ClassVar[str] = "started"
    steps: int
    resumed_at: int
    trainable_parameters: int
    total_parameters: int
    rows: int
    tokens_per_epoch: int
    epochs: float
    base_bytes: int
    checkpointing: bool
    estimate_bytes: int | None = None
    probe_bytes: int | None = None

    @property
    def trainable_share(self) -> float:
        return self.trainable_parameters / max(1, self.total_parameters)


@dataclass(frozen=True)
class Step(Event):
    """One optimizer step. ``peak_bytes``: of the process (CPU) or the device's allocator (CUDA)."""

    kind: ClassVar[str] = "step"
    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_s: float
    peak_bytes: int
    seconds: float
    rank: int | None = None


@dataclass(frozen=True)
class Evaluation(Event):
    """A pass over the held-out rows."""

    kind: ClassVar[str] = "evaluation"
    step: int
    loss: float
    best: bool
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Sample(Event):
    """What the model writes after ``prompt`` at this step, greedily."""

    kind: ClassVar[str] = "sample"
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint to resume from lies in ``name`` under the run's folder."""

    kind: ClassVar[str] = "saved"
    step: int
    name: str


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener of whoever does not listen."""
