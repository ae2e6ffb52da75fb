"""Memory of this process: its peak, and giving back what a step no longer needs.

glibc keeps freed blocks of up to 32 MB in its heap, and what loading and the forward pass free lies in holes between what they keep: a
run's heap grows to twice what lives at any time. Taking large blocks straight from the kernel (a low ``M_MMAP_THRESHOLD``) keeps the peak lowest,
but the kernel must then clear every page of every temporary, which adds about half to the time of a step. Giving back the holes
once a step, when the forward pass is done, costs a few per cent and takes off most of the waste.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import torch

from qlora_tools.process_memory import counters

_STATUS, _MACHINE = Path("/proc/self/status"), Path("/proc/meminfo")
#: Between two visits to the heap: a run of short steps is a small one and needs none.
_LEAST_SECONDS = 0.2


class Heap:
    """The heap of this process, as far as a run on ``device`` should look after it: glibc's, on the CPU."""

    def __init__(self, device: str = "cpu") -> None:
        library = ctypes.CDLL(None) if sys.platform.startswith("linux") and not device.startswith("cuda") else None
        self._trim = getattr(library, "malloc_trim", None)
        self._last = -_LEAST_SECONDS

    def give_back(self) -> bool:
        """Return freed memory to the system, unless that was done a moment ago. False where nothing was done."""
        if self._trim is None or time.monotonic() - self._last < _LEAST_SECONDS:
            return False
        self._trim(0)
        self._last = time.monotonic()
        return True


def peak_bytes(device: str) -> int:
    """The peak so far: of the device's allocator on CUDA, else of the whole process."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    if (found := counters(_STATUS).get("VmHWM")) is not None:
        return found
    if sys.platform == "win32":
        return 0
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not say."""
    return counters(_STATUS).get("VmRSS", 0)


def available_bytes(device: str) -> int:
    """What a run may take: free memory of the device, or of the machine, and of the container where it has a limit of its own."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    if (found := counters(_MACHINE).get("MemAvailable")) is not None:
        return min(found, container_bytes())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


def container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What the limit of this control group (version 2) leaves, cached files counted as free; more than any machine has where there is none."""
    try:
        limit, held = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        cached = sum(int(line.split()[1]) for line in (folder / "memory.stat").read_text().splitlines() if line.startswith(("inactive_file ", "active_file ")))
        return 1 << 62 if limit == "max" else max(0, int(limit) - held + cached)
    except (OSError, ValueError, IndexError):  # no such group, or one of another make
        return 1 << 62
