"""What fits into so much memory: for every setting the most sequences at once, and the longest context of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

#: Contexts are told to this many positions.
CONTEXT_STEP = 64
#: How often the largest that fits is looked for along a line.
_GUESSES = 5
_MOST_SEQUENCES = 1 << 16


@dataclass(frozen=True)
class Fit:
    """What of one setting fits: ``batch`` sequences of the workload's length, and ``context`` positions of a single one; 0 where not even one does.
    ``kind``: ``transformers`` or ``graph``; ``peak_bytes``: of one sequence of the workload."""

    setting: str
    kind: str
    file_bytes: int
    peak_bytes: int
    batch: int
    context: int


class Candidate(Protocol):
    """A setting whose peak can be asked for any workload."""

    @property
    def setting(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def file_bytes(self) -> int: ...
    def peak_bytes(self, batch: int, prompt: int, new: int) -> int: ...


def fit(candidate: Candidate, prompt: int, new: int, limit: int, longest: int) -> Fit:
    """``longest``: the most positions that the model was made for."""
    batch = largest(lambda count: candidate.peak_bytes(count, prompt, new), limit, _MOST_SEQUENCES)
    steps = largest(lambda count: candidate.peak_bytes(1, min(count * CONTEXT_STEP, longest), 1), limit, -(-longest // CONTEXT_STEP))
    context = min(steps * CONTEXT_STEP, longest)
    return Fit(candidate.setting, candidate.kind, candidate.file_bytes, candidate.peak_bytes(1, prompt, new), batch, context)


def by_use(fits: Sequence[Fit]) -> tuple[Fit, ...]:
    """The settings that hold most sequences first, the smaller file first among equals."""
    return tuple(sorted(fits, key=lambda row: (-row.batch, row.file_bytes)))


def largest(peak: Callable[[int], int], limit: int, high: int) -> int:
    """The largest count up to ``high`` whose peak stays within ``limit``; 0 if one does not.

    Peaks grow nearly by the same for every one more, so a straight line through two of them says where to look next. What is answered has been asked; after
    :data:`_GUESSES` questions a larger one may be left.
    """
    at, value, most, slope = 1, peak(1), high, 0.0
    if value > limit:
        return 0
    for _ in range(_GUESSES):
        if at >= most:
            break
        probe = min(most, at + max(1, at if not slope else int((limit - value) / slope)))
        found = peak(probe)
        slope = max(1.0, (found - value) / (probe - at))
        if found <= limit:
            at, value = probe, found
        else:
            most = probe - 1
    return at
