"""How many bytes of weights a graph holds, told by its file.

The package onnx would read the graph too, but importing it and holding the graph as objects would be counted as the engine's wherever memory is measured. So the
fields of the file are stepped over where they lie (protobuf's wire format, the numbers of onnx.proto) and no weight is read.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

from qlora_tools.errors import CorruptError

_VARINT, _LENGTH = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
#: ModelProto.graph, GraphProto.initializer; TensorProto: dims, data_type, raw_data, external_data, data_location; the key and value of an entry.
_GRAPH, _INITIALIZER = 7, 5
_DIMS, _TYPE, _RAW, _ENTRY, _LOCATION = 1, 2, 9, 13, 14
_KEY, _VALUE = 1, 2
_EXTERNAL = 1
#: Bits of an element by TensorProto.DataType; a text has none.
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
    **dict.fromkeys((27, 28), 6),
    8: 0,
    15: 128,
}
_Place = tuple[str, int, int]


def initializer_bytes(path: Path) -> int:
    """The initializers of the graph at ``path``, each in its stored form: in the file or beside it. Those over the very same bytes of a file beside it count once.

    Raises:
        CorruptError: not a graph.
    """
    total, places = 0, set[_Place]()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for start, stop in _initializers(data):
                nbytes, place = _tensor(data, start, stop)
                total += 0 if place in places else nbytes
                places |= {place} if place else set()
    except ValueError as error:
        raise CorruptError(f"{path} is not an ONNX graph: {error}", hint="export again") from error
    return total


def _initializers(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    for number, start, stop in _fields(data, 0, len(data)):
        if number == _GRAPH:
            yield from ((at, end) for inner, at, end in _fields(data, start, stop) if inner == _INITIALIZER)


def _tensor(data: mmap.mmap, start: int, stop: int) -> tuple[int, _Place | None]:
    """(bytes of a tensor, the file beside the graph that has them with offset and length there)."""
    dims, kind, raw, is_external, entries = list[int](), 0, None, False, dict[str, str]()
    for number, at, end in _fields(data, start, stop):
        if number == _DIMS:
            dims += _numbers(data, at, end)
        elif number == _TYPE:
            kind = _varint(data, at, end)[0]
        elif number == _RAW:
            raw = end - at
        elif number == _LOCATION:
            is_external = _varint(data, at, end)[0] == _EXTERNAL
        elif number == _ENTRY:
            texts = {inner: data[first:last].decode() for inner, first, last in _fields(data, at, end)}
            entries[texts.get(_KEY, "")] = texts.get(_VALUE, "")
    if not is_external and raw is not None:
        return raw, None
    if kind not in _BITS:
        raise ValueError(f"a tensor of type {kind}")
    dense = -(-math.prod(dims) * _BITS[kind] // 8)
    if not is_external:
        return dense, None
    offset, nbytes = int(entries.get("offset") or 0), int(entries.get("length") or dense)
    if offset < 0 or nbytes < 0:
        raise ValueError(f"a tensor of {nbytes} bytes at {offset}")
    return nbytes, (entries.get("location", ""), offset, nbytes)


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin and end of the content) of every field from ``start`` to ``stop``; the content of a number is its varint.

    Raises:
        ValueError: no protobuf.
    """
    at = start
    while at < stop:
        tag, at = _varint(data, at, stop)
        kind = tag & 7
        if kind == _VARINT:
            end = _varint(data, at, stop)[1]
        elif kind == _LENGTH:
            length, at = _varint(data, at, stop)
            end = at + length
        elif kind in _FIXED_BYTES:
            end = at + _FIXED_BYTES[kind]
        else:
            raise ValueError(f"a field of unknown kind {kind} before byte {at}")
        if end > stop:
            raise ValueError(f"a field from byte {at} to {end}, where {stop} is the end")
        yield tag >> 3, at, end
        at = end


def _numbers(data: mmap.mmap, start: int, stop: int) -> list[int]:
    """One number, or those of a packed list."""
    found, at = [], start
    while at < stop:
        number, at = _varint(data, at, stop)
        found.append(number)
    return found


def _varint(data: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """(the number of seven bits a byte, lowest first, that begins at ``start``; where it ends)."""
    number = 0
    for place, at in enumerate(range(start, min(stop, start + 10))):
        byte = data[at]
        number |= (byte & 127) << (7 * place)
        if byte < 128:
            return number, at + 1
    raise ValueError(f"a number at byte {start} without an end")
