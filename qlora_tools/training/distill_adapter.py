"""An adapter from a folder on a loaded base: what can learn becomes LoRA layers, all else is put into the base as it is.

A and B of linears and convolutions learn, with ``lora_B.bias`` and DoRA's lengths where the adapter has them. Whole replaced tensors, token rows,
biases and factors of embeddings are merged into the model and stay. Every learnt value goes back under the key, shape and dtype that the adapter's file
has for it, so that the file stays what it was but for the numbers.

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qlora_tools.adapters.adapter import Adapter, BiasDelta, Delta, Part
from qlora_tools.adapters.merged import MergedSource, base_fingerprint
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.base import Base, stored_orientation
from qlora_tools.live.frozen import FrozenConv1D, FrozenConv2d, FrozenLinear
from qlora_tools.names import split_tensor
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.lora import ADAPTER, PREFIX, adaptable, inject, lora_layers


@dataclass(frozen=True, eq=False)
class Learner:
    """The PEFT model, and by the name of each trainable parameter the stored part it came from. ``ranks``: of the learning modules."""

    model: PeftModel
    parts: Mapping[str, Part]
    ranks: Mapping[str, int]

    def stored(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """``value`` of a parameter after a visit to the file: rounded to the stored dtype."""
        return value.to(self.parts[name].spec.torch_dtype).to(value.dtype)


def put_adapter(
    base: Base,
    adapter: Adapter,
    dtype: torch.dtype,
    *,
    config: TrainConfig | None = None,
    task_type: str | None = "CAUSAL_LM",
    heads: Iterable[str] = (),
) -> Learner:
    """Put ``adapter``, bound to ``base.checkpoint``, on ``base.model``, in place. ``dtype``: of the factors in memory.

    ``config``: of the run, with ``init="adapter"`` and the adapter's own form; ``task_type`` and ``heads`` as :func:`inject` has them.

    Raises:
        UnsupportedError: nothing in it can learn. IncompatibleError: it was made for another base.
    """
    paths = learning_layers(adapter, base.model)
    if not paths:
        raise UnsupportedError(f"adapter {adapter.name} holds no factors of linears or convolutions", hint="only those can be refined")
    biases = {path: bias for name, path in paths.items() if (bias := adapter.biases.get(f"{split_tensor(name)[0]}.bias")) is not None}
    _place_the_rest(base, adapter, paths, biases)
    ranks = ranks_in(adapter, base.model)
    config = config or TrainConfig(rank=max(ranks.values()), dora=any(adapter.deltas[name].magnitude is not None for name in paths))
    model = inject(base.model, ranks, config, task_type, heads=heads, dtype=dtype)
    parts: dict[str, Part] = {}
    layers = lora_layers(model)
    for name, path in paths.items():
        parts |= _fill(layers[path], path, adapter.deltas[name], biases.get(path))
    return Learner(model, parts, ranks)


def ranks_in(adapter: Adapter, model: nn.Module) -> dict[str, int]:
    """Layer of ``model`` -> rank, for every delta of ``adapter`` that can learn there."""
    return {path: adapter.deltas[name].rank for name, path in learning_layers(adapter, model).items()}


def learning_layers(adapter: Adapter, model: nn.Module) -> dict[str, str]:
    """Tensor of the base -> path of the layer, for every delta that can learn. Names and paths may differ by leading parts."""
    layers = adaptable(model)
    found = {}
    for name in sorted(adapter.deltas):
        module, leaf = split_tensor(name)
        path = module if module in layers else next((path for path in layers if path.endswith(f".{module}") or module.endswith(f".{path}")), None)
        if leaf == "weight" and path is not None:
            found[name] = path
    return found


def _place_the_rest(base: Base, adapter: Adapter, paths: Mapping[str, str], biases: Mapping[str, BiasDelta]) -> None:
    """Merge everything that does not learn into the model."""
    merged = MergedSource(base.checkpoint, [(adapter, 1.0)], ties=base.checkpoint.ties, fingerprint=base_fingerprint(base.checkpoint))
    module_of = {split_tensor(name)[0]: path for path, name in base.tensor_of.items()}
    learning = {f"{split_tensor(name)[0]}.bias" for name, path in paths.items() if path in biases}
    shared = {tied for tied, owner in base.checkpoint.ties.items() if owner in adapter.changed and tied not in merged.untied}
    for name in sorted((adapter.changed | shared) - learning):
        replaced = adapter.replacements.get(name)
        if name in paths and replaced is None:
            continue
        value = replaced.read() if name in paths and replaced is not None else merged.read(base.checkpoint.ties.get(name, name) if name in shared else name)
        module, leaf = split_tensor(name)
        _replace(base.model.get_submodule(module_of.get(module, module) if module not in dict(base.model.named_modules()) else module), leaf, value)


def _replace(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    """``value`` as a tensor of this module alone: whoever shared the old one keeps it."""
    if leaf == "weight" and isinstance(module, FrozenLinear | FrozenConv1D | FrozenConv2d):
        module.hold_dense(stored_orientation(module, value))
        return
    old: Any = getattr(module, leaf)
    module._parameters[leaf] = nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)


@torch.no_grad()
def _fill(layer: Any, path: str, delta: Delta, bias: BiasDelta | None) -> dict[str, Part]:
    """The adapter's own values and scale; returns the parts by parameter."""
    layer.scaling[ADAPTER] = delta.scale
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    a.weight.copy_(delta.a.read().view(a.weight.shape))
    b.weight.copy_(delta.b.read().view(b.weight.shape))
    parts = {f"{PREFIX}{path}.lora_A.weight": delta.a, f"{PREFIX}{path}.lora_B.weight": delta.b}
    if bias is not None:
        b.bias = nn.Parameter(bias.part.read().to(b.weight))
        parts[f"{PREFIX}{path}.lora_B.bias"] = bias.part
    if delta.magnitude is not None:
        lengths = layer.lora_magnitude_vector[ADAPTER].weight
        lengths.copy_(delta.magnitude.read().view(lengths.shape))
        parts[f"{PREFIX}{path}.lora_magnitude_vector"] = delta.magnitude
    return parts
