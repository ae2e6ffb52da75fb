"""One ``.safetensors`` file: header validated as against an attacker, tensors read with ``pread``.

The rules are those of the format's reference implementation (contiguous tensors from offset 0, no gap, no
overlap, no trailing bytes, sizes that equal dtype x shape) and a few it leaves open: no duplicate keys, the
header begins with ``{``, no control characters in names, a bound on the number of tensors and axes.

Data is read with ``pread`` into fresh memory rather than mapped: mapped pages count into the resident set
and fault when the file changes underfoot, and the engine reads every byte once anyway.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.errors import CorruptError, MissingError, StorageError
from qlora_tools.specs import DTYPES, TensorSpec, byte_view

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 2_000_000
MAX_AXES = 16
MAX_EXTENT = 1 << 48
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_READ_BYTES = 1 << 30
_BROKEN = "download or make the file again"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: absolute byte offset in the file."""

    spec: TensorSpec
    offset: int


class SafetensorsFile:
    """A validated file, open for reading. Close it, or use it as a context manager. Reads are thread-safe.

    Raises (on construction):
        MissingError: no such file. CorruptError: the header breaks a rule. UnsupportedError: unknown dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _open_regular(path)
        try:
            size = os.fstat(self._descriptor).st_size
            self.entries, self.metadata = _read_header(path, self._descriptor, size)
        except BaseException:
            self.close()
            raise
        self.specs: Mapping[str, TensorSpec] = {name: entry.spec for name, entry in self.entries.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The tensor ``name``, or its rows ``[start, stop)`` along axis 0, in the stored dtype, in fresh memory."""
        if name not in self.entries:
            raise MissingError(f"{self.path} holds no tensor `{name}`")
        entry = self.entries[name]
        start, shape, size = 0, entry.spec.shape, entry.spec.nbytes
        if rows is not None:
            assert shape and 0 <= rows[0] <= rows[1] <= shape[0], f"rows {rows} of {entry.spec}"
            start, shape = rows[0] * entry.spec.row_bytes, (rows[1] - rows[0], *shape[1:])
            size = (rows[1] - rows[0]) * entry.spec.row_bytes
        tensor = torch.empty(shape, dtype=entry.spec.torch_dtype)
        if size:
            self._fill(byte_view(tensor), entry.offset + start, name)
        return tensor

    def _fill(self, buffer: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._descriptor, [buffer[done : done + _READ_BYTES]], offset + done)
            except OSError as error:
                raise StorageError(f"{self.path}: reading `{name}` failed: {error.strerror}", hint="check the disk or the network mount") from error
            if count == 0:
                raise CorruptError(f"{self.path} ended inside `{name}`: it was truncated while being read", hint=_BROKEN)
            done += count

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound now: at the interpreter's end `os` may be gone
        if getattr(self, "_descriptor", -1) >= 0:
            close(self._descriptor)
            self._descriptor = -1


def _open_regular(path: Path) -> int:
    """Open without ever blocking on a fifo; only regular files (or links to them, as hub caches use) are let through."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise MissingError(f"{path} is not there", hint="the checkpoint is incomplete: download or copy it again") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be opened: {error.strerror}", hint="check its permissions") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptError(f"{path} is not a regular file", hint="point to a folder of ordinary safetensors files")
    return descriptor


def _read_header(path: Path, descriptor: int, file_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise CorruptError(f"{path} has {file_bytes} bytes: too short for a safetensors file", hint=_BROKEN)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
        raise CorruptError(f"{path}: header length {length} does not fit a file of {file_bytes} bytes", hint=f"truncated, or not a safetensors file: {_BROKEN}")
    raw = os.pread(descriptor, length, 8)
    return parse_header(str(path), raw, file_bytes - 8 - length)


def parse_header(path: str, raw: bytes, data_bytes: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries (in file order, offsets absolute) and metadata of a header followed by ``data_bytes`` of data.

    Raises:
        CorruptError: any rule is broken; the message names the tensor where there is one.
    """
    if not raw.startswith(b"{"):
        raise CorruptError(f"{path}: the header does not begin with `{{`", hint=f"not a safetensors file: {_BROKEN}")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: the header is not valid JSON: {error}", hint=_BROKEN) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptError(f"{path}: `__metadata__` is not a map of strings", hint=_BROKEN)
    if len(header) > MAX_TENSORS:
        raise CorruptError(f"{path}: {len(header)} tensors, at most {MAX_TENSORS} are read", hint="split the file")
    spans = sorted(((*_span(path, name, value), name) for name, value in header.items()), key=lambda span: (span[0], span[1]))
    base, end, entries = 8 + len(raw), 0, {}
    for start, stop, spec, name in spans:
        if start != end:
            raise CorruptError(f"{path}: `{name}` begins at byte {start}, expected {end}: tensors overlap or leave a gap", hint=_BROKEN)
        entries[name] = Entry(spec, base + start)
        end = stop
    if end != data_bytes:
        raise CorruptError(f"{path}: the header speaks of {end} data bytes, the file holds {data_bytes}", hint=f"truncated or padded: {_BROKEN}")
    return entries, metadata


def _span(path: str, name: str, value: Any) -> tuple[int, int, TensorSpec]:
    if _CONTROL.search(name) or not name or len(name) > 4096:
        raise CorruptError(f"{path}: a tensor is named {name[:80]!r}", hint=_BROKEN)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptError(f"{path}: the entry of `{name}` does not hold dtype, shape and data_offsets", hint=_BROKEN)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptError(
            f"{path}: `{name}` has dtype {str(dtype)[:40]!r}; known are {', '.join(DTYPES)}", hint="convert the checkpoint to bf16, fp16 or fp32 first"
        )
    if not _whole_numbers(shape) or len(shape) > MAX_AXES or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CorruptError(f"{path}: `{name}` has shape {shape!r} at {offsets!r}", hint=_BROKEN)
    spec = TensorSpec(name, dtype, tuple(shape))
    start, stop = offsets
    if spec.numel > MAX_EXTENT or stop - start != spec.nbytes:
        raise CorruptError(f"{path}: `{spec}` needs {spec.nbytes} bytes, its offsets span {stop - start}", hint=_BROKEN)
    return start, stop, spec


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_EXTENT for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
