"""Keys and values of the positions that were read: two ways to keep them, one interface.

GroupQueryAttention writes new positions in place into a buffer that it is given as past and present, so a step neither copies nor
allocates; the buffer grows by doubling when the text outgrows it. Plain ONNX attention gives presents that are the pasts and one
position more: each step's presents become the next step's pasts.

Axes: B sequences, P positions; each buffer is [B, heads, P, head size] with heads and size of its own layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort

from qlora_tools.export.runtime.values import Kind, empty, filled, read

_FIRST_CAPACITY = 256


@dataclass(frozen=True)
class Slot:
    """The past of one layer's keys or values, as the graph's inputs describe it."""

    past: str
    present: str
    kind: Kind
    heads: int
    head_size: int

    def shape(self, batch: int, positions: int) -> tuple[int, int, int, int]:
        return (batch, self.heads, positions, self.head_size)


class Cache(Protocol):
    """``pasts`` hold what was read; ``capacity`` is their number of positions."""

    pasts: list[ort.OrtValue]
    capacity: int

    def start(self, batch: int, needed: int, wanted: int) -> None:
        """Forget everything, and make room for ``needed`` positions; new buffers get room for ``wanted``."""

    def make_room(self, positions: int, used: int) -> bool:
        """Room for ``positions`` in all, the first ``used`` kept; true if the buffers are new ones."""
        ...

    def presents(self, positions: int) -> list[ort.OrtValue]:
        """Where the graph shall write keys and values of ``positions`` in all."""
        ...

    def accept(self, presents: list[ort.OrtValue]) -> None:
        """``presents`` have been written."""


class SharedCache:
    """One buffer per slot, bound as past and present."""

    def __init__(self, slots: Sequence[Slot], device: str, longest: int | None) -> None:
        self._slots, self._device, self._longest = slots, device, longest
        self.pasts: list[ort.OrtValue] = []
        self.capacity = self._batch = 0

    def start(self, batch: int, needed: int, wanted: int) -> None:
        if batch != self._batch or needed > self.capacity:
            self._batch, self.capacity = batch, self._rounded(wanted)
            self.pasts = [self._fresh(slot) for slot in self._slots]

    def make_room(self, positions: int, used: int) -> bool:
        if positions <= self.capacity:
            return False
        self.capacity = self._rounded(2 * positions)
        self.pasts = [self._fresh(slot, past, used) for slot, past in zip(self._slots, self.pasts, strict=True)]
        return True

    def presents(self, positions: int) -> list[ort.OrtValue]:
        return self.pasts

    def accept(self, presents: list[ort.OrtValue]) -> None:
        """The pasts have been written in place."""

    def _rounded(self, positions: int) -> int:
        roomy = max(_FIRST_CAPACITY, positions)
        return min(roomy, self._longest or roomy)

    def _fresh(self, slot: Slot, past: ort.OrtValue | None = None, used: int = 0) -> ort.OrtValue:
        content = np.zeros(slot.shape(self._batch, self.capacity), slot.kind.carrier)
        if past is not None:
            content[:, :, :used] = read(slot.kind, past)[:, :, :used]
        return filled(slot.kind, content, self._device)


class GrowingCache:
    """Presents become pasts."""

    def __init__(self, slots: Sequence[Slot], device: str) -> None:
        self._slots, self._device = slots, device
        self.pasts: list[ort.OrtValue] = []
        self.capacity = self._batch = 0

    def start(self, batch: int, needed: int, wanted: int) -> None:
        self._batch = batch
        self.pasts = [empty(slot.kind, slot.shape(batch, 0), self._device) for slot in self._slots]

    def make_room(self, positions: int, used: int) -> bool:
        return False

    def presents(self, positions: int) -> list[ort.OrtValue]:
        return [empty(slot.kind, slot.shape(self._batch, positions), self._device) for slot in self._slots]

    def accept(self, presents: list[ort.OrtValue]) -> None:
        self.pasts = presents
