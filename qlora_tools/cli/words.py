"""Numbers as people read them."""

from __future__ import annotations


def megabytes(size: float) -> str:
    """Decimal units, as disks and download pages count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def percent(share: float | None) -> str:
    """Two significant places of a share; ``n/a`` for what was not measured."""
    return "n/a" if share is None else f"{100 * share:.2f} %"


def plural(count: int, word: str) -> str:
    """``1 tensor``, ``2 tensors``."""
    return f"{count} {word}{'' if count == 1 else 's'}"
