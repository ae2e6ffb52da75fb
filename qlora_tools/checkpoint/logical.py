"""A checkpoint as dense named tensors, whatever codec stored each of them.

``X.weight`` of a bitsandbytes NF4 or int8 checkpoint reads as a dense tensor of the dtype it was quantized
from; its parts may lie in any shards and do not show in ``specs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.reader import CheckpointReader
from qlora_tools.models.family import Family, family_of
from qlora_tools.quant.codec import Codec, Stored, detect
from qlora_tools.specs import DTYPES, TensorSpec, dtype_of


class LogicalCheckpoint:
    """A :class:`~qlora_tools.engine.plan.Source` over a folder. ``stored`` gives the bytes behind it."""

    def __init__(self, stored: CheckpointReader) -> None:
        self.stored = stored
        self.folder: Path = stored.folder
        self.config: Mapping[str, Any] = stored.config
        self.family: Family = family_of(stored.config)
        self.quantized: Mapping[str, Stored] = detect(stored.specs, stored.read, default_dtype=config_dtype(stored.config), where=str(stored.folder))
        hidden = {part for item in self.quantized.values() for part in item.parts}
        dense = {name: spec for name, spec in stored.specs.items() if name not in hidden}
        dense |= {name: self._oriented(item.spec) for name, item in self.quantized.items()}
        self.specs: Mapping[str, TensorSpec] = dict(sorted(dense.items()))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The dense tensor (or its rows) in the dtype that ``specs`` says."""
        item = self.quantized.get(name)
        if item is None:
            return self.stored.read(name, rows)
        parts = {part: self.stored.read(part) for part in item.parts}
        if not self.family.stores_inputs_first(name, item.spec.shape):
            return item.codec.decode(item.spec, parts, rows)
        dense = item.codec.decode(item.spec, parts).T
        return dense if rows is None else dense[rows[0] : rows[1]]

    def sha256(self, name: str) -> str:
        """Hash of the stored bytes behind ``name``: of the tensor, or of its parts in order of name."""
        item = self.quantized.get(name)
        return self.stored.sha256(name) if item is None else "+".join(self.stored.sha256(part) for part in sorted(item.parts))

    def _oriented(self, spec: TensorSpec) -> TensorSpec:
        """bitsandbytes layers store [out, in] even where the dense model stores [in, out] (GPT-2's Conv1D)."""
        turned = self.family.stores_inputs_first(spec.name, spec.shape)
        return TensorSpec(spec.name, spec.dtype, spec.shape[::-1]) if turned else spec

    @property
    def codec(self) -> Codec | None:
        """What its quantized weights are stored in; ``None`` where none is."""
        return next((item.codec for item in self.quantized.values()), None)

    @property
    def ties(self) -> dict[str, str]:
        """Tensor names that are not stored because they share another's values -> the name of that other."""
        return {name: owner for name, owner in self.family.ties(self.config).items() if name not in self.specs and owner in self.specs}


def config_dtype(config: Mapping[str, Any]) -> str:
    """The dtype a config says the model was saved in (``dtype`` or the older ``torch_dtype``), as a safetensors name; BF16 if it says none."""
    text = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    found = getattr(torch, text, None)
    name = dtype_of(found).name if isinstance(found, torch.dtype) and found.is_floating_point else "BF16"
    assert name in DTYPES
    return name


def open_checkpoint(folder: Path) -> LogicalCheckpoint:
    """The logical view of a checkpoint folder; every header is validated here."""
    return LogicalCheckpoint(CheckpointReader(folder))
