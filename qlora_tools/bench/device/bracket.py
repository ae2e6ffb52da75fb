"""What one process takes of a device, from readings before, during and after it.

Where the driver shows our process, its figure is taken. Where it does not (containers, Windows), the whole device is read: what it lost while
the process ran must come back when it ends. If it does not, somebody else took or gave in between, and there is no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_SHARE = 0.01
_SLACK_BYTES = 16 << 20
_MIB = 1 << 20

Reading = Mapping[str, int | None]


@dataclass(frozen=True)
class Bracket:
    """``took_bytes`` from before to during; ``residual_bytes`` of it did not come back until after. ``reason``: why the figure does not count."""

    took_bytes: int
    residual_bytes: int
    reason: str | None = None


@dataclass(frozen=True)
class Figure:
    """One process's bytes and the ``method``, ``process`` or ``bracket``; or the reason why there are none."""

    bytes: int | None
    method: str | None = None
    residual_bytes: int | None = None
    reason: str | None = None


def bracket(before: Reading, during: Reading, after: Reading) -> Bracket:
    """Judge three readings of the whole device: accepted if the residual is within 1 % of what was taken, or 16 MiB."""
    first, middle, last = (int(reading["used_bytes"] or 0) for reading in (before, during, after))
    took, gave = middle - first, middle - last
    residual = took - gave
    reason = None
    if took <= 0:
        reason = f"contended: while the process ran, the device's use fell by {-took // _MIB} MiB"
    elif abs(residual) > max(_SHARE * took, _SLACK_BYTES):
        reason = f"contended: {took // _MIB} MiB were taken and {gave // _MIB} MiB came back"
    return Bracket(took, residual, reason)


def figure(device: Mapping[str, Reading]) -> Figure:
    """The figure of one process from its readings ``before``, ``during`` and ``after``."""
    during = device.get("during")
    if not during:
        return Figure(None, reason="the device was not read while the process ran")
    if during.get("process_bytes"):
        return Figure(during["process_bytes"], "process")
    if any(not device.get(when) or device[when].get("used_bytes") is None for when in ("before", "during", "after")):
        return Figure(None, reason="the driver does not show the process, and the device was not read before and after it")
    found = bracket(device["before"], during, device["after"])
    return Figure(None if found.reason else found.took_bytes, "bracket", found.residual_bytes, found.reason)
