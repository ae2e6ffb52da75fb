"""State dicts of loralib (the package of the LoRA paper): parameters ``<module>.lora_A`` and ``<module>.lora_B``, alpha not stored.

::

    Linear        A [R, I]        B [O, R]            weight += s B A
    Embedding     A [R, V]        B [D, R]            weight += s (B A)^T
    MergedLinear  A [g R, I]      B [g O/n, R]        g of n equal parts of the outputs adapted, each by its own rows of A and B
    Conv2d        A [R k, I k]    B [O k, R k]        weight += s (B A) reshaped to [O, I, k, k]

with s = alpha / R. Which parts a MergedLinear adapts is not stored either; ``config["enable_lora"]`` says it (n truth values, or a
mapping from the last part of a module's name to them). ``<module>.bias`` keys replace biases. A convolution's reshape mixes its axes,
so the same update as factors over [I k k] has rank R k^2, exactly. Left out: grouped, 1-D and 3-D convolutions, and weights (a state
dict that holds them was saved merged). Reading only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from qlora_tools.adapters.formats import litgpt
from qlora_tools.adapters.formats.targets import block_diagonal, by_module, checked_fit, in_base, kind_of, real_number, take_pair
from qlora_tools.adapters.portable import CONV, Layer, Portable
from qlora_tools.adapters.stored import NO_HINTS, Hints
from qlora_tools.errors import IncompatibleError, UnsupportedError, UsageError

_KEY = re.compile(r"(?P<module>.+)\.(?P<slot>lora_A|lora_B|bias)")
_IMAGE_MODEL = re.compile(r"(unet|text_encoder(_\d)?|diffusion_model|transformer\.(transformer_|single_transformer_)?blocks|lora_\w+)\b.*")


def recognise(keys: Collection[str], metadata: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
    """True when factors are bare ``lora_A`` parameters and neither an ONNX adapter, litgpt nor an image model has such names."""
    if metadata.get("format") == "onnx_adapter" or litgpt.recognise(keys, metadata, config):
        return False
    factors = [key for key in keys if key.endswith((".lora_A", ".lora_B"))]
    return bool(factors) and not any(_IMAGE_MODEL.fullmatch(key) for key in factors)


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, hints: Hints = NO_HINTS) -> Portable:
    """``alpha`` must be given. ``modules`` (shapes of the base) tells convolutions and partly adapted fused layers from linears.

    Raises:
        UsageError: no alpha, a rank that is not the tensors', or the adapted parts of a fused layer are not stated.
        IncompatibleError: keys left over or without partner, wrong base. UnsupportedError: grouped, 1-D or 3-D convolutions.
    """
    if hints.alpha is None:
        raise UsageError("a loralib state dict does not state alpha", hint="give the alpha it was trained with: --alpha NUMBER")
    value = real_number(hints.alpha, "alpha")
    layers: dict[str, Layer] = {}
    replacements: dict[str, torch.Tensor] = {}
    for path, slots in by_module(tensors, _KEY, "loralib").items():
        module = in_base(path, hints.modules)
        bias = slots.pop("bias", None)
        if bias is not None:
            replacements[f"{module}.bias"] = bias
        if slots:
            layers[module] = _layer(module, slots, config or {}, hints, value)
    if not layers:
        raise IncompatibleError("the state dict holds biases but no lora_A and lora_B")
    return Portable(checked_fit(layers, hints.modules), replacements)


def _layer(module: str, slots: dict[str, torch.Tensor], config: Mapping[str, Any], hints: Hints, alpha: float) -> Layer:
    shape = hints.modules.get(module) if hints.modules else None
    if shape is not None and len(shape) > 2:
        return _convolution(module, slots, shape, hints, alpha)
    if slots.keys() != {"lora_A", "lora_B"} or any(tensor.ndim != 2 for tensor in slots.values()):
        raise IncompatibleError(f"`{module}` has {', '.join(f'{name} {list(tensor.shape)}' for name, tensor in slots.items())}, expected two matrices")
    a, b = slots["lora_A"], slots["lora_B"]
    groups, rest = divmod(a.shape[0], max(b.shape[1], 1))
    if rest or not groups:
        raise IncompatibleError(f"`{module}`: the ranks of lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit")
    hints.check_rank(module, b.shape[1])
    outputs = _outputs(shape, a.shape[1])
    if groups == 1 and outputs in (None, b.shape[0]):
        return Layer(a, b, alpha / b.shape[1], kind_of(module, hints.modules, hints.base_config, (a.shape[1], b.shape[0])))
    return _merged(module, a, b, groups, outputs, config, alpha)


def _outputs(shape: tuple[int, ...] | None, inputs: int) -> int | None:
    """The other size of a weight with ``inputs`` inputs, whichever way round it is stored; ``None`` where it is not known."""
    if shape is None or len(shape) != 2 or inputs not in shape:
        return None
    return shape[0] if shape[1] == inputs else shape[1]


def _merged(module: str, a: torch.Tensor, b: torch.Tensor, groups: int, outputs: int | None, config: Mapping[str, Any], alpha: float) -> Layer:
    """A fused layer of n parts, ``groups`` of them adapted: the same update as one pair with blocks and zero rows."""
    size, rest = divmod(b.shape[0], groups)
    parts = None if outputs is None or rest or not size or outputs % size else outputs // size
    if outputs is not None and (parts is None or parts < groups):
        raise IncompatibleError(f"`{module}`: lora_B {list(b.shape)} with {groups} groups does not divide the {outputs} outputs of the base")
    enabled = _enabled(module, config, groups, parts)
    if rest or sum(enabled) != groups or (parts is not None and len(enabled) != parts):
        raise IncompatibleError(f"`{module}`: enable_lora {enabled} does not fit {groups} groups" + (f" of {parts} parts" if parts else ""))
    starts = [part * size for part, wanted in enumerate(enabled) if wanted]
    pairs = list(zip(a.chunk(groups), b.chunk(groups), strict=True))
    whole_a, whole_b = block_diagonal(pairs, starts, size * len(enabled))
    return Layer(whole_a, whole_b, alpha / b.shape[1])


def _enabled(module: str, config: Mapping[str, Any], groups: int, parts: int | None) -> list[bool]:
    stated = config.get("enable_lora")
    if isinstance(stated, Mapping):
        stated = stated.get(module, stated.get(module.rpartition(".")[2]))
    if stated is not None:
        if not isinstance(stated, Sequence) or isinstance(stated, str) or not all(isinstance(item, bool) for item in stated):
            raise UsageError(f"enable_lora for `{module}` is {stated!r}, expected truth values, one for each part")
        return list(stated)
    if parts == groups:
        return [True] * groups
    known = f"{groups} of {parts}" if parts else f"{groups}"
    raise UsageError(
        f"`{module}` adapts {known} parts of a fused layer, and the file does not tell which",
        hint='write "enable_lora": [true, false, true], or what it was, into an adapter_config.json beside the file',
    )


def _convolution(module: str, slots: dict[str, torch.Tensor], shape: tuple[int, ...], hints: Hints, alpha: float) -> Layer:
    """(B A) reshaped to [O, I, k, k]: row o of the result is rows o k .. o k + k - 1 of B A, one after the other."""
    a, b = take_pair(module, slots, ("lora_A", "lora_B"), (0, 1))
    outputs, inputs, size = shape[0], shape[1], shape[2]
    if len(shape) != 4 or shape[2] != shape[3]:
        raise UnsupportedError(f"`{module}` is a convolution {list(shape)}; only square 2-D ones are converted")
    rank, rest = divmod(a.shape[0], size)
    if rest or a.shape[1] != inputs * size or b.shape[0] != outputs * size:
        raise UnsupportedError(
            f"`{module}`: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit an ungrouped convolution {list(shape)}",
            hint="grouped convolutions of loralib are not converted: merge them with loralib itself",
        )
    hints.check_rank(module, rank)
    whole_a = torch.block_diag(*[a] * size).reshape(-1, inputs, size, size)
    return Layer(whole_a, b.reshape(outputs, -1, 1, 1), alpha / rank, CONV)
