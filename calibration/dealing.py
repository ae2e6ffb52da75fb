"""Chance that is the same everywhere: a generator of its own, since the library's shuffles may change between releases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
_MULTIPLIER, _INCREMENT, _MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1


class Dealer:
    """Deals numbers and choices from a seed (a 64-bit linear congruential generator, upper bits)."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, limit: int) -> int:
        """A whole number in [0, limit)."""
        self._state = (self._state * _MULTIPLIER + _INCREMENT) & _MASK
        return (self._state >> 33) * limit >> 31

    def number(self, first: int, last: int) -> int:
        return first + self.below(last - first + 1)

    def one(self, things: Sequence[T]) -> T:
        return things[self.below(len(things))]

    def some(self, things: Sequence[T], count: int) -> list[T]:
        """``count`` different ones, in a random order."""
        return self.shuffled(things)[:count]

    def shuffled(self, things: Iterable[T]) -> list[T]:
        dealt = list(things)
        for last in range(len(dealt) - 1, 0, -1):
            other = self.below(last + 1)
            dealt[last], dealt[other] = dealt[other], dealt[last]
        return dealt
