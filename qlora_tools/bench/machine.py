"""What a measurement was made on: processor, memory, kernel, load, versions. Read-only and without names of hosts or users.

A fact that cannot be read is ``None``.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from qlora_tools.cores import allowed_cores
from qlora_tools.manifest import library_versions


def describe_machine() -> dict[str, Any]:
    """Facts that a reader needs to judge or repeat a timing."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cores_allowed": allowed_cores(),
        "ram_bytes": _ram_bytes(),
        "system": platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
    }


def lasting_facts() -> dict[str, Any]:
    """Those that are the same whenever the same machine is asked."""
    return {name: fact for name, fact in describe_machine().items() if name not in ("load_average", "governor")}


def versions() -> dict[str, str]:
    """Installed libraries that shape the numbers."""
    return library_versions()


def cpu_stall_us(path: str = "/proc/pressure/cpu") -> int | None:
    """Microseconds since boot in which some task waited for a CPU (pressure stall information)."""
    for line in (_text(path) or "").splitlines():
        if line.startswith("some "):
            fields = dict(word.split("=", 1) for word in line.split()[1:])
            return int(fields["total"]) if "total" in fields else None
    return None


def oom_kills() -> int | None:
    """Processes that the out-of-memory killer has ended so far, in this control group or on the machine."""
    counts = []
    for path, separator in (("/sys/fs/cgroup/memory.events", " "), ("/proc/vmstat", " ")):
        for line in (_text(path) or "").splitlines():
            name, _, value = line.partition(separator)
            if name == "oom_kill":
                counts.append(int(value))
    return sum(counts) if counts else None


def _cpu_name() -> str | None:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or None


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
