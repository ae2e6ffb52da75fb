"""MLX adapters (``adapters.safetensors`` beside ``adapter_config.json``): transposed factors and a literal scale.

A layer is ``<module>.lora_a`` [I, R] and ``.lora_b`` [R, O], its update ``scale * (a b)^T`` with ``lora_parameters.scale`` of the config,
whatever the rank. An embedding is the same with V in place of I: ``weight += scale * a b``. DoRA adds ``.m`` [O], the row lengths, which
mean what PEFT's magnitudes mean. Left out: experts (three-dimensional factors), full fine-tunes, DoRA of embeddings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.adapters.formats.targets import baked, by_module, checked_fit, in_base, kind_of, real_number, refuse_beyond_factors, take_pair
from qlora_tools.adapters.portable import EMBEDDING, Layer, Portable
from qlora_tools.adapters.stored import NO_HINTS, Hints
from qlora_tools.checkpoint.writer import write_tensors
from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, UnsupportedError, UsageError
from qlora_tools.models.family import family_of

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_KEY = re.compile(r"(?P<module>.+(?<!\.weight))\.(?P<slot>lora_a|lora_b|m)")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTSIDE = ("model.embed_tokens", "lm_head")


def recognise(keys: Collection[str], metadata: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
    """True when factors are named ``<module>.lora_a`` without a further part, as only MLX does (GGUF puts ``.weight`` before)."""
    return any((match := _KEY.fullmatch(key)) and match["slot"] != "m" for key in keys)


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, hints: Hints = NO_HINTS) -> Portable:
    """``config`` is the folder's ``adapter_config.json``; where it states no scale, ``alpha`` and the ranks give it.

    Raises:
        IncompatibleError: keys left over or without partner, wrong base. UnsupportedError: experts, a full fine-tune.
        UsageError: no scale is stated and no alpha given, or both.
    """
    values = config or {}
    if values.get("fine_tune_type", "lora") not in ("lora", "dora"):
        raise UnsupportedError(f"fine_tune_type is {values['fine_tune_type']!r}: these are whole weights", hint="extract an adapter with `qlt extract`")
    stated = _stated_scale(values, hints.alpha)
    layers = {}
    for path, slots in by_module(tensors, _KEY, "MLX").items():
        if any(tensor.ndim == 3 for tensor in slots.values()):
            raise UnsupportedError(f"`{path}` adapts the experts of a mixture, which is not converted")
        a, b = take_pair(path, slots, ("lora_a", "lora_b"), (1, 0))
        hints.check_rank(path, a.shape[1])
        module = in_base(path, hints.modules)
        kind = kind_of(module, hints.modules, hints.base_config, (a.shape[0], b.shape[1]))
        if kind == EMBEDDING and hints.base_config is not None:
            _refuse_tied(module, hints.base_config)
        scale = stated if stated is not None else real_number(hints.alpha, "alpha") / a.shape[1]
        layers[module] = Layer(a.T.contiguous(), b.T.contiguous(), scale, kind, magnitude=_magnitude(path, slots.pop("m", None), kind, b.shape[1]))
    return Portable(checked_fit(layers, hints.modules), base_name=_base_name(values))


def write(portable: Portable, folder: Path, *, base_config: Mapping[str, Any] | None, dtype: str | None = None) -> None:
    """``adapters.safetensors`` and ``adapter_config.json`` in ``folder``; ``dtype`` is ignored, tensors stay as they are.

    Raises:
        MissingError: the base's number of layers is unknown. UnsupportedError: what MLX cannot hold, or only some layers are DoRA.
    """
    config, tensors = render(portable, base_config=base_config)
    write_tensors(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def render(portable: Portable, *, base_config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors that :func:`write` writes."""
    refuse_beyond_factors(portable, "an MLX adapter", magnitudes=True)
    layers = portable.layers
    dora = [layer.magnitude is not None for layer in layers.values()]
    if any(dora) and not all(dora):
        raise UnsupportedError("MLX adapts either all layers with DoRA or none", hint="merge the adapter into its base with `qlt merge`")
    foreign = [module for module in layers if not _LAYER.fullmatch(module) and module not in _OUTSIDE]
    if foreign:
        raise UnsupportedError(f"`{foreign[0]}` is not a name that MLX's models have", hint="models whose layers are `model.layers.N` can be written")
    count = (base_config or {}).get("num_hidden_layers")
    if not isinstance(count, int):
        raise MissingError("MLX's config states the number of layers, and the base is unknown", hint="name the model the adapter belongs to with --base")
    for module in layers.keys() & set(_OUTSIDE):
        _refuse_tied(module, base_config or {})
    scales = {layer.scale for layer in layers.values()}
    common = scales.pop() if len(scales) == 1 else None
    tensors = {}
    for module, layer in layers.items():
        tensors[f"{module}.lora_a"] = layer.a.T.contiguous()
        tensors[f"{module}.lora_b"] = (layer.b if common is not None else baked(layer.b, layer.scale)).T.contiguous()
        if layer.magnitude is not None:
            tensors[f"{module}.m"] = layer.magnitude.reshape(-1)
    keys = sorted({match[2] if (match := _LAYER.fullmatch(module)) else module for module in layers})
    rank = max(layer.rank for layer in layers.values())
    config = {
        "fine_tune_type": "dora" if all(dora) else "lora",
        "num_layers": count,
        "lora_parameters": {"rank": rank, "scale": 1.0 if common is None else common, "dropout": 0.0, "keys": keys},
    }
    return config | ({"model": portable.base_name} if portable.base_name else {}), tensors


def _stated_scale(values: Mapping[str, Any], alpha: float | None) -> float | None:
    parameters = values.get("lora_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise CorruptError(f"adapter_config.json: `lora_parameters` is {parameters!r}, expected an object")
    if "scale" in parameters:
        scale = real_number(parameters["scale"], "adapter_config.json: `lora_parameters.scale`")
        if alpha is not None:
            raise UsageError(f"adapter_config.json states the scale {scale:g}, which no alpha changes", hint="leave --alpha out")
        return scale
    if alpha is None:
        raise UsageError(
            "no scale is stated: adapter_config.json with `lora_parameters.scale` is not beside the tensors",
            hint="import the folder, or give --alpha (scale = alpha / rank)",
        )
    return None


def _refuse_tied(module: str, base_config: Mapping[str, Any]) -> None:
    """MLX has one module for both uses of a tied weight, and adapts both; PEFT adapts one."""
    if family_of(base_config).is_tied(base_config):
        raise UnsupportedError(
            f"`{module}` shares its weight with the other end of the model, and MLX cannot adapt one of the two", hint="merge the adapter into its base"
        )


def _magnitude(path: str, magnitude: torch.Tensor | None, kind: str, outputs: int) -> torch.Tensor | None:
    if magnitude is None:
        return None
    if kind == EMBEDDING:
        raise UnsupportedError(f"`{path}` is an embedding with DoRA, which PEFT computes otherwise")
    if math.prod(magnitude.shape) != outputs:
        raise IncompatibleError(f"`{path}.m` is {list(magnitude.shape)}, expected [{outputs}]")
    return magnitude.reshape(-1)


def _base_name(values: Mapping[str, Any]) -> str | None:
    name = values.get("model")
    return name if isinstance(name, str) and name else None
