"""An adapter as it lies on disk, and what the caller adds to it: the two arguments of every format's reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_tools.errors import UsageError
from qlora_tools.specs import TensorSpec


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """One opened adapter. ``specs`` and ``tensors`` by stored name (``tensors`` may read when asked), ``metadata`` of the
    file, ``config``: the adapter_config.json beside it. A file that is no safetensors has no ``specs`` here: ``magic`` is then the
    name of its format, whose reader opens ``path``."""

    path: Path
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    magic: bytes = b""


@dataclass(frozen=True)
class Hints:
    """What a file may not tell by itself: ``alpha`` (loralib stores none), the ``rank`` of training (a check on what the tensors
    say), the ``component`` wanted of several, and the base's modules (path -> shape of the weight) and config.json."""

    alpha: float | None = None
    rank: int | None = None
    component: str | None = None
    modules: Mapping[str, tuple[int, ...]] | None = None
    base_config: Mapping[str, Any] | None = None

    def check_rank(self, module: str, found: int) -> None:
        """Raise UsageError when the rank that was given is not the one that the factors of ``module`` have."""
        if self.rank is not None and self.rank != found:
            raise UsageError(
                f"`{module}` has rank {found}, {self.rank} was given",
                hint="leave --rank out if that is right; loralib's convolutions tell their rank only with --base",
            )


NO_HINTS = Hints()
