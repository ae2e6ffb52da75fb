"""Regular expressions from a stranger's configuration, matched against module paths in bounded time.

Python's own matcher backtracks: ``(a+)+$`` takes it time exponential in the length of the path. Here all ways through a pattern are
followed at once: a set of positions goes in, the set of positions where a match may end comes out, and a repeat is over when it reaches
nothing new. Sets are integers with bit p for position p. The parser is Python's, so a pattern means the same. What a group has taken is
never asked, so greedy and lazy are one.

Refused by name, because they are not about sets of positions: back-references and conditions on groups, atomic groups, possessive repeats,
and the flags that change what ``^`` or ``\\w`` mean. Reference: Thompson, "Regular expression search algorithm", CACM 11 (1968).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as grammar  # type: ignore[attr-defined]
from typing import Any

from qlora_tools.errors import UnsupportedError

_MAX_STEPS = 100_000
_MAX_DEPTH = 60
_FLAGS = re.UNICODE | re.IGNORECASE | re.DOTALL | re.VERBOSE
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)
_LOOKS = (codes.ASSERT, codes.ASSERT_NOT)
_CHARACTERS = (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN)


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    codes.CATEGORY_WORD: _is_word,
    codes.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}


class PathPattern:
    """One pattern, parsed. Build with :func:`path_pattern`.

    Raises (on construction):
        re.error: no regular expression, or one of the kinds that this file refuses.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what a later Python may read differently is no news to the user
            tree = grammar.parse(text)
        self._flags = int(tree.state.flags)
        self._items = tuple(tree)
        _check(self._items, self._flags, 0)
        at_start = self._items[:1] == ((codes.AT, codes.AT_BEGINNING),)
        plain = self._items[at_start:]
        literal = all(code is codes.LITERAL for code, _ in plain) and not self._flags & re.IGNORECASE
        self._literal = "".join(chr(value) for _, value in plain) if literal else None
        self._anchored = at_start

    def whole(self, path: str) -> bool:
        """``re.fullmatch``.

        Raises:
            UnsupportedError: it takes more steps than any sensible pattern; so do the other two.
        """
        return bool(_Run(self.text, path).after(self._items, 1, self._flags) >> len(path) & 1)

    def tail(self, path: str) -> bool:
        """``re.match(r"(.*\\.)?(pattern)$", path)``: it matches the path, or what follows one of its dots."""
        if self._literal is not None:  # the common case: one key per module, every key tried on every module
            return path == self._literal or (not self._anchored and path.endswith(f".{self._literal}"))
        return len(path) in self.ends(path)

    def ends(self, path: str) -> list[int]:
        """Where matches that begin with the path, or after one of its dots, may end; ascending."""
        starts = 1 | sum(1 << position + 1 for position, char in enumerate(path) if char == ".")
        found = _Run(self.text, path).after(self._items, starts, self._flags)
        return [position for position in range(len(path) + 1) if found >> position & 1]


@lru_cache(maxsize=8192)
def path_pattern(text: str) -> PathPattern:
    """``text`` parsed, once."""
    return PathPattern(text)


def _check(items: Iterable[tuple[Any, Any]], flags: int, depth: int) -> None:
    """Refuse what :class:`_Run` does not follow."""
    if depth > _MAX_DEPTH:
        raise re.error(f"more than {_MAX_DEPTH} levels of groups")
    if flags & ~_FLAGS:
        raise re.error("a flag other than i, s, u and x")
    for code, value in items:
        if code in _REPEATS:
            _check(value[2], flags, depth + 1)
        elif code in _LOOKS:
            _check(value[1], flags, depth + 1)
        elif code is codes.BRANCH:
            for branch in value[1]:
                _check(branch, flags, depth + 1)
        elif code is codes.SUBPATTERN:
            _check(value[3], _inside(flags, value), depth + 1)
        elif code not in (*_CHARACTERS, codes.AT, codes.FAILURE):
            raise re.error(f"{str(code).lower()} is not followed in patterns of modules")


def _inside(flags: int, group: tuple[Any, ...]) -> int:
    return int((flags | group[1]) & ~group[2])


class _Run:
    """One pattern on one path."""

    def __init__(self, pattern: str, path: str) -> None:
        self._pattern, self._path = pattern, path
        self._steps = 0
        self._places: dict[str, int] = {}
        for position, char in enumerate(path):
            self._places[char] = self._places.get(char, 0) | 1 << position

    def after(self, items: Iterable[tuple[Any, Any]], places: int, flags: int) -> int:
        """Where ``items`` one after the other may end when they begin at ``places``."""
        for code, value in items:
            if not places:
                break
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise UnsupportedError(
                    f"the pattern {self._pattern[:80]!r} takes more than {_MAX_STEPS} steps on `{self._path[:80]}`", hint="write it without nested repeats"
                )
            places = self._item(code, value, places, flags)
        return places

    def _item(self, code: Any, value: Any, places: int, flags: int) -> int:
        if code in _CHARACTERS:
            fitting = sum(where for char, where in self._places.items() if where & places and _fits(code, value, char, flags))
            return (places & fitting) << 1
        if code in _REPEATS:
            least, most, body = value
            return self._repeat(least, most, body, places, flags)
        if code is codes.BRANCH:
            found = 0
            for branch in value[1]:
                found |= self.after(branch, places, flags)
            return found
        if code is codes.SUBPATTERN:
            return self.after(value[3], places, _inside(flags, value))
        if code in _LOOKS:
            direction, body = value
            return sum(1 << place for place in _bits(places) if self._sees(direction, body, place, flags) == (code is codes.ASSERT))
        return places & self._anchor(value) if code is codes.AT else 0

    def _repeat(self, least: int, most: int, body: Any, places: int, flags: int) -> int:
        for _ in range(least):
            before, places = places, self.after(body, places, flags)
            if places == before:  # one more changes nothing any more
                break
        reached = fresh = places
        for _ in range(most - least):
            fresh = self.after(body, fresh, flags) & ~reached
            if not fresh:
                break
            reached |= fresh
        return reached

    def _sees(self, direction: int, body: Any, place: int, flags: int) -> bool:
        """Lookahead from ``place``, or lookbehind (whose width is fixed) up to it."""
        if direction > 0:
            return bool(self.after(body, 1 << place, flags))
        start = place - int(body.getwidth()[0])
        return start >= 0 and bool(self.after(body, 1 << start, flags) >> place & 1)

    def _anchor(self, kind: Any) -> int:
        length = len(self._path)
        if kind in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
            return 1
        if kind in (codes.AT_END, codes.AT_END_STRING):
            return 1 << length | (1 << length - 1 if kind is codes.AT_END and self._path.endswith("\n") else 0)
        word = sum(where for char, where in self._places.items() if _is_word(char))
        edges = word ^ word << 1
        return edges if kind is codes.AT_BOUNDARY else ~edges & (1 << length + 1) - 1


def _fits(code: Any, value: Any, char: str, flags: int) -> bool:
    """Whether one character is what a part of the pattern asks for."""
    if code is codes.ANY:
        return char != "\n" or bool(flags & re.DOTALL)
    spellings = {char, char.lower(), char.upper()} if flags & re.IGNORECASE else {char}
    numbers = [ord(spelling) for spelling in spellings if len(spelling) == 1]
    if code is not codes.IN:
        return (value in numbers) == (code is codes.LITERAL)
    negated = value[0][0] is codes.NEGATE
    return negated != any(_contains(kind, wanted, char, numbers) for kind, wanted in value[negated:])


def _contains(kind: Any, wanted: Any, char: str, numbers: list[int]) -> bool:
    if kind is codes.CATEGORY:
        return _CATEGORIES[wanted](char)
    low, high = wanted if kind is codes.RANGE else (wanted, wanted)
    return any(low <= number <= high for number in numbers)


def _bits(places: int) -> list[int]:
    return [place for place in range(places.bit_length()) if places >> place & 1]
