"""What the runtime's own allocator holds: ONNX Runtime's arenas from its log, torch's from its counters.

ONNX Runtime's Python interface tells nothing about its arenas (1.31: no statistics on sessions, allocators or options), but each arena logs
every extension and every reservation at severity INFO, with its total in bytes. The worker's standard error is recorded meanwhile, below
Python, because the lines come from C++. What the log leaves out is when reserved memory (weights) is given back, after packing for instance;
the next total tells it.

A process may hold several arenas of one name: a session's, and the one from which the Python module makes values on a device. Totals carry
no owner, so each is given to the arena whose last total and extension add up to it.

torch's figure is what it reserved from the driver, with its own rounding; it has no other way of growing.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any

_CREATED = re.compile(r"Creating BFCArena for (\S+) with following configs:.*?arena_extend_strategy: (\d+)")
_RESERVED = re.compile(r"Reserving memory in BFCArena for (\S+) size: (\d+)")
_EXTENDING = re.compile(r"Extending BFCArena for (\S+?)\. ")
_EXTENDED = re.compile(r"Extended allocation by (\d+) bytes")
_TOTAL = re.compile(r"Total allocated bytes: (\d+)")
_INFORMATION = re.compile(r"^(\x1b\[[0-9;]*m)?\d{4}-\d\d-\d\d \S+ \[I:onnxruntime:")
_STRATEGIES = ("kNextPowerOfTwo", "kSameAsRequested")
_STANDARD_ERROR = 2


@dataclass
class Arena:
    """One arena as its log tells it. ``held_bytes`` as last known, ``peak_bytes`` the largest total seen; ``reserved_bytes`` all that was ever reserved."""

    name: str
    strategy: str | None = None
    held_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0

    def reserve(self, size: int) -> None:
        """The log does not tell when reserved memory goes, so this alone is no peak."""
        self.held_bytes += size
        self.reserved_bytes += size

    def settle(self, total: int) -> None:
        self.held_bytes = total
        self.peak_bytes = max(self.peak_bytes, total)

    @property
    def most_bytes(self) -> int:
        """The largest total, and what was reserved after it; without any total, all that was reserved."""
        return max(self.peak_bytes, self.held_bytes)


def read_log(lines: Iterable[str]) -> list[Arena]:
    """The arenas that the lines speak of, in the order in which they were made."""
    arenas: list[Arena] = []
    name, extension = "", 0
    for line in lines:
        if "rena" not in line and "llocat" not in line:
            continue
        if found := _CREATED.search(line):
            number = int(found.group(2))
            arenas.append(Arena(found.group(1), _STRATEGIES[number] if number < len(_STRATEGIES) else None))
        elif found := _RESERVED.search(line):
            _named(arenas, found.group(1))[0].reserve(int(found.group(2)))
        elif found := _EXTENDING.search(line):
            name = found.group(1)
        elif found := _EXTENDED.search(line):
            extension = int(found.group(1))
        elif found := _TOTAL.search(line):
            total = int(found.group(1))
            _owner(_named(arenas, name), total, extension).settle(total)
    return arenas


def _named(arenas: list[Arena], name: str) -> list[Arena]:
    found = [arena for arena in arenas if arena.name == name]
    if not found:  # it was made before the recording began
        arenas.append(Arena(name))
        found = arenas[-1:]
    return found


def _owner(arenas: list[Arena], total: int, extension: int) -> Arena:
    """The arena that now holds ``total``: the one for which it adds up, else one that has given reserved memory back."""
    exact = [arena for arena in arenas if arena.held_bytes + extension == total]
    fitting = exact or [arena for arena in arenas if arena.reserved_bytes and arena.held_bytes + extension > total]
    return (fitting or arenas)[0]


def record_of(arenas: Iterable[Arena], device: str) -> dict[str, Any]:
    """The arenas on ``device`` (``cuda``; pinned memory of the host is not) as plain JSON: ``peak_bytes`` and each of them, or a ``reason``."""
    own = [arena for arena in arenas if arena.name.lower().startswith(device) and "pinned" not in arena.name.lower()]
    if not own:
        return {"peak_bytes": None, "reason": f"onnxruntime logged no arena on {device}"}
    told = [{"name": arena.name, "strategy": arena.strategy, "peak_bytes": arena.most_bytes, "reserved_bytes": arena.reserved_bytes} for arena in own]
    return {"peak_bytes": sum(arena.most_bytes for arena in own), "source": "log", "arenas": told}


class ArenaWatch:
    """Records the runtime's log: ``with ArenaWatch() as watch:`` load and run, then ``watch.record()``. ``device``: ``cuda``, or ``cpu`` in tests.

    The engine must be opened with ``memory="lean"``, which switches the log on. Lines that are no information are passed on at the end.
    """

    def __init__(self, device: str = "cuda") -> None:
        self._device = device.partition(":")[0]
        self._lines: list[str] = []
        self._saved = -1
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ArenaWatch:
        sys.stderr.flush()
        self._file = tempfile.TemporaryFile()
        self._saved = os.dup(_STANDARD_ERROR)
        os.dup2(self._file.fileno(), _STANDARD_ERROR)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        sys.stderr.flush()
        os.dup2(self._saved, _STANDARD_ERROR)
        os.close(self._saved)
        self._file.seek(0)
        self._lines = self._file.read().decode("utf-8", "replace").splitlines()
        self._file.close()
        os.write(_STANDARD_ERROR, "".join(f"{line}\n" for line in self._lines if not _INFORMATION.match(line)).encode())

    def record(self) -> dict[str, Any]:
        """torch's counters where torch used the device in this process, else what ONNX Runtime logged."""
        return torch_record() or record_of(read_log(self._lines), self._device)


def torch_record(modules: Mapping[str, Any] = sys.modules) -> dict[str, Any] | None:
    """torch's own counters, ``None`` where it is not loaded or has not touched the device."""
    torch = modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or not torch.cuda.max_memory_reserved():
        return None
    return {"peak_bytes": int(torch.cuda.max_memory_reserved()), "allocated_peak_bytes": int(torch.cuda.max_memory_allocated()), "source": "torch"}
