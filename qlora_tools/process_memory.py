"""This process's memory as the kernel counts it, in bytes.

Peaks come from ``VmHWM`` in ``/proc/self/status``: exact, unlike polling, and unlike ``ru_maxrss`` not
inherited from the parent through vfork. Writing 5 to ``/proc/self/clear_refs`` resets it, so loading and
steady running get a peak each. Anonymous and file-backed pages are told apart because a memory-mapped model
is shared and evictable and a heap copy is not. Where there is no ``/proc``, everything is ``None``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

_SELF = Path("/proc/self")
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class Reading:
    """One look at the process. ``peak`` is since its start or the last reset; the rest is now. ``pss`` splits shared pages among their users."""

    peak_bytes: int | None
    rss_bytes: int | None
    anon_bytes: int | None
    file_bytes: int | None
    pss_bytes: int | None

    def record(self) -> dict[str, int | None]:
        return asdict(self)


def read_memory(folder: Path = _SELF) -> Reading:
    """Read the kernel's counters. ``folder`` is a ``/proc/<pid>``."""
    status = counters(folder / "status")
    return Reading(
        peak_bytes=status.get("VmHWM"),
        rss_bytes=status.get("VmRSS"),
        anon_bytes=status.get("RssAnon"),
        file_bytes=status.get("RssFile"),
        pss_bytes=counters(folder / "smaps_rollup").get("Pss"),
    )


def reset_peak(folder: Path = _SELF) -> bool:
    """Start a new peak from the present size. False where the kernel does not allow it: the next peak then includes everything so far."""
    before = read_memory(folder)
    try:
        (folder / "clear_refs").write_text("5")
    except OSError:
        return False
    after = read_memory(folder)
    if before.peak_bytes is None or before.rss_bytes is None or after.peak_bytes is None:
        return False
    # some sandboxes accept the write and do nothing
    return after.peak_bytes < before.peak_bytes or before.peak_bytes - before.rss_bytes < _SLACK_BYTES


def counters(path: Path) -> dict[str, int]:
    """``Name:  123 kB`` lines of a file that Linux keeps, as bytes; empty where it cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found
