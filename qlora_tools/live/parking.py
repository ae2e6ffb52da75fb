"""Where hidden states wait for their next block: in memory up to a budget, beyond it in mapped files without a name.

A tensor that was put into a file is an ordinary tensor whose pages the system may write out and drop. Its space is used again once
nothing refers to its storage, and everything is gone when the process ends, however it ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_tools.checkpoint.folder import explained_disk_errors
from qlora_tools.specs import byte_view

BUDGET_BYTES = 512 << 20
_ARENA_BYTES = 256 << 20
_SMALLEST = 1 << 16


class Parking:
    """Keeps tensors for a run. ``in_memory`` and ``in_files``: bytes now; ``peak_bytes``: the most there ever were, of both."""

    def __init__(self, folder: Path, budget_bytes: int = BUDGET_BYTES) -> None:
        self._folder, self._budget = folder, budget_bytes
        self.in_memory = self.in_files = self.peak_bytes = self.peak_in_files = 0
        self._arena: mmap.mmap | None = None
        self._filled = 0
        self._free: dict[int, list[tuple[mmap.mmap, int]]] = defaultdict(list)

    def park(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or a copy of it in a file. Small ones and those on an accelerator stay where they are."""
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or size < _SMALLEST:
            return tensor
        if self.in_memory + size <= self._budget:
            self.in_memory += size
            weakref.finalize(tensor.untyped_storage(), self._left, size)
            kept = tensor
        else:
            kept = self._in_file(tensor, size)
        self.peak_bytes = max(self.peak_bytes, self.in_memory + self.in_files)
        self.peak_in_files = max(self.peak_in_files, self.in_files)
        return kept

    def _left(self, size: int) -> None:
        self.in_memory -= size

    def _in_file(self, tensor: torch.Tensor, size: int) -> torch.Tensor:
        extent = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        arena, start = self._free[extent].pop() if self._free[extent] else self._room(extent)
        held = np.frombuffer(arena, dtype=np.uint8, count=size, offset=start)
        held[:] = np.frombuffer(byte_view(tensor.detach()), dtype=np.uint8)
        _drop(arena, start, extent)
        self.in_files += extent
        weakref.finalize(held, self._vacate, arena, start, extent)
        return torch.from_numpy(held).view(tensor.dtype).view(tensor.shape)

    def _vacate(self, arena: mmap.mmap, start: int, extent: int) -> None:
        _drop(arena, start, extent)
        self._free[extent].append((arena, start))
        self.in_files -= extent

    def _room(self, extent: int) -> tuple[mmap.mmap, int]:
        if self._arena is None or self._filled + extent > len(self._arena):
            with explained_disk_errors(self._folder), tempfile.TemporaryFile(dir=self._folder) as file:
                _reserve(file.fileno(), max(extent, _ARENA_BYTES))
                self._arena, self._filled = mmap.mmap(file.fileno(), 0), 0
        start = self._filled
        self._filled += extent
        return self._arena, start


def _reserve(descriptor: int, size: int) -> None:
    """Space that is really taken: a mapped file that outgrows its disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _drop(arena: mmap.mmap, start: int, extent: int) -> None:
    """The pages need not be resident; what they hold stays in the file."""
    if hasattr(mmap, "MADV_DONTNEED"):
        arena.madvise(mmap.MADV_DONTNEED, start, extent)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with every tensor in its tuples, lists and mappings changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)(**{name: map_tensors(change, item) for name, item in value.items()})
    if isinstance(value, (tuple, list)):
        items = [map_tensors(change, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a nest, in order."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found
