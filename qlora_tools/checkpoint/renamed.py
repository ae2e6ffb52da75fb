"""A checkpoint as another class of the same model would store it: the same bytes under other names, less what that class has no place for, with a
config of its own.

Nothing is copied: reads go to the checkpoint as it lies in its folder, which stays at hand as ``opened``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import CheckpointReader
from qlora_tools.errors import MissingError
from qlora_tools.names import split_tensor
from qlora_tools.specs import TensorSpec


class RenamedCheckpoint(LogicalCheckpoint):
    """``opened`` with its dense tensors under ``names`` (old -> new, the others are left out) and with ``config``.

    ``known``: every tensor name of the new class. A name that ``opened`` ties to another's values and that is not among them is tied no longer.
    """

    def __init__(self, opened: LogicalCheckpoint, names: Mapping[str, str], config: Mapping[str, Any], known: Container[str]) -> None:
        self.opened = opened
        self.new_names = dict(names)
        self.old_names = {new: old for old, new in names.items()}
        self._known = known
        stored = {part: _moved(part, old, new) for old, new in names.items() for part in _parts(opened, old)}
        super().__init__(_RenamedReader(opened.stored, stored, config))

    @property
    def ties(self) -> dict[str, str]:
        """As for any checkpoint, less the names that the new class has no tensor for."""
        return {name: owner for name, owner in super().ties.items() if name in self._known}


class _RenamedReader(CheckpointReader):
    """Stored tensors under new names."""

    def __init__(self, stored: CheckpointReader, names: Mapping[str, str], config: Mapping[str, Any]) -> None:
        self.folder, self.config = stored.folder, dict(config)
        self._stored, self._old = stored, {new: old for old, new in names.items()}
        self._files, self._owner = [], {}
        self.specs: Mapping[str, TensorSpec] = {new: _named(new, stored.specs[old]) for new, old in sorted(self._old.items())}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        if name not in self._old:
            raise MissingError(f"{self.folder} holds no tensor `{name}`")
        return self._stored.read(self._old[name], rows)

    def path_of(self, name: str) -> Path:
        return self._stored.path_of(self._old[name])


def as_stored(checkpoint: LogicalCheckpoint) -> LogicalCheckpoint:
    """The checkpoint as it lies in its folder."""
    return checkpoint.opened if isinstance(checkpoint, RenamedCheckpoint) else checkpoint


def stored_name(checkpoint: LogicalCheckpoint, name: str) -> str | None:
    """What a dense tensor of ``checkpoint`` is called in its folder; ``None`` where a renamed one has none from there."""
    return checkpoint.old_names.get(name) if isinstance(checkpoint, RenamedCheckpoint) else name


def _parts(opened: LogicalCheckpoint, name: str) -> tuple[str, ...]:
    item = opened.quantized.get(name)
    return (name,) if item is None else item.parts


def _moved(part: str, old: str, new: str) -> str:
    """The name of one stored part of a tensor that is called ``new`` instead of ``old``; codecs name parts after the module."""
    if part == old:
        return new
    module = split_tensor(old)[0]
    assert part.startswith(f"{module}."), f"{part} is no part of {old}"
    return f"{split_tensor(new)[0]}{part.removeprefix(module)}"


def _named(name: str, spec: TensorSpec) -> TensorSpec:
    return TensorSpec(name, spec.dtype, spec.shape)
