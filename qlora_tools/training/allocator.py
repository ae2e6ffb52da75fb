"""Memory of this process: its peak, and giving back what a step no longer needs.

glibc keeps freed blocks of up to 32 MB in its heap, and the activations of a step, freed in another order than they were made, leave
holes that the next step cannot use: a run then holds up to twice what lives at any time. With a fixed threshold such blocks come from the
kernel and go back to it one by one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_THRESHOLD_BYTES = 1 << 20


def return_freed_blocks() -> bool:
    """Make glibc's allocator return blocks above 1 MB when they are freed. False where the allocator is another one."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, 4 * _THRESHOLD_BYTES))


def peak_bytes(device: str) -> int:
    """The peak so far: of the device's allocator on CUDA, else of the whole process."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    if (found := _kilobytes("/proc/self/status", "VmHWM:")) is not None:
        return found
    if sys.platform == "win32":
        return 0
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """What this process holds in memory now; 0 where the system does not say."""
    return _kilobytes("/proc/self/status", "VmRSS:") or 0


def available_bytes(device: str) -> int:
    """What a run may take: free memory of the device, or of the machine, and of the container where it has a limit of its own."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    if (found := _kilobytes("/proc/meminfo", "MemAvailable:")) is not None:
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


def _kilobytes(path: str, field: str) -> int | None:
    """The value in bytes of one line of a file that Linux keeps; ``None`` on other systems."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
