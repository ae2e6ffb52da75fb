"""A claim, and how a figure is judged against its bar and written.

A claim is ``held`` where the figure and both ends of its interval meet the bar, ``missed`` where none of them does, and ``open`` where the interval holds the
bar. Intervals are widened by what the same tool against itself showed on that run (``half_width``), where that was measured. What no result file has yet is
``not measured``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HEADS = ["what", "qlt", "peer", "ratio [95 %]", "wanted", "held?"]
NOT_MEASURED = "not measured"
#: A bootstrap of fewer pairs gives about the smallest and the largest of their ratios, which is no 95 % interval.
FEWEST_PAIRS = 5


@dataclass(frozen=True)
class Claim:
    """One row of a table. ``verdict`` is ``held``, ``open``, ``missed``, ``not measured``, or empty where nothing was asked."""

    what: str
    ours: str = ""
    theirs: str = ""
    ratio: str = ""
    bar: str = ""
    verdict: str = ""

    @property
    def cells(self) -> list[str]:
        return [self.what, self.ours, self.theirs, self.ratio, self.bar, self.verdict]


def judge(value: float, bar: float, *, least: bool, ci95: Sequence[float] | None = None, half_width: float = 0.0) -> str:
    """``held``, ``open`` or ``missed``; see the head of this file."""
    low, high = ci95 or (value, value)
    ends = [low / (1 + half_width), high * (1 + half_width)]
    met = [(end >= bar) if least else (end <= bar) for end in (*ends, value)]
    return "held" if all(met) else "open" if any(met) else "missed"


def faster(what: str, ours: str, theirs: str, found: Mapping[str, Any], bar: float | None = None, half_width: float = 0.0) -> Claim:
    """A claim of speed from :func:`measured.ratio`'s record."""
    verdict = "" if bar is None else judge(found["median"], bar, least=True, ci95=found["ci95"], half_width=half_width)
    return Claim(what, ours, theirs, f"{interval(found)} x faster", "" if bar is None else f">= {bar:g}", verdict)


def less(what: str, ours: str, theirs: str, share: float, bar: float | None = None) -> Claim:
    """A claim of size from a plain share of theirs."""
    return Claim(what, ours, theirs, f"{share:.2f} of theirs", "" if bar is None else f"<= {bar:.2g}", "" if bar is None else judge(share, bar, least=False))


def at_most(what: str, ours: str, theirs: str, value: float, bar: float) -> Claim:
    return Claim(what, ours, theirs, "", f"<= {bar:.0e}".replace("e-0", "e-"), judge(value, bar, least=False))


def interval(found: Mapping[str, Any]) -> str:
    """A ratio with its interval. What only a few pairs of runs tell has their number beside it, and of one pair there is no interval."""
    (low, high), pairs, digits = found["ci95"], found.get("pairs"), 2 if found["median"] < 10 else 1
    if pairs == 1:
        return f"{found['median']:.{digits}f} (one pair)"
    few = f" ({pairs} pairs)" if pairs is not None and pairs < FEWEST_PAIRS else ""
    return f"{found['median']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{few}"


def mb(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def nearer(what: str, ours: float, theirs: float, share: Mapping[str, Any]) -> Claim:
    """A claim of quality: no more KL than theirs."""
    verdict = judge(share["median"], 1.0, least=False, ci95=share["ci95"])
    return Claim(what, f"{ours:.1e}", f"{theirs:.1e}", f"{interval(share)} of theirs", "<= 1", verdict)


def half_width(noise: Mapping[str, Any], phase: str) -> float:
    """How far a tool strays from itself in this phase, as a share; 0 where that was not measured."""
    return float(noise.get(phase, {}).get("half_width", 0.0))


def both_phases(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], peer: str, item: Mapping[str, Any]) -> Iterator[Claim]:
    """Prefill and step of one graph beside another's."""
    noise = ours.get("against_itself", {})
    for phase, head, named in (("prefill", what, f" ({peer})"), ("decode", "… decode step", "")):
        left, right = (row[f"{phase}_ms"] for row in (ours, theirs))
        yield faster(head, f"{left:.3g} ms", f"{right:.3g} ms{named}", item[f"{phase}_times_faster"], 1.0, half_width(noise, f"{phase}_ms"))


def tally(claims: Sequence[Claim]) -> str:
    """``31 held, 2 open, 5 missed, 30 not measured``."""
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in ("held", "open", "missed", NOT_MEASURED)}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
