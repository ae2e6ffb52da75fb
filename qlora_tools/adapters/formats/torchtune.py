"""torchtune adapters: ``<module>.lora_a.weight`` [R, I], ``<module>.lora_b.weight`` [O, R], for DoRA ``<module>.magnitude`` [O].

torchtune names modules its own way (``layers.0.attn.output_proj``, ``layers.0.mlp.w1``) and, for the families it rotates in pairs
order (Llama, Mistral, Gemma), keeps the rows of query and key projections permuted; the rows of B, and of the magnitude, are put back.
Qwen and Phi-3 are kept in Hugging Face's order. Phi-3's parts are fused again, block by block. The scale is alpha / rank, with alpha
from the ``adapter_config.json`` that torchtune writes beside, or given. torchtune can write PEFT folders too; those are PEFT's. Reading only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from qlora_tools.adapters.formats.rope_order import head_counts, pairs_to_halves
from qlora_tools.adapters.formats.targets import block_diagonal, by_module, checked_fit, in_base, real_number, take_pair
from qlora_tools.adapters.portable import EMBEDDING, LINEAR, Layer, Portable
from qlora_tools.adapters.stored import NO_HINTS, Hints
from qlora_tools.errors import IncompatibleError, MissingError, UnsupportedError, UsageError

_KEY = re.compile(r"(?P<module>.+)\.(?P<slot>lora_a\.weight|lora_b\.weight|magnitude)")
_A, _B = "lora_a.weight", "lora_b.weight"
_PAIRED = frozenset({"llama", "mistral", "gemma", "gemma2"})
_STRAIGHT = frozenset({"qwen2", "qwen3"})
_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "output": "lm_head"}
#: Phi-3: torchtune's part -> (fused module, its place in it).
_FUSED = {
    "attn.q_proj": ("self_attn.qkv_proj", 0),
    "attn.k_proj": ("self_attn.qkv_proj", 1),
    "attn.v_proj": ("self_attn.qkv_proj", 2),
    "mlp.w1": ("mlp.gate_up_proj", 0),
    "mlp.w3": ("mlp.gate_up_proj", 1),
}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def recognise(keys: Collection[str], metadata: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
    """True when factors are named ``lora_a.weight`` (small letters), as only torchtune does."""
    return any(key.endswith((f".{_A}", f".{_B}")) for key in keys)


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, hints: Hints = NO_HINTS) -> Portable:
    """``base_config`` is required: it tells the family, and with it the order of rows.

    Raises:
        MissingError: no base. UsageError: no alpha, or one that contradicts the config. IncompatibleError: keys left over or
        without partner, wrong base. UnsupportedError: a family whose row order is not known.
    """
    family = _family(hints.base_config)
    value = _alpha(config or {}, hints.alpha)
    parts: dict[str, dict[int, Layer]] = {}
    layers: dict[str, Layer] = {}
    for path, slots in by_module(tensors, _KEY, "torchtune").items():
        a, b = take_pair(path, slots, (_A, _B), (0, 1))
        hints.check_rank(path, a.shape[0])
        magnitude = slots.pop("magnitude", None)
        if magnitude is not None and magnitude.shape != b.shape[:1]:
            raise IncompatibleError(f"`{path}.magnitude` is {list(magnitude.shape)}, expected [{b.shape[0]}]")
        layer = Layer(a, b, value / a.shape[0], EMBEDDING if path == "tok_embeddings" else LINEAR, magnitude=magnitude)
        match = _LAYER.fullmatch(path)
        if family == "phi3" and match and match[2] in _FUSED:
            fused, place = _FUSED[match[2]]
            parts.setdefault(f"model.layers.{match[1]}.{fused}", {})[place] = layer
            continue
        if family in _PAIRED and match and match[2] in ("attn.q_proj", "attn.k_proj"):
            layer = _in_halves(layer, head_counts(hints.base_config, "torchtune")[match[2] == "attn.k_proj"])
        layers[in_base(_hf_name(path, match), hints.modules)] = layer
    for module, found in parts.items():
        layers[in_base(module, hints.modules)] = _fuse(module, found, hints.base_config or {})
    return Portable(checked_fit(layers, hints.modules), base_name=_base_name(config or {}))


def _family(base_config: Mapping[str, Any] | None) -> str:
    if base_config is None:
        raise MissingError(
            "whether torchtune permuted the rows of query and key projections depends on the base, and it is unknown",
            hint="name the model the adapter belongs to with --base",
        )
    family = str(base_config.get("model_type"))
    if family not in _PAIRED | _STRAIGHT | {"phi3"}:
        raise UnsupportedError(
            f"torchtune's order of rows for model type `{family}` is not known here", hint="let torchtune write a PEFT folder and import that"
        )
    return family


def _alpha(config: Mapping[str, Any], given: float | None) -> float:
    stated = config.get("lora_alpha")
    if stated is None:
        if given is None:
            raise UsageError("torchtune's tensors do not state alpha", hint="give the `lora_alpha` of the recipe with --alpha")
        return real_number(given, "alpha")
    value = real_number(stated, "adapter_config.json: `lora_alpha`")
    if given is not None and given != value:
        raise UsageError(f"adapter_config.json states alpha {value:g}, {given:g} was given", hint="leave --alpha out")
    return value


def _hf_name(path: str, match: re.Match[str] | None) -> str:
    name = f"model.layers.{match[1]}.{_NAMES[match[2]]}" if match and match[2] in _NAMES else _OUTSIDE.get(path)
    if name is None:
        raise IncompatibleError(f"`{path}` is not a module of torchtune's decoders", hint=f"known: layers.N with {', '.join(_NAMES)}; {', '.join(_OUTSIDE)}")
    return name


def _in_halves(layer: Layer, heads: int) -> Layer:
    magnitude = None if layer.magnitude is None else pairs_to_halves(layer.magnitude, heads)
    return Layer(layer.a, pairs_to_halves(layer.b, heads), layer.scale, magnitude=magnitude)


def _fuse(module: str, found: Mapping[int, Layer], base_config: Mapping[str, Any]) -> Layer:
    """Parts of one fused weight, in their places; a part that was not adapted leaves zeros."""
    if any(layer.magnitude is not None for layer in found.values()):
        raise UnsupportedError(f"`{module}` is fused in the base, and DoRA on some of its parts is not DoRA on the whole")
    if len({layer.scale for layer in found.values()}) != 1:
        raise IncompatibleError(f"the parts of `{module}` have different ranks")
    sizes = _part_sizes(module, base_config)
    wrong = [place for place, layer in found.items() if layer.b.shape[0] != sizes[place]]
    if wrong:
        raise IncompatibleError(f"part {wrong[0]} of `{module}` has {found[wrong[0]].b.shape[0]} rows, the base {sizes[wrong[0]]}")
    places = sorted(found)
    a, b = block_diagonal([(found[place].a, found[place].b) for place in places], [sum(sizes[:place]) for place in places], sum(sizes))
    return Layer(a, b, found[places[0]].scale)


def _part_sizes(module: str, base_config: Mapping[str, Any]) -> tuple[int, ...]:
    if module.endswith("gate_up_proj"):
        width = base_config.get("intermediate_size")
        sizes: tuple[Any, ...] = (width, width)
    else:
        heads, kv_heads = head_counts(base_config, "torchtune")
        size = base_config.get("head_dim") or int(base_config.get("hidden_size") or 0) // heads
        sizes = (heads * size, kv_heads * size, kv_heads * size)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise IncompatibleError(f"config.json of the base does not give the sizes of the parts of `{module}`")
    return sizes


def _base_name(config: Mapping[str, Any]) -> str | None:
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None
