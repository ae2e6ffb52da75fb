"""Joules from the counter that the driver keeps of the whole device."""

from __future__ import annotations

from collections.abc import Mapping

#: The counter moves in steps of tens of milliseconds; over less work than this the steps and the idle share are a good part of the figure.
LEAST_S = 10.0


def energy_j(before: Mapping[str, int | None], after: Mapping[str, int | None], *, seconds: float, least_s: float = LEAST_S) -> tuple[float | None, str | None]:
    """(joules between two readings of a meter, ``None``), or (``None``, why not). The device must be ours alone meanwhile: the counter is everybody's."""
    first, last = before.get("energy_mj"), after.get("energy_mj")
    if first is None or last is None:
        return None, "the driver does not count this device's energy"
    if seconds < least_s:
        return None, f"{seconds:.1f} s of work are too short for the driver's counter, {least_s:g} s are needed"
    if last < first:
        return None, "the driver's counter began anew meanwhile"
    return (last - first) / 1000, None
