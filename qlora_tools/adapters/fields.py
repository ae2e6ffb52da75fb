"""Typed access to the fields of an untrusted JSON object; every refusal names file, field, value and expectation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora_tools.adapters.path_patterns import path_pattern
from qlora_tools.errors import CorruptError

_MAX_PATTERN = 4096
_MAX_RANK = 1 << 20
_MAX_NUMBER = 1e300


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, false, or empty."""
    return value is None or value is False or value in ("", [], {})


class Fields:
    """Typed access to the fields; each method raises CorruptError with field, value and expectation."""

    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self._content, self._where = content, where

    def _wrong(self, name: str, value: Any, expected: str) -> CorruptError:
        return CorruptError(f"{self._where}: `{name}` is {str(value)[:80]!r}, expected {expected}", hint="download or save the adapter again")

    def checked_rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            raise self._wrong(name, value, "a rank of at least 1")
        return value

    def checked_number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_NUMBER < value < _MAX_NUMBER:
            raise self._wrong(name, value, "a finite number")
        return float(value)

    def rank(self, name: str, default: int) -> int:
        return self.checked_rank(name, self._content.get(name, default))

    def number(self, name: str, default: float) -> float:
        return self.checked_number(name, self._content.get(name, default))

    def flag(self, name: str) -> bool:
        value = self._content.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self._content.get(name) or allowed[0]
        if value not in allowed:
            raise self._wrong(name, value, f"one of {', '.join(allowed)}")
        return str(value)

    def regex(self, name: str, pattern: str) -> str:
        if len(pattern) > _MAX_PATTERN:
            raise self._wrong(name, pattern, f"a pattern of at most {_MAX_PATTERN} characters")
        try:
            path_pattern(pattern)
        except re.error as error:
            raise self._wrong(name, pattern, f"a regular expression ({error})") from None
        except (RecursionError, OverflowError):
            raise self._wrong(name, pattern, "a regular expression") from None
        return pattern

    def patterns(self, name: str) -> dict[str, Any]:
        value = self._content.get(name) or {}
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object of pattern -> value")
        return {self.regex(name, key): item for key, item in value.items()}

    def names(self, name: str) -> tuple[str, ...]:
        value = self._content.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(name, value, "a list of names")
        return tuple(value)

    def selection(self, name: str) -> str | tuple[str, ...] | None:
        value = self._content.get(name)
        return self.regex(name, value) if isinstance(value, str) else None if value is None else self.names(name)

    def integers(self, name: str, value: Any = None) -> tuple[int, ...]:
        value = self._content.get(name) if value is None else value
        value = [] if value is None else [value] if type(value) is int else value
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise self._wrong(name, value, "a list of numbers from 0")
        return tuple(value)

    def token_indices(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        value = self._content.get("trainable_token_indices")
        if isinstance(value, dict):
            return {str(key): self.integers(f"trainable_token_indices[{key!r}]", item) for key, item in value.items()}
        return self.integers("trainable_token_indices")
