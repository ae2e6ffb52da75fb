"""The schedule: who is measured when, who once more, and who not again.

A round measures every setting at every case once, settings of one case next to each other: forwards, then backwards, then one further along, so that a
busy minute of the machine, and what one setting leaves in the caches for the next, fall on all of them. An attempt beside which tasks waited for a CPU
longer than the limit declared before is taken once more at the end of its round; both are kept. Where all of a round's second attempts were disturbed as well, the machine is busy for good, and no round after
it takes any. What can never work (no such kernel, no such device, an export that failed) is tried once, and what ran out of
memory or time in two rounds and never worked is not tried in a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from qlora_tools.bench.record import Attempt, Case, Setting, Status
from qlora_tools.progress import Task

Attempts = dict[tuple[str, Case], list[Attempt]]
_WASTED = 2
Item = TypeVar("Item")


def run_rounds(
    settings: Sequence[Setting], cases: Sequence[Case], rounds: int, *, stall_limit: float, attempt: Callable[[Setting, Case, int, bool], Attempt], task: Task
) -> Attempts:
    """All attempts by setting and case. ``attempt(setting, case, round, is_extra)`` takes one."""
    found: Attempts = {(setting.id, case): [] for case in cases for setting in settings}
    is_worth_more = True
    for number in range(rounds):
        busy: list[tuple[Setting, Case]] = []
        for setting, case in in_turn(settings, cases, number):
            kept = found[setting.id, case]
            if not is_hopeless(setting, kept):
                kept.append(attempt(setting, case, number, False))
                if is_worth_more and is_disturbed(kept[-1], stall_limit):
                    busy.append((setting, case))
            task.advance(label=setting.name)
        for setting, case in busy:
            task.advance(0, label=f"{setting.name} again, the machine was busy")
            found[setting.id, case].append(attempt(setting, case, number, True))
        if busy and all(is_disturbed(found[setting.id, case][-1], stall_limit) for setting, case in busy):
            is_worth_more = False
    return found


def in_turn(settings: Sequence[Setting], cases: Sequence[Case], number: int) -> Iterator[tuple[Setting, Case]]:
    """The order of round ``number``."""
    for case in _rotated(cases, number):
        for setting in _rotated(settings, number):
            yield setting, case


def is_disturbed(attempt: Attempt, stall_limit: float) -> bool:
    """Whether an attempt deserves another: it ran, or ran out of time, while the machine was busy."""
    return attempt.status in ("ok", "timeout") and attempt.cpu_stall is not None and attempt.cpu_stall > stall_limit


def is_hopeless(setting: Setting, attempts: Sequence[Attempt]) -> bool:
    """Whether another round would be a waste."""
    if not attempts or any(attempt.status == "ok" for attempt in attempts):
        return False
    never = setting.unavailable is not None or any(attempt.status == "unsupported" for attempt in attempts)
    return never or len({attempt.round for attempt in attempts if attempt.status in ("oom", "timeout")}) >= _WASTED


def impossible(reason: str, status: Status) -> Attempt:
    """The one attempt of a setting that cannot be started."""
    return Attempt(0, status, reason, 0.0, None, None)


def _rotated(items: Sequence[Item], number: int) -> list[Item]:
    shift = number // 2 % len(items)
    turned = [*items[shift:], *items[:shift]]
    return turned[::-1] if number % 2 else turned
