"""Training data as files hold it: plain text, JSON lines, a JSON list, or a Hugging Face datasets folder.

Four kinds of record, told apart by their keys; where a record fits several, the first of this list counts:

* ``messages``: ``messages`` of ``role`` and ``content`` (optionally ``tools``); also ``conversations`` with ``from`` and
  ``value``, ``instruction``/``input``/``output`` and ``question``/``answer``, which say nothing of how the two are
  joined and therefore become a user's and an assistant's turn;
* ``completion``: ``prompt`` and ``completion`` (or ``response``), joined as they stand;
* ``labelled``: ``text`` (or ``sentence``) and ``label``;
* ``text``: ``text``. A text file is one ``stream``, cut into windows when it is tokenised.

Every file is read as hostile: sizes are bounded, a bad line is named, nothing in it is run. Lines end at ``\\n`` alone,
because JSON strings may hold the other separators of Unicode. Left out: downloading, and templates of instructions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, StorageError, UnsupportedError, UsageError

KINDS = ("messages", "completion", "labelled", "text", "stream")
EXPECTED = "one of {text}, {prompt, completion}, {messages}, {text, label}"
_MAX_FILE_BYTES = 8 << 30
_MAX_LINE_BYTES = 64 << 20
_MAX_RECORDS = 50_000_000
_SHOWN_CHARS = 80
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_HF_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")

Row = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """Normalised rows with the line (from 1) that each came from. ``sha256`` is of the file's bytes, or of the rows of a folder.

    Keys of a row by kind: ``text``; ``prompt``, ``completion``; ``messages`` and perhaps ``tools``; ``text``, ``label``.
    ``blank``: how many records of nothing but white space were left out. ``unit``: what a line number counts.
    """

    kind: str
    rows: tuple[Row, ...]
    lines: tuple[int, ...]
    sha256: str
    path: Path
    blank: int = 0
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The place of a row, for messages."""
        return _place(self.path, self.lines[index], self.unit)

    def take(self, indices: Iterable[int]) -> Records:
        """The rows of these numbers, in this order."""
        chosen = list(indices)
        return replace(self, rows=tuple(self.rows[index] for index in chosen), lines=tuple(self.lines[index] for index in chosen))


def read_records(path: Path, *, split: str | None = None) -> Records:
    """Read ``.txt``, ``.jsonl``, ``.json`` or a datasets folder; ``split`` picks a part of a folder that has several.

    Raises:
        MissingError, StorageError: not there; not readable. CorruptError: a line that is no record, by its number.
        IncompatibleError: records of different kinds. UnsupportedError: another format, or ``datasets`` is not
        installed. UsageError: no records, or a split that is not there.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, split)
    if not path.is_file():
        raise MissingError(f"{path}: no such data file or folder")
    if split is not None:
        raise UsageError(f"split {split!r} of {path.name}: only datasets folders have splits", hint="give the file of that split")
    suffix = path.suffix.lower()
    if suffix not in (".txt", ".md", ".jsonl", ".ndjson", ".json"):
        message = f"{path}: data files end in .txt, .jsonl or .json, found {suffix or 'no ending'!r}"
        raise UnsupportedError(message, hint="rename it to what it holds, or save it with datasets' save_to_disk and give the folder")
    data = _read_bytes(path)
    sha256 = hashlib.sha256(data).hexdigest()
    if suffix in (".txt", ".md"):
        text = _decode(data, str(path)).replace("\r\n", "\n")
        if not text.strip():
            raise UsageError(f"{path} holds no text")
        return Records("stream", ({"text": text},), (1,), sha256, path)
    numbered = _json_list(path, data) if suffix == ".json" else _json_lines(path, data)
    return _gather(path, numbered, sha256, "entry" if suffix == ".json" else "line")


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise UnsupportedError(f"{path} has {size:,} bytes, above the {_MAX_FILE_BYTES:,} that are read at once", hint="split it")
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, UnsupportedError):
            raise
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{where} is not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from error


def _json_lines(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) > _MAX_LINE_BYTES:
            raise CorruptError(f"{where} has {len(line):,} bytes, above {_MAX_LINE_BYTES:,} for one record")
        yield number, _parse(_decode(line, where), where, EXPECTED)


def _json_list(path: Path, data: bytes) -> Iterator[tuple[int, Any]]:
    entries = _parse(_decode(data, str(path)), str(path), "a list of records")
    if not isinstance(entries, list):
        raise CorruptError(f"{path}: found {_shown(entries)}, expected a list of records", hint="one record a line is a .jsonl file")
    return enumerate(entries, start=1)


def _parse(text: str, where: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise CorruptError(f"{where} is nested too deeply to be a record") from error
    except ValueError as error:  # also numbers of too many digits
        raise CorruptError(f"{where} is not JSON ({error}): found {_cut(text)!r}, expected {expected}") from error


def _read_folder(path: Path, split: str | None) -> Records:
    if not any((path / name).is_file() for name in _HF_MARKS):
        message = f"{path} is not a datasets folder: it holds none of {', '.join(_HF_MARKS)}"
        raise UnsupportedError(message, hint="give a .txt or .jsonl file, or a folder written by datasets' save_to_disk")
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(f"{path} needs the datasets package, which is not installed", hint="pip install datasets, or convert it to .jsonl") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError) as error:  # what pyarrow and json raise on damaged files
        raise CorruptError(f"{path} cannot be opened as a datasets folder: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        chosen = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
        if chosen not in loaded:
            raise UsageError(f"{path} has no split {chosen!r}; it has {', '.join(sorted(loaded))}", hint="name one of them")
        loaded = loaded[chosen]
    elif split is not None:
        raise UsageError(f"{path} has no splits, so {split!r} cannot be picked")
    found = _gather(path, enumerate(loaded, start=1), "", "row")
    digest = hashlib.sha256()
    for row in found.rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return replace(found, sha256=digest.hexdigest())


def _gather(path: Path, numbered: Iterable[tuple[int, Any]], sha256: str, unit: str) -> Records:
    kind, first, blank = "", 0, 0
    rows: list[Row] = []
    lines: list[int] = []
    for number, raw in numbered:
        where = _place(path, number, unit)
        found, row = _record(raw, where)
        if kind and found != kind:
            message = f"{where} is a {found} record, but {_place(path, first, unit)} is a {kind} record"
            raise IncompatibleError(message, hint="train on one kind at a time: split the file")
        kind, first = found, first or number
        if kind == "text" and not row["text"].strip():
            blank += 1
            continue
        if len(rows) >= _MAX_RECORDS:
            raise UnsupportedError(f"{path} has more than {_MAX_RECORDS:,} records", hint="split it")
        rows.append(row)
        lines.append(number)
    if not rows:
        raise UsageError(f"{path} holds no records" + (f", only {blank} blank texts" if blank else ""), hint=f"each line is {EXPECTED}")
    return Records(kind, tuple(rows), tuple(lines), sha256, path, blank, unit)


def _record(raw: Any, where: str) -> tuple[str, Row]:
    """(kind, normalised row) of one parsed record."""
    if not isinstance(raw, dict):
        raise CorruptError(f"{where}: found {_shown(raw)}, expected {EXPECTED}")
    has = raw.keys()
    for key in ("messages", "conversations"):
        if key in has:
            row: Row = {"messages": _messages(raw[key], where, key)}
            if raw.get("tools"):
                row["tools"] = _plain_list(raw["tools"], where, "tools")
            return "messages", row
    for asked, answered in (("instruction", "output"), ("instruction", "response"), ("question", "answer")):
        if asked in has and answered in has:
            extra = _text(raw["input"], where, "input") if raw.get("input") else ""
            question = _text(raw[asked], where, asked) + ("\n\n" + extra if extra else "")
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(raw[answered], where, answered)}]
            return "messages", {"messages": turns}
    for key in ("completion", "response"):
        if "prompt" in has and key in has:
            return "completion", {"prompt": _text(raw["prompt"], where, "prompt"), "completion": _text(raw[key], where, key)}
    for key in ("text", "sentence"):
        if key in has and "label" in has:
            return "labelled", {"text": _text(raw[key], where, key), "label": _label(raw["label"], where)}
    if "text" in has:
        return "text", {"text": _text(raw["text"], where, "text")}
    keys = ", ".join(sorted(map(str, raw))[:8]) or "none"
    raise CorruptError(f"{where}: found a record with keys {_cut(keys)}, expected {EXPECTED}", hint="rename the keys")


def _messages(value: Any, where: str, key: str) -> list[Row]:
    turns = []
    for position, turn in enumerate(_plain_list(value, where, key), start=1):
        place = f"{where}: {key}[{position}]"
        if not isinstance(turn, dict):
            raise CorruptError(f"{place}: found {_shown(turn)}, expected {{role, content}}")
        role, content = (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
        if not isinstance(role, str):
            raise CorruptError(f"{place}: found keys {_cut(', '.join(sorted(map(str, turn))))}, expected role and content (or from and value)")
        calls = turn.get("tool_calls")
        kept: Row = {
            "role": _ROLES.get(_text(role, place, "role"), role),
            "content": _text(content if content is not None or not calls else "", place, "content"),
        }
        for extra in ("tool_calls", "tool_call_id", "name", "reasoning_content"):
            if turn.get(extra):
                kept[extra] = turn[extra]
        turns.append(kept)
    if not turns:
        raise CorruptError(f"{where}: {key} is empty, expected at least one turn")
    return turns


def _plain_list(value: Any, where: str, key: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise CorruptError(f"{where}: {key} is {_shown(value)}, expected a list")
    return value


def _text(value: Any, where: str, key: str) -> str:
    if not isinstance(value, str):
        raise CorruptError(f"{where}: {key} is {_shown(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorruptError(f"{where}: {key} holds half of a surrogate pair at character {error.start}, which is no text") from error
    return value


def _label(value: Any, where: str) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise CorruptError(f"{where}: label is {_shown(value)}, expected a name or a class number")
    return _text(value, where, "label") if isinstance(value, str) else value


def _place(path: Path, number: int, unit: str) -> str:
    return f"{path}:{number}" if unit == "line" else f"{path}, {unit} {number}"


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {_cut(repr(value))}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
