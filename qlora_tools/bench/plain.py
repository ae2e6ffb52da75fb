"""Frozen records to JSON values and back, checked by their annotations.

A reader ignores keys it does not know, so that a later version may add some; a field that is missing or of the wrong kind is told with its place.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def to_plain(value: Any) -> Any:
    """Records as objects, tuples as lists, a number that is not finite as ``None``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_plain(kind: type[Record], value: Any) -> Record:
    """A record of class ``kind`` from :func:`to_plain`'s result.

    Raises:
        ValueError, TypeError: a field is missing or of the wrong kind; what the record itself raises.
    """
    record: Record = _build(kind, value, "")
    return record


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type ``kind``; ``where`` is the path for the message."""
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        options = get_args(kind)
        if value is None and type(None) in options:
            return None
        return _build(next(option for option in options if option is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(value, dict), where, "an object", value)
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], value[name], f"{where}.{name}".lstrip(".")) for name in hints if name in value})  # type: ignore[operator]
    if origin is tuple:
        _expect(isinstance(value, list), where, "a list", value)
        kinds = get_args(kind)
        kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_build(item_kind, item, f"{where}[{i}]") for i, (item_kind, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is Literal:
        _expect(value in get_args(kind), where, f"one of {get_args(kind)}", value)
        return value
    if kind in (dict, Mapping) or (origin is not None and issubclass(origin, Mapping)):
        _expect(isinstance(value, dict), where, "an object", value)
        item_kind = get_args(kind)[1] if get_args(kind) else Any
        return {name: _build(item_kind, item, f"{where}.{name}".lstrip(".")) for name, item in value.items()}
    accepted = (int, float) if kind is float else kind
    _expect(isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _expect(condition: bool, where: str, expected: str, found: Any) -> None:
    if not condition:
        raise ValueError(f"`{where}` is {type(found).__name__} {str(found)[:40]!r}, expected {expected}")
