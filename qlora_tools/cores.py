"""How many processors this process may use."""

from __future__ import annotations

import os


def allowed_cores() -> int:
    """Those that the scheduler gives it, where the system says so; else all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
