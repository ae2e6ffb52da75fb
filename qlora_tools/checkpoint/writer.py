"""Streaming safetensors output: all specs known first, header written, space reserved, tensors at their offsets.

The layout depends on the specs alone (sorted, aligned), so the same input gives the same bytes whatever the
order in which tensors arrive. Nothing here is atomic by itself: write into the folder that
``output_folder`` yields.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from qlora_tools.checkpoint.reader import INDEX, SINGLE
from qlora_tools.errors import StorageError
from qlora_tools.manifest import canonical_json
from qlora_tools.names import natural_key, shortened
from qlora_tools.specs import TensorSpec, byte_view, dtype, spec_of

MAX_SHARD_BYTES = 5_000_000_000
_ALIGNMENT = 8
_FORMAT = {"format": "pt"}


class SafetensorsWriter:
    """One file of known content. ``write`` may be called from any thread in any order; ``close`` checks that nothing is missing."""

    def __init__(self, path: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str] = _FORMAT) -> None:
        self.path = path
        ordered = sorted(specs, key=lambda spec: (-dtype(spec.dtype).bits, spec.name))
        self.specs = {spec.name: spec for spec in ordered}
        assert len(self.specs) == len(ordered), "two tensors of one name"
        header, self._offsets, size = _layout(ordered, metadata)
        self._written: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        reserve(self._descriptor, path, size)
        os.pwrite(self._descriptor, header, 0)

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Store ``tensor`` as rows ``[row, row + len)`` of ``name``; dtype and trailing shape must be the planned ones."""
        spec = self.specs[name]
        check_piece(spec, tensor, row)
        data = byte_view(tensor)
        write_all(self._descriptor, data, self._offsets[name] + row * spec.row_bytes)
        with self._lock:
            self._written[name] += len(data)

    def close(self) -> None:
        """Close the file. Every planned byte must have been written."""
        missing = [name for name, spec in self.specs.items() if self._written[name] != spec.nbytes]
        self.abort()
        assert not missing, f"{self.path.name}: not written or written twice: {shortened(missing)}"

    def abort(self) -> None:
        """Close the descriptor without any check."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        self.abort()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] = _FORMAT) -> None:
    """One file of tensors that are all at hand. Whatever fails, the file is closed; removing it is left to the folder's owner."""
    with SafetensorsWriter(path, [spec_of(name, tensor) for name, tensor in tensors.items()], metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class CheckpointWriter:
    """A checkpoint's weights: ``model.safetensors``, or shards of at most ``max_shard_bytes`` and an index."""

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = folder
        shards = list(_shards(list(specs), max_shard_bytes))
        names = [SINGLE] if len(shards) == 1 else [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        self._files = [SafetensorsWriter(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
        self._owner = {name: file for file in self._files for name in file.specs}
        self.total_bytes = sum(spec.nbytes for shard in shards for spec in shard)

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """As :meth:`SafetensorsWriter.write`, into the shard that holds ``name``."""
        self._owner[name].write(name, tensor, row)

    def close(self) -> None:
        """Close all shards, then write the index if there are several."""
        for file in self._files:
            file.close()
        if len(self._files) > 1:
            weight_map = {name: file.path.name for name, file in sorted(self._owner.items())}
            (self._folder / INDEX).write_bytes(canonical_json({"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}))

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        for file in self._files:
            file.abort()


def check_piece(spec: TensorSpec, tensor: torch.Tensor, row: int) -> None:
    """``tensor`` may be written as rows of ``spec`` starting at ``row``: dtype, trailing shape and range fit."""
    found = spec_of(spec.name, tensor)
    whole = row == 0 and found.shape == spec.shape
    rows = bool(spec.shape) and found.shape[1:] == spec.shape[1:] and row + (found.shape or (0,))[0] <= spec.shape[0]
    assert found.dtype == spec.dtype and (whole or rows), f"planned {spec}, got {found} at row {row}"


def reserve(descriptor: int, path: Path, size: int) -> None:
    """Make the file ``size`` bytes long with the space really taken, so that a full disk shows before the work.

    Raises:
        StorageError: not enough room; names what is needed and what is free.
    """
    try:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            free = os.statvfs(path.parent)
            raise StorageError(
                f"{path.name} needs {size} bytes, {free.f_bavail * free.f_frsize} are free in {path.parent}",
                hint="free some space or choose another disk with -o",
            ) from error
        raise


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """``pwrite`` until everything is written."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + (1 << 30)], offset + done)


def _layout(ordered: list[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, absolute offset of each tensor, file size."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    relative, position = {}, 0
    for spec in ordered:
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, position + spec.nbytes]}
        relative[spec.name] = position
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + offset for name, offset in relative.items()}, base + position


def _shards(specs: list[TensorSpec], max_shard_bytes: int) -> Iterator[list[TensorSpec]]:
    """Whole tensors in natural order, a new shard when the next would not fit; always at least one shard."""
    shard: list[TensorSpec] = []
    size = 0
    for spec in sorted(specs, key=lambda spec: natural_key(spec.name)):
        if shard and size + spec.nbytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(spec)
        size += spec.nbytes
    yield shard
