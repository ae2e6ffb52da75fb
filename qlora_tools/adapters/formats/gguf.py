"""GGUF LoRA adapters, as llama.cpp loads them: names, orientation, row order and scale. The container is ``gguf_file.py``.

A layer is ``<base tensor>.weight.lora_a`` [R, I] and ``.lora_b`` [O, R] (row-major here; GGUF lists sizes the other way round), for the
token embedding ``lora_a`` is [V, R] and ``lora_b`` [D, R]. The runtime multiplies by ``alpha / R``, R being *that layer's* rank and alpha
one number for the file; alpha 0 means that the factors are taken as they are. So plain LoRA and rank patterns are written with their
alpha, and whatever has no common alpha (alpha patterns, rsLoRA with several ranks) is baked into B with alpha 0.

The llama architecture keeps query and key rows in pairs order (``rope_order.py``). A GGUF base holds every weight as [O, I], also
GPT-2's, which the Hugging Face checkpoint keeps as [I, O]; the factors here are by inputs and outputs, so none is transposed.

Left out, because the runtime ignores or cannot express it: DoRA, biases, replaced tensors, convolutions, adapters of tied heads.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from qlora_tools.adapters.formats.gguf_file import read_file, write_file
from qlora_tools.adapters.formats.rope_order import halves_to_pairs, head_counts, pairs_to_halves
from qlora_tools.adapters.formats.targets import baked, by_module, checked_fit, in_base, narrowed, real_number, refuse_beyond_factors, take_pair
from qlora_tools.adapters.portable import EMBEDDING, LINEAR, Layer, Portable
from qlora_tools.adapters.stored import NO_HINTS, Hints
from qlora_tools.errors import IncompatibleError, MissingError, UnsupportedError, UsageError
from qlora_tools.models.family import family_of
from qlora_tools.names import shortened
from qlora_tools.specs import dtype as dtype_named

_KEY = re.compile(r"(?P<module>.+)\.weight\.(?P<slot>lora_a|lora_b)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_TOKEN_EMBEDDING = "token_embd"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Model:
    """How one Hugging Face ``model_type`` appears in GGUF. ``names``: module template -> tensor template, ``{}`` for the layer number."""

    architecture: str
    names: Mapping[str, str]
    paired_rows: bool


def recognise(keys: Collection[str], metadata: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
    """True for what :func:`load` gives: the values of a GGUF adapter, or keys that only such a file has."""
    return metadata.get("general.type") == "adapter" or (bool(keys) and all(_KEY.fullmatch(key) for key in keys))


def load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The file's values and tensors; pass the values to :func:`read` as ``config``."""
    return read_file(path)


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, hints: Hints = NO_HINTS) -> Portable:
    """An adapter file as :func:`load` gave it. ``base_config`` is needed where query and key rows are permuted.

    Raises:
        IncompatibleError: keys left over or without partner, wrong base. UnsupportedError: not a LoRA adapter, or an unknown
        architecture. UsageError: ``alpha`` contradicts the file. MissingError: head counts are needed and there is no base.
    """
    values = config or {}
    _check_type(values)
    model = _model_of_file(values, hints.base_config)
    stated = real_number(values.get("adapter.lora.alpha", 0.0), "adapter.lora.alpha")
    if hints.alpha is not None and not math.isclose(hints.alpha, stated, rel_tol=1e-6):
        raise UsageError(f"the file states alpha {stated:g}, {hints.alpha:g} was given", hint="leave --alpha out")
    known = {tensor: module for module, tensor in model.names.items()}
    grouped = by_module(tensors, _KEY, "GGUF")
    foreign = [name for name in grouped if _template(name)[0] not in known]
    if foreign:
        raise IncompatibleError(f"architecture `{model.architecture}` has no tensors {shortened(foreign)}", hint="check that --base is the right model")
    layers = {}
    for name, slots in grouped.items():
        template, number = _template(name)
        layer = _read_layer(name, slots, stated)
        hints.check_rank(name, layer.rank)
        if model.paired_rows and template.endswith((".attn_q", ".attn_k")):
            heads = head_counts(hints.base_config, "GGUF")[template.endswith("_k")]
            layer = Layer(layer.a, pairs_to_halves(layer.b, heads), layer.scale)
        layers[in_base(known[template].format(number), hints.modules)] = layer
    return Portable(checked_fit(layers, hints.modules), base_name=_base_name(values))


def write(portable: Portable, path: Path, *, base_config: Mapping[str, Any] | None, dtype: str | None = None) -> None:
    """Write ``path`` (which must not exist). ``dtype``: ``F32``, ``F16`` or ``BF16`` for all tensors; ``None`` keeps each as it is.

    Raises:
        MissingError: no config of the base. UnsupportedError: a model without a table of names, or parts that llama.cpp drops.
    """
    metadata, tensors = render(portable, base_config=base_config, dtype=dtype)
    write_file(path, metadata, tensors)


def render(
    portable: Portable, *, base_config: Mapping[str, Any] | None, dtype: str | None = None
) -> tuple[dict[str, str | int | float], dict[str, torch.Tensor]]:
    """The values and tensors that :func:`write` writes."""
    refuse_beyond_factors(portable, "a GGUF adapter")
    if base_config is None:
        raise MissingError("GGUF names tensors by architecture, and without the base it is unknown", hint="name the model the adapter belongs to with --base")
    model = _model_of_base(base_config)
    alpha = common_alpha(portable)
    tensors: dict[str, torch.Tensor] = {}
    for module, layer in portable.layers.items():
        name = _gguf_name(module, model, base_config)
        b = layer.b if alpha else baked(layer.b, layer.scale)
        if model.paired_rows and name.endswith((".attn_q", ".attn_k")):
            b = halves_to_pairs(b, head_counts(base_config, "GGUF")[name.endswith("_k")])
        a = layer.a.T if layer.kind == EMBEDDING else layer.a
        tensors[f"{name}.weight.lora_a"] = _stored(module, a, dtype)
        tensors[f"{name}.weight.lora_b"] = _stored(module, b, dtype)
    metadata: dict[str, str | int | float] = {
        "general.architecture": model.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    if portable.base_name:
        metadata |= {"general.base_model.count": 1, "general.base_model.0.name": portable.base_name}
    return metadata, tensors


def common_alpha(portable: Portable) -> float:
    """The alpha with which ``alpha / rank`` is every layer's scale, as fp32 stores it; 0.0 where there is none and scales must be baked in."""
    alphas = [layer.scale * layer.rank for layer in portable.layers.values()]
    stored = float(struct.unpack("<f", struct.pack("<f", alphas[0]))[0]) if abs(alphas[0]) < 3e38 else 0.0
    return stored if all(math.isclose(alpha, stored, rel_tol=2**-23) for alpha in alphas) else 0.0


def _read_layer(name: str, slots: dict[str, torch.Tensor], alpha: float) -> Layer:
    if name == _TOKEN_EMBEDDING:
        a, b = take_pair(name, slots, ("lora_a", "lora_b"), (1, 1))
        return Layer(a.T.contiguous(), b, alpha / b.shape[1] if alpha else 1.0, EMBEDDING)
    a, b = take_pair(name, slots, ("lora_a", "lora_b"), (0, 1))
    return Layer(a, b, alpha / b.shape[1] if alpha else 1.0, LINEAR)


def _check_type(values: Mapping[str, Any]) -> None:
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        if values.get(key) != expected:
            raise UnsupportedError(f"`{key}` of the GGUF file is {values.get(key)!r}, expected `{expected}`", hint="only LoRA adapter files are imported")
    if values.get("adapter.alora.invocation_tokens"):
        raise UnsupportedError("this adapter acts only after certain tokens (aLoRA), which a PEFT LoRA folder cannot say")


def _model_of_file(values: Mapping[str, Any], base_config: Mapping[str, Any] | None) -> _Model:
    architecture = values.get("general.architecture")
    if base_config is not None:
        model = _model_of_base(base_config)
        if model.architecture != architecture:
            raise IncompatibleError(f"the adapter is for architecture `{architecture}`, the base is `{model.architecture}`", hint="name the right --base")
        return model
    for model in _models().values():
        if model.architecture == architecture:
            return model
    raise UnsupportedError(f"architecture `{architecture}` has no table of tensor names", hint=f"known: {', '.join(_architectures())}")


def _model_of_base(base_config: Mapping[str, Any]) -> _Model:
    model_type = str(base_config.get("model_type"))
    if model_type not in _models():
        raise UnsupportedError(f"model type `{model_type}` has no table of GGUF names", hint=f"known: {', '.join(sorted(_models()))}")
    return _models()[model_type]


def _gguf_name(module: str, model: _Model, base_config: Mapping[str, Any]) -> str:
    """The tensor of ``module``, without ``.weight``."""
    template, number = _template(module)
    name = model.names.get(template) or model.names.get(f"transformer.{template}")
    if name is None:
        raise UnsupportedError(f"`{module}` has no name in GGUF's architecture `{model.architecture}`", hint="merge the adapter and convert the model")
    if name in ("output", _TOKEN_EMBEDDING) and family_of(base_config).is_tied(base_config):
        raise UnsupportedError(
            f"`{module}` shares its weight with the {'embedding' if name == 'output' else 'head'}, and the runtime cannot adapt one of the two",
            hint="merge the adapter into its base with `qlt merge` and convert the model",
        )
    return name.format(number)


def _template(name: str) -> tuple[str, str]:
    """``blk.3.attn_q`` -> (``blk.{}.attn_q``, ``3``)."""
    match = _NUMBER.search(name)
    return (name[: match.start()] + "{}" + name[match.end() :], match.group()) if match else (name, "")


def _stored(module: str, tensor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    wanted = dtype_named(dtype).torch if dtype else tensor.dtype
    return narrowed(module, tensor, wanted if wanted in _FLOATS else torch.float32)


def _base_name(values: Mapping[str, Any]) -> str | None:
    organization, name = values.get("general.base_model.0.organization"), values.get("general.base_model.0.name")
    if not isinstance(name, str) or not name:
        return None
    return f"{organization}/{name}" if isinstance(organization, str) and organization else name


@lru_cache(maxsize=1)
def _models() -> dict[str, _Model]:
    facts = json.loads((resources.files(__package__) / "gguf_names.json").read_text(encoding="utf-8"))
    return {model_type: _Model(entry["architecture"], facts["names"][entry["names"]], entry["paired_rows"]) for model_type, entry in facts["models"].items()}


def _architectures() -> list[str]:
    return sorted({model.architecture for model in _models().values()})
