"""Remember the hash of every tensor that passes by, so that provenance costs no second read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import tensor_sha256
from qlora_tools.specs import TensorSpec


class Fingerprinted:
    """A source that hashes the stored bytes of the ``wanted`` tensors when they are read whole.

    Tensors that the checkpoint stores quantized are not hashed: their dense form is not what is stored.
    """

    def __init__(self, checkpoint: LogicalCheckpoint, wanted: frozenset[str]) -> None:
        self._checkpoint = checkpoint
        self._wanted = wanted - checkpoint.quantized.keys()
        self.specs: Mapping[str, TensorSpec] = checkpoint.specs
        self.sha256: dict[str, str] = {}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """As the checkpoint's own ``read``."""
        tensor = self._checkpoint.read(name, rows)
        if name in self._wanted and rows is None:
            self.sha256[name] = tensor_sha256(tensor)
        return tensor
