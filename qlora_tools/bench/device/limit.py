"""The least limit of an allocator under which a case still runs: the one figure that answers "will it fit" directly.

Each try is a fresh process, so tries are few: the limit grows from the weights' size until one run succeeds, then the gap between failure and
success is halved until it is 1 % of the answer. Both ends are tried once more. That success does not turn into failure as the limit grows is
assumed by halving; where the second tries say otherwise there is no number.

An arena of ONNX Runtime does not count weights against its limit when it reserves them, and once they exceed it the rest is unlimited: the
difference is taken without a sign (1.31). So that a process ended well is not enough; :func:`kept_within` looks at what its arena held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_tools.errors import UsageError

_GROWTH = 1.25
_MIB = 1 << 20


@dataclass(frozen=True)
class LimitSearch:
    """``bytes``: the least limit that ran, or ``None`` and the ``reason``. ``tries``: each limit in order, and whether it ran."""

    bytes: int | None
    tries: tuple[tuple[int, bool], ...]
    reason: str | None = None


def kept_within(arena: Mapping[str, Any], limit: int) -> bool:
    """True if an allocator, as ``arena.py`` recorded it, stayed within ``limit`` bytes: torch's, or the arena of a session.

    Values made outside a session lie in another arena, which its limit does not touch.
    """
    told = [one["peak_bytes"] for one in arena.get("arenas", ()) if one["reserved_bytes"]] if arena.get("source") == "log" else [arena.get("peak_bytes")]
    return bool(told) and all(peak is not None and peak <= limit for peak in told)


def smallest_limit(runs: Callable[[int], bool], weights_bytes: int, *, most_bytes: int, within: float = 0.01, most_tries: int = 24) -> LimitSearch:
    """Search between 0 and ``most_bytes`` (the device's memory), beginning at ``weights_bytes``. ``runs``: a fresh process with that limit ended well,
    and :func:`kept_within` it.

    Raises:
        UsageError: bytes or a share below what makes sense.
    """
    if weights_bytes < 1 or most_bytes < 1 or not 0 < within < 1:
        raise UsageError(f"a limit between {weights_bytes} and {most_bytes} bytes to {within:g}: expected positive sizes and a share below 1")
    tries: list[tuple[int, bool]] = []

    def ran(limit: int) -> bool:
        tries.append((limit, runs(limit)))
        return tries[-1][1]

    def ended(reason: str) -> LimitSearch:
        return LimitSearch(None, tuple(tries), reason)

    failed, works, limit = 0, 0, min(weights_bytes, most_bytes)
    while not works:
        if ran(limit):
            works = limit
        elif limit >= most_bytes:
            return ended(f"it does not run within the device's {most_bytes // _MIB} MiB")
        elif len(tries) >= most_tries:
            return ended(f"nothing ran in {most_tries} tries, up to {limit // _MIB} MiB")
        else:
            failed, limit = limit, min(int(limit * _GROWTH) + 1, most_bytes)
    while works - failed > max(within * works, 1):
        if len(tries) >= most_tries:
            return ended(f"{most_tries} tries left it between {failed // _MIB} and {works // _MIB} MiB")
        middle = (failed + works) // 2
        failed, works = (failed, middle) if ran(middle) else (middle, works)
    if not ran(works):
        return ended(f"it ran once with {works // _MIB} MiB and once not")
    if failed and ran(failed):
        return ended(f"it failed once with {failed // _MIB} MiB and ran once: a larger limit is not always better here")
    return LimitSearch(works, tuple(tries))
