"""``bench.json`` read back: a foreign file until it is checked."""

from __future__ import annotations

from pathlib import Path

from qlora_tools.bench.checks import check_record
from qlora_tools.bench.plain import from_plain
from qlora_tools.bench.record import FILE_NAME, SCHEMA, BenchRecord
from qlora_tools.errors import CorruptError, MissingError, UsageError
from qlora_tools.manifest import strict_json


def parse_record(content: bytes, source: str = FILE_NAME) -> BenchRecord:
    """A record from its JSON.

    Raises:
        CorruptError: not JSON, another schema, a field missing or of the wrong kind, or parts that do not belong together.
    """
    try:
        value = strict_json(content)
    except ValueError as error:
        raise CorruptError(f"{source} is not JSON: {error}", hint="copy the file again, or measure again") from error
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != SCHEMA:
        raise CorruptError(f"{source}: schema is {str(found)[:40]!r}, expected {SCHEMA!r}", hint="measure again with this version")
    try:
        record = from_plain(BenchRecord, value)
        check_record(record)
    except (TypeError, ValueError, KeyError, UsageError) as error:
        raise CorruptError(f"{source}: {error}", hint="measure again with this version") from error
    return record


def read_record(path: Path) -> BenchRecord:
    """``bench.json``, or the folder that holds it."""
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise MissingError(f"{path}: no such benchmark", hint="run `qlt bench` first")
    return parse_record(path.read_bytes(), str(path))
