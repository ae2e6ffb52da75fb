"""The student of a distillation block by block: a base that is read one block at a time, as its quantizer stores it, with an adapter's factors on top.

A and B of plain LoRA on linears inside blocks learn. All else that the adapter does is merged into what is read, as it is. A weight under
learning factors is never merged: it is encoded and decoded, and the factors add to what it gives.

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qlora_tools.adapters.adapter import Adapter, Delta, Part
from qlora_tools.adapters.merged import MergedSource, base_fingerprint
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.base import freezes, store, stored_orientation
from qlora_tools.live.weights import Weights, stops_of
from qlora_tools.names import split_tensor
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.training.distill_adapter import learning_layers

#: Path of a layer -> (A [R, I], B [O, R]) in fp32.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Student(Weights):
    """``start``: the factors as stored, by path. ``factors``: those that the layers use now; exchange its entries, or the whole, at will."""

    def __init__(
        self, checkpoint: LogicalCheckpoint, adapter: Adapter, codec: Codec | None, dtype: torch.dtype, device: str, progress: Progress = SILENT
    ) -> None:
        super().__init__(checkpoint, "language", dtype, device, progress)
        if not self.streamed:
            raise UnsupportedError(f"{checkpoint.folder} cannot be read block by block: transformers renames its weights", hint="leave out --by-block")
        self._codec = None if checkpoint.quantized else codec  # of a quantized checkpoint, what is dense was left so on purpose
        self._held = {
            self.name_of[f"{path}.weight"]: module
            for path, module in self.model.named_modules()
            if self.name_of.get(f"{path}.weight") and freezes(checkpoint, path, module)
        }
        self._adapter = adapter
        self._merged = MergedSource(checkpoint, [(adapter, 1.0)], ties=checkpoint.ties, fingerprint=base_fingerprint(checkpoint))
        self.name_of = {own: own if own in adapter.changed else name for own, name in self.name_of.items()}  # ties may come apart
        blocks = tuple(f"{block}." for block in stops_of(self.model)[0])
        self._tensor = {name: path for name, path in learning_layers(adapter, self.model).items() if path.startswith(blocks)}
        self._delta: dict[str, Delta] = {path: adapter.deltas[name] for name, path in self._tensor.items()}
        self._refuse()
        self.start: Factors = {path: (delta.a.read().float().to(device), delta.b.read().float().to(device)) for path, delta in self._delta.items()}
        self.factors = dict(self.start)
        for path in self._delta:
            self.model.get_submodule(path).register_forward_hook(self._adding(path))

    def _refuse(self) -> None:
        if not self._delta:
            raise UnsupportedError(f"adapter {self._adapter.name} holds no factors of linears inside blocks", hint="leave out --by-block")
        for name, path in self._tensor.items():
            delta = self._delta[path]
            if delta.magnitude is not None or len(delta.a.spec.shape) != 2:
                raise UnsupportedError(f"`{split_tensor(name)[0]}` is more than plain LoRA of a linear", hint="leave out --by-block")

    def parts(self, path: str) -> tuple[Part, Part]:
        """Where A and B of the layer at ``path`` are stored."""
        return self._delta[path].a, self._delta[path].b

    def stored(self, path: str, factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """``factors`` after a visit to the file."""
        a, b = (value.detach().to(part.spec.torch_dtype).float() for value, part in zip(factors, self.parts(path), strict=True))
        return a, b

    def read(self, name: str) -> torch.Tensor:
        """A tensor as the student has it, dense."""
        module, learns = self._held.get(name), name in self._tensor
        if name in self._adapter.replacements and learns:
            return self._adapter.replacements[name].read()
        if name in self._adapter.changed and not learns:
            return self._merged.read(name)
        dense = super().read(name)
        if module is None or self._codec is None:
            return dense
        kept = store(name, stored_orientation(module, dense), self._codec, self.dtype, self.device).dense()
        return stored_orientation(module, kept)

    def read_rows(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """As :meth:`read`, of an embedding."""
        return self._merged.read(name, rows)

    def _adding(self, path: str) -> Any:
        scale = self._delta[path].scale

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            a_RI, b_OR = self.factors[path]
            x = args[0]
            return output + functional.linear(functional.linear(x, a_RI.to(x)), b_OR.to(x)) * scale  # those of a resumed run come from a file

        return hook


def below(factors: Mapping[str, Any], block: str) -> list[str]:
    """Paths of the layers inside ``block``."""
    return [path for path in factors if path.startswith(f"{block}.")]
