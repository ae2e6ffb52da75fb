"""The GGUF container, as far as adapters use it: a strict reader and a writer of small files of float tensors.

Written after the format's specification (version 3, little endian; version 2 has the same layout)::

    "GGUF" u32 version, u64 tensors, u64 values
    values:  string key, u32 type, value          string = u64 length + UTF-8
    tensors: string name, u32 axes, u64 sizes (fastest axis first), u32 type, u64 offset
    padding to `general.alignment` (32), then the tensors at their offsets

Every count, length, size and offset is checked against the file before anything is allocated. Leaves out quantized tensor
types, big endian and split files, and what the names mean (``gguf.py``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qlora_tools.errors import CorruptError, MissingError, UnsupportedError
from qlora_tools.names import natural_key
from qlora_tools.specs import byte_view

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
_MAX_VALUES, _MAX_TENSORS, _MAX_TEXT_BYTES, _MAX_ITEMS = 4096, 65_536, 1 << 20, 1 << 20
_MAX_NAME_BYTES = 63  # one less than the runtime's fixed buffer
_MAX_AXES = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_TYPES = {dtype: code for code, dtype in _DTYPES.items()}


class _Cursor:
    """Reads forward through a file of known size; asking for more than is left is an error, never a short read."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self.path, self.size, self.position = file, path, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise CorruptError(f"{self.path} ends at byte {self.size}, but its header reads on to {self.position + count}", hint="fetch the file again")
        data = self._file.read(count)
        if len(data) != count:
            raise CorruptError(f"{self.path} became shorter while it was read")
        self.position += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str, most: int) -> int:
        value = int(self.number("Q"))
        if value > most:
            raise CorruptError(f"{self.path} states {value} {what}, at most {most} are read")
        return value

    def text(self) -> str:
        raw = self.take(self.count("bytes of text", min(_MAX_TEXT_BYTES, self.size)))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CorruptError(f"{self.path}: text at byte {self.position} is not UTF-8") from error


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The values and the tensors (row-major, last axis fastest) of a GGUF file.

    Raises:
        MissingError: no such file. CorruptError: not GGUF, or counts, types, sizes or offsets that do not hold together.
        UnsupportedError: another version, byte order or a quantized tensor.
    """
    if not path.is_file():
        raise MissingError(f"{path} is not a file")
    with path.open("rb") as file:
        cursor = _Cursor(file, path, path.stat().st_size)
        _check_magic(cursor)
        tensors, values = cursor.count("tensors", _MAX_TENSORS), cursor.count("values", _MAX_VALUES)
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = cursor.text()
            if key in metadata:
                raise CorruptError(f"{path} states `{key}` twice")
            metadata[key] = _value(cursor)
        entries = [_entry(cursor) for _ in range(tensors)]
        start = _padded(cursor.position, _alignment(metadata, path))
        spans = _checked_spans(entries, path, start, _alignment(metadata, path), cursor.size)
        return metadata, {name: _tensor(file, path, *span) for name, span in spans.items()}


def write_file(path: Path, metadata: Mapping[str, str | int | float], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a version 3 file; strings, whole numbers (u32) and floats (f32) as values, tensors in natural order of their names."""
    ordered = sorted(tensors, key=natural_key)
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(ordered), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _packed(value)
    offset = 0
    for name in ordered:
        tensor = tensors[name]
        assert tensor.dtype in _TYPES and 0 < tensor.ndim <= _MAX_AXES, f"{name}: {tensor.dtype} {list(tensor.shape)}"
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise UnsupportedError(f"the tensor name `{name}` is longer than the {_MAX_NAME_BYTES} bytes that readers of GGUF allow")
        header += _text(name) + struct.pack(f"<I{tensor.ndim}QIQ", tensor.ndim, *reversed(tensor.shape), _TYPES[tensor.dtype], offset)
        offset += _padded(tensor.numel() * tensor.element_size(), _ALIGNMENT)
    with path.open("xb") as file:
        file.write(header + bytes(-len(header) % _ALIGNMENT))
        for name in ordered:
            data = byte_view(tensors[name])
            file.write(data)
            file.write(bytes(-len(data) % _ALIGNMENT))


def _check_magic(cursor: _Cursor) -> None:
    magic = cursor.take(4)
    if magic in (b"algg", b"ggla"):
        raise UnsupportedError(f"{cursor.path} is a `ggla` adapter of 2023, which no current runtime reads", hint="convert the PEFT folder it was made from")
    if magic != MAGIC:
        raise CorruptError(f"{cursor.path} begins with {magic!r}, expected {MAGIC!r}", hint="this is not a GGUF file")
    version = cursor.number("I")
    if version not in _VERSIONS:
        order = " (big endian?)" if version & 0xFFFF == 0 else ""
        raise UnsupportedError(f"{cursor.path} is GGUF version {version}{order}, expected {' or '.join(map(str, _VERSIONS))}")


def _value(cursor: _Cursor) -> Any:
    kind = cursor.number("I")
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        kind = cursor.number("I")
        count = cursor.count("array items", min(_MAX_ITEMS, cursor.size))
        if kind == _STRING:
            return [cursor.text() for _ in range(count)]
        code = _scalar_code(cursor, kind)
        return list(struct.unpack(f"<{count}{code}", cursor.take(count * struct.calcsize("<" + code))))
    value = cursor.number(_scalar_code(cursor, kind))
    return bool(value) if kind == _BOOL else value


def _scalar_code(cursor: _Cursor, kind: int) -> str:
    if kind not in _SCALARS:
        raise CorruptError(f"{cursor.path}: unknown value type {kind} before byte {cursor.position}")
    return _SCALARS[kind]


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape with the last axis fastest, type, offset)."""
    name, axes = cursor.text(), cursor.number("I")
    if not 0 < axes <= _MAX_AXES:
        raise CorruptError(f"{cursor.path}: `{name}` has {axes} axes, expected 1 to {_MAX_AXES}")
    sizes = struct.unpack(f"<{axes}Q", cursor.take(8 * axes))
    return name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")


def _alignment(metadata: Mapping[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(value, int) or not 8 <= value <= 1 << 16 or value & (value - 1):
        raise CorruptError(f"{path}: general.alignment is {value!r}, expected a power of two")
    return value


def _checked_spans(
    entries: list[tuple[str, tuple[int, ...], int, int]], path: Path, start: int, alignment: int, size: int
) -> dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]]:
    """Name -> (first byte, bytes, dtype, shape), all inside the file, aligned and apart from each other."""
    spans: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
    end = start
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        if kind not in _DTYPES:
            raise UnsupportedError(f"{path}: `{name}` has GGML type {kind}; F32, F16 and BF16 are read", hint="convert the adapter again with --outtype f16")
        if name in spans:
            raise CorruptError(f"{path} lists `{name}` twice")
        count = math.prod(shape) * _DTYPES[kind].itemsize
        first = start + offset
        if not count or offset % alignment or first < end or first + count > size:
            raise CorruptError(f"{path}: `{name}` {list(shape)} at offset {offset} is empty, not aligned, overlaps another tensor or leaves the file")
        spans[name] = (first, count, _DTYPES[kind], shape)
        end = first + count
    return {entry[0]: spans[entry[0]] for entry in entries}


def _tensor(file: BinaryIO, path: Path, first: int, count: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    data = bytearray(count)
    file.seek(first)
    if file.readinto(data) != count:  # type: ignore[attr-defined]
        raise CorruptError(f"{path} became shorter while it was read")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _padded(position: int, alignment: int) -> int:
    return position + -position % alignment


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _packed(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
