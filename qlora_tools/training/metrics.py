"""``metrics.jsonl``: one line per event of a run, written as it happens and read back as the same records.

A line is canonical JSON (sorted keys, no spaces), so equal runs give equal files but for :data:`TIMED_FIELDS`. Values that
are not finite are ``null``. Checkpoints (:class:`Saved`) leave no line: where one falls depends on interruptions, and the
rest of the file must not. A run that goes on from step N keeps the lines up to N and drops what came after, because the
interrupted process may have gone further than its last checkpoint. Left out: drawing (``plot.py``).
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TextIO, get_args, get_type_hints

from qlora_tools.checkpoint.folder import explained_disk_errors, replace_file
from qlora_tools.errors import CorruptError, MissingError
from qlora_tools.training.events import Evaluation, Event, Sample, Saved, Started, Step

FILE_NAME = "metrics.jsonl"
#: What two equal runs may differ in: the clock's doing and the allocator's (an estimate counts what the process holds already).
TIMED_FIELDS = frozenset({"seconds", "tokens_per_s", "peak_bytes", "probe_bytes", "estimate_bytes"})
_KINDS: dict[str, type[Event]] = {kind.kind: kind for kind in (Started, Step, Evaluation, Sample)}
_MAX_BYTES = 1 << 30
_MAX_LINE_CHARACTERS = 4 << 20


class MetricsLog:
    """A listener that appends to ``path``. ``resumed_at``: the step of the checkpoint that the run goes on from; 0 starts anew.

    Raises:
        CorruptError: the file that is to be continued is not one of these. StorageError: the disk refused.
    """

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        self._path = path
        kept = _lines_up_to(path, resumed_at) if resumed_at and path.exists() else []
        self._has_start = bool(kept)
        self._file = self._rewrite(kept)

    def __call__(self, event: Event) -> None:
        """Append ``event``; the line is with the operating system when this returns."""
        if isinstance(event, Saved) or event.kind not in _KINDS:
            return
        if isinstance(event, Started):
            if self._has_start:  # of the first process; the file reads like a run that was never interrupted
                return
            self._has_start = True
        with explained_disk_errors(self._path):
            self._file.write(_line(event))
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, lines: list[str]) -> TextIO:
        """Replace the file by ``lines`` at once and leave it open for appending."""
        replace_file(self._path, "".join(line + "\n" for line in lines).encode())
        with explained_disk_errors(self._path):
            return self._path.open("a", encoding="utf-8", newline="\n")


def read_metrics(path: Path) -> list[Event]:
    """The events of a file, in its order. Kinds and fields of a later version are passed over; ``null`` reads as NaN.

    A last line without its end is left out: the run that writes it is still going, or was killed.

    Raises:
        MissingError: no such file. CorruptError: names the line and what is wrong with it.
    """
    return [event for number, text in enumerate(_lines(path), 1) if (event := _event(text, path, number)) is not None]


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of the events up to ``step``, as they stand."""
    kept = []
    for number, text in enumerate(_lines(path), 1):
        event = _event(text, path, number)
        if event is None or getattr(event, "step", 0) <= step:
            kept.append(text)
    return kept


def _lines(path: Path) -> list[str]:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise CorruptError(f"{path}: {size} bytes are more than a run writes ({_MAX_BYTES})")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingError(f"{path} is not there", hint="give the folder of a training run") from error
    *lines, _unfinished = content.split(b"\n")
    try:
        return [line.decode("utf-8") for line in lines]
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path}: not UTF-8 ({error.reason} at byte {error.start} of a line)") from error


def _line(event: Event) -> str:
    content = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in event.as_dict().items()}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"


def _event(text: str, path: Path, number: int) -> Event | None:
    """One line as its record; ``None`` for a kind that this version does not know."""
    where = f"{path}, line {number}"
    if len(text) > _MAX_LINE_CHARACTERS:
        raise CorruptError(f"{where}: {len(text)} characters are more than an event has")
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: not JSON ({str(error)[:120]})", hint="delete the line; a run resumes without it") from error
    if not isinstance(content, dict) or not isinstance(content.get("event"), str):
        raise CorruptError(f"{where}: an object with its kind under `event` was expected", hint="delete the line; a run resumes without it")
    kind = _KINDS.get(content["event"])
    return None if kind is None else _filled(kind, content, where)


def _filled(kind: type[Event], content: dict[str, Any], where: str) -> Event:
    values = {}
    for name, (types, required) in _fields(kind.kind).items():
        if name not in content:
            if required:
                raise CorruptError(f"{where}: {kind.kind} without `{name}`")
            continue
        value = content[name]
        if value is None and float in types and NoneType not in types:
            value = math.nan
        if type(value) is int and float in types:
            value = _to_float(value)
        if type(value) not in types:
            raise CorruptError(f"{where}: `{name}` is {str(value)[:60]!r}, expected {' or '.join(sorted(kind.__name__ for kind in types))}")
        values[name] = value
    return kind(**values)


@cache
def _fields(name: str) -> dict[str, tuple[tuple[type, ...], bool]]:
    """Of the kind ``name``: field -> (its types, whether it has no default)."""
    kind = _KINDS[name]
    hints = get_type_hints(kind)
    return {item.name: (get_args(hints[item.name]) or (hints[item.name],), item.default is MISSING) for item in fields(kind)}


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
