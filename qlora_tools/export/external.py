"""The external data file beside a graph: every offset known first, tensors written in any order.

Offsets are multiples of 4 KiB so that the runtime can map a tensor by itself. One regular file with one link:
the readers of ONNX refuse anything else. The file's size is reserved before the first tensor, and closing
checks that every byte of every tensor was written.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch

from qlora_tools.checkpoint.writer import check_piece, reserve, write_all
from qlora_tools.names import shortened
from qlora_tools.specs import TensorSpec, byte_view

ALIGNMENT = 4096


def place(specs: Iterable[TensorSpec]) -> tuple[dict[str, int], int]:
    """Offset of each tensor, in the given order, and the size of the file."""
    offsets, position = {}, 0
    for spec in specs:
        assert spec.name not in offsets, f"two tensors named {spec.name}"
        offsets[spec.name] = position
        position += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, position


def read_stored(path: Path, spec: TensorSpec, offset: int, rows: tuple[int, int]) -> torch.Tensor:
    """The rows ``[start, stop)`` of the tensor ``spec`` that begins at ``offset`` of a finished file."""
    start, stop = rows
    assert 0 <= start <= stop <= spec.shape[0], f"rows {rows} of {spec}"
    return read_elements(path, spec, offset + start * spec.row_bytes, (stop - start) * spec.row_bytes).view(stop - start, *spec.shape[1:])


def read_elements(path: Path, spec: TensorSpec, position: int, nbytes: int) -> torch.Tensor:
    """The elements of the tensor ``spec`` in ``nbytes`` bytes from ``position`` of a finished file, flat."""
    with path.open("rb") as stream:
        stream.seek(position)
        data = bytearray(stream.read(nbytes))
    assert len(data) == nbytes, f"{path.name} ends inside {spec.name}"
    return torch.frombuffer(data, dtype=spec.torch_dtype)


class ExternalWriter:
    """A :class:`~qlora_tools.engine.run.Writer`; a context manager that checks coverage on leaving without an exception."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        self.path = path
        listed = tuple(specs)
        self._specs = {spec.name: spec for spec in listed}
        self.offsets, self.file_bytes = place(listed)
        self._written: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        reserve(self._descriptor, path, self.file_bytes)

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Store ``tensor`` as rows starting at ``row`` of ``name``; dtype and trailing shape must be the planned ones."""
        spec = self._specs[name]
        check_piece(spec, tensor, row)
        data = byte_view(tensor)
        write_all(self._descriptor, data, self.offsets[name] + row * spec.row_bytes)
        with self._lock:
            self._written[name] += len(data)

    def __enter__(self) -> ExternalWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        os.close(self._descriptor)
        if kind is None:
            missing = [name for name, spec in self._specs.items() if self._written[name] != spec.nbytes]
            assert not missing, f"{self.path.name}: not written or written twice: {shortened(missing)}"
