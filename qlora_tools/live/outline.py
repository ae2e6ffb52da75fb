"""A checkpoint that is only its ``config.json``: every tensor's name, shape and dtype, and no values.

transformers' own class says what a model of that config holds, so plans, file sizes and traced steps can be had for models that nobody has
downloaded. Whatever asks for a value is told that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from qlora_tools.checkpoint.logical import LogicalCheckpoint, config_dtype
from qlora_tools.checkpoint.reader import CheckpointReader, read_json
from qlora_tools.errors import MissingError
from qlora_tools.live.base import build_empty
from qlora_tools.specs import TensorSpec


class _Outline(CheckpointReader):
    """Looks like a folder with weights as far as headers go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self._files, self._owner = [], {}
        self.specs: Mapping[str, TensorSpec] = {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> NoReturn:
        raise MissingError(f"{self.folder} holds no weights, only config.json", hint="give the folder of a whole checkpoint")


def outline(folder: Path, task: str = "language") -> LogicalCheckpoint:
    """The model that ``folder/config.json`` describes, in the dtype the config names. Tied tensors count once.

    Raises:
        MissingError, CorruptError: no config.json, or no JSON. UnsupportedError: transformers has no class of its own for the model and task.
    """
    stored = _Outline(folder)
    bare = LogicalCheckpoint(stored)
    model: Any = build_empty(bare, task)
    model.tie_weights()
    dtype = config_dtype(stored.config)
    buffers = {name: value for name, value in model.named_buffers() if name in model.state_dict()}
    shapes = {name: tuple(value.shape) for name, value in [*model.named_parameters(), *buffers.items()] if value.is_floating_point()}
    stored.specs = {name: TensorSpec(name, dtype, shape) for name, shape in sorted(shapes.items())}
    return LogicalCheckpoint(stored)
