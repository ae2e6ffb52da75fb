"""What quantizing costs a whole language model: KL on held-out windows of text, against the model in 16 bits.

The model stands twice in memory, in fp32 on the CPU and bf16 elsewhere: once as it is, once with the weights that are judged put in, decoded.
So one pair judges any number of ways to store the weights, single layers too. Left out: activations in int8, which is the runtime's doing.

Axes: N windows, L tokens of a window, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.base import load_base
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.corpus import Window
from qlora_tools.quality.divergence import Divergence, divergence
from qlora_tools.quant.floats import judging_dtype
from qlora_tools.training.allocator import available_bytes

#: Name of a weight in the checkpoint -> what to put in its place, dense in the checkpoint's orientation.
WeightOf = Callable[[str], torch.Tensor]
_SPARE = 1.2  # activations and logits, as a share of the weights
_REFERENCE_BYTES = 256 << 20


class WholeModel:
    """A model beside a copy of itself whose weights can be replaced.

    Raises (on construction):
        UnsupportedError: the two do not fit into memory, or transformers has no language model of this kind.
    """

    def __init__(self, checkpoint: LogicalCheckpoint, windows_NL: torch.Tensor, *, device: str = "cpu", progress: Progress = SILENT) -> None:
        dtype = judging_dtype(device)
        needed = int(2 * _SPARE * dtype.itemsize * sum(spec.numel for spec in checkpoint.specs.values()))
        if needed > (free := available_bytes(device)):
            raise UnsupportedError(f"judging the whole model takes about {needed >> 20} MB, {free >> 20} MB are free")
        self._checkpoint, self._device, self._progress = checkpoint, device, progress
        self._windows = [Window(window_L.numpy().astype(np.int64), 1) for window_L in windows_NL]
        self._reference = load_base(checkpoint, "language", None, dtype=dtype, device=device, progress=progress).model
        copy = load_base(checkpoint, "language", None, dtype=dtype, device=device, progress=progress)
        self._copy = copy.model
        self._layers = {name: copy.model.get_submodule(path) for path, name in copy.tensor_of.items()}
        self._known: dict[bytes, torch.Tensor] = {}
        self._known_bytes = 0

    def put(self, names: Iterable[str], weight_of: WeightOf) -> None:
        """Replace weights in the copy. Names of weights that are no linear of the model are passed over."""
        for name in names:
            layer = self._layers.get(name)
            if layer is None or not hasattr(layer, "stored"):
                continue
            value = weight_of(name)
            turn = self._checkpoint.family.stores_inputs_first(name, self._checkpoint.specs[name].shape)
            layer.stored.part0.copy_(value.T if turn else value)

    def restore(self, names: Iterable[str]) -> None:
        """Put the model's own weights back."""
        self.put(names, self._checkpoint.read)

    def divergence(self, windows: int | None = None) -> Divergence:
        """The copy against the model on the first ``windows`` windows (``None``: all)."""
        return divergence(
            self._reference_logits, lambda ids_T: self._logits(self._copy, ids_T), self._windows[:windows], progress=self._progress, title="judge"
        )

    def _reference_logits(self, ids_T: NDArray[np.int64]) -> torch.Tensor:
        """The model's own, remembered as far as they take little memory."""
        key = ids_T.tobytes()
        if (known := self._known.get(key)) is not None:
            return known
        logits_TV = self._logits(self._reference, ids_T)
        if self._known_bytes + logits_TV.nbytes <= _REFERENCE_BYTES:
            self._known[key] = logits_TV
            self._known_bytes += logits_TV.nbytes
        return logits_TV

    @torch.no_grad()
    def _logits(self, model: Any, ids_T: NDArray[np.int64]) -> torch.Tensor:
        logits_TV: torch.Tensor = model(input_ids=torch.from_numpy(ids_T)[None].to(self._device), use_cache=False).logits[0]
        return logits_TV
