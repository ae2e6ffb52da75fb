"""What a benchmark has measured so far, one line per worker process, so that an interruption costs one process and not all.

The first line is the plan. Going on with another plan (other settings, files, work, versions or machine) is refused, since its figures would not
belong together; only the number of rounds may differ. Every line is on disk before the next process starts. A last line that was cut off is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from qlora_tools.bench.plain import from_plain, to_plain
from qlora_tools.bench.record import Setting
from qlora_tools.bench.rows import weight_files
from qlora_tools.errors import CorruptError, IncompatibleError, StorageError
from qlora_tools.manifest import FILE_NAME as MANIFEST
from qlora_tools.manifest import sha256_file

SCHEMA = "qlt.bench-journal/1"
_EDGE_BYTES = 1 << 20
_SAMPLE_BYTES = 64 << 10
Result = TypeVar("Result")


class Journal:
    """The results of finished processes by what they were asked. Without a path nothing is kept.

    Raises:
        IncompatibleError: the file is of another plan. CorruptError: it is no journal. StorageError: it cannot be written.
    """

    def __init__(self, path: Path | None, plan: Mapping[str, Any]) -> None:
        self._results: dict[str, Any] = {}
        self._stream: IO[bytes] | None = None
        self.recalled = 0
        if path is None:
            return
        kept = _whole_lines(path)
        if kept:
            _check_plan(path, kept[0], to_plain(plan))
            self._results = dict(_parsed(path, line) for line in kept[1:])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("r+b" if kept else "wb")
            self._stream.truncate(sum(map(len, kept)))
            self._stream.seek(0, os.SEEK_END)
            if not kept:
                self._append({"schema": SCHEMA, "plan": to_plain(plan)})
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}", hint="give the run a folder that can be written") from error

    def once(self, key: Sequence[Any], kind: type[Result], measure: Callable[[], Result]) -> Result:
        """The result under ``key`` if an earlier part of the run has it, else what ``measure`` gives, kept before it is returned."""
        name = json.dumps(to_plain(list(key)))
        if name in self._results:
            self.recalled += 1
            try:
                return from_plain(kind, self._results[name])
            except (ValueError, TypeError, KeyError) as error:
                raise CorruptError(f"the journal's entry {name} is no result: {error}", hint="remove the file and start anew") from error
        result = measure()
        self._append({"key": to_plain(list(key)), "value": to_plain(result)})
        return result

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._stream is not None:
            self._stream.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._stream.flush()
            os.fsync(self._stream.fileno())


def plan_of(settings: Sequence[Setting], reference: Setting | None = None, **parts: Any) -> dict[str, Any]:
    """What must be the same for two parts of a run to belong together: each setting with its files, the ``reference`` too where it is none of them, and
    ``parts`` by name."""
    named = {f"setting `{setting.id}`": setting for setting in settings}
    if reference is not None and reference not in settings:
        named[f"reference `{reference.id}`"] = reference
    listed = {
        # why one cannot run may be worded otherwise the next time, with the bytes that were free for instance
        name: {**to_plain(setting), "unavailable": setting.unavailable is not None, "files": _marks(setting.path)}
        for name, setting in named.items()
    }
    return {**listed, "order of settings": [setting.id for setting in settings], **{name.replace("_", " "): to_plain(part) for name, part in parts.items()}}


def digest(value: Any) -> str:
    """A long part of a plan in short."""
    return hashlib.sha256(json.dumps(to_plain(value), sort_keys=True).encode()).hexdigest()


def _marks(path: str | None) -> list[list[Any]]:
    """Name, size and a hash of pieces of every weight file: gigabytes need no reading, and a model made again has other bytes somewhere there.

    Both ends may outlive training: embeddings come first, the head last. So there are pieces from between, and where the folder has a manifest, which
    lists the hash of every file, the manifest itself.
    """
    found: list[list[Any]] = []
    manifest = Path(path) / MANIFEST if path is not None else None
    if manifest is not None and manifest.is_file():
        found.append([manifest.name, manifest.stat().st_size, sha256_file(manifest)])
    for file in weight_files(path):
        size, seen = file.stat().st_size, hashlib.sha256()
        with file.open("rb") as stream:
            for start, length in ((0, _EDGE_BYTES), *((size * part // 4, _SAMPLE_BYTES) for part in (1, 2, 3)), (max(size - _EDGE_BYTES, 0), _EDGE_BYTES)):
                stream.seek(start)
                seen.update(stream.read(length))
        found.append([file.name, size, seen.hexdigest()])
    return found


def _whole_lines(path: Path) -> list[bytes]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from error
    return [line for line in lines if line.endswith(b"\n")]


def _check_plan(path: Path, line: bytes, plan: Mapping[str, Any]) -> None:
    try:
        head = json.loads(line)
        found, schema = head["plan"], head["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(f"{path} is no benchmark's journal", hint="give another path, or remove the file") from error
    if schema != SCHEMA:
        raise CorruptError(f"{path}: schema is {schema!r}, expected {SCHEMA!r}", hint="remove the file and start anew")
    changed = sorted(name for name in found.keys() | plan.keys() if found.get(name) != plan.get(name))
    if changed:
        raise IncompatibleError(
            f"{path} is of another benchmark: {', '.join(changed[:4])}{' and more' if len(changed) > 4 else ''} changed since the interruption",
            hint="repeat the command as it was, or remove the file to start anew",
        )


def _parsed(path: Path, line: bytes) -> tuple[str, Any]:
    try:
        entry = json.loads(line)
        return json.dumps(entry["key"]), entry["value"]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptError(f"{path} holds a line that is no result: {line[:60]!r}", hint="remove the file and start anew") from error
