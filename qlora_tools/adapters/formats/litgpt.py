"""litgpt adapters (``lit_model.pth.lora``): ``<module>.lora_A`` and ``.lora_B`` with query, key and value in one grouped pair.

For a plain module A is [R, I] and B [O, R]. For the fused attention input, with n of query, key and value adapted, A is [n R, I] and
B [sum of their outputs, R]: part i of B's rows is multiplied with part i of A's. Where those rows belong depends on the release:

* ``attn.qkv`` (0.5.4 and later): the fused weight is q | k | v, and so are the parts ("concatenated").
* ``attn.attn`` with all three adapted: the parts lie one after the other over a weight that interleaves q..q k v group by group
  ("interleaved"), so each of the three gets a mixture, of rank 3 R.
* ``attn.attn`` with some adapted: concatenated since January 2024, interleaved before; the file does not tell, the user must.

The scale is alpha / R. Hugging Face's rotation order is kept. Left out: mixtures of experts; families with other module names. Reading only.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from qlora_tools.adapters.formats.rope_order import head_counts
from qlora_tools.adapters.formats.targets import block_diagonal, by_module, checked_fit, in_base, real_number, take_pair, whole_number
from qlora_tools.adapters.portable import Layer, Portable
from qlora_tools.adapters.stored import NO_HINTS, Hints
from qlora_tools.errors import IncompatibleError, MissingError, UnsupportedError, UsageError

#: The entry of ``config`` that says the layout, and its values.
LAYOUT, LAYOUTS = "litgpt_qkv", ("interleaved", "concatenated")
_KEY = re.compile(r"(?P<module>transformer\.h\.\d+\.(?:attn\.(?:attn|qkv|proj)|mlp\.(?:fc|fc_1|fc_2|proj))|lm_head)\.(?P<slot>lora_A|lora_B)")
_FUSED = re.compile(r"transformer\.h\.(\d+)\.attn\.(attn|qkv)")
_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_PARTS = ("query", "key", "value")
_LLAMA = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
_NEOX = {"attn.proj": "attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}
_LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"})


def recognise(keys: Collection[str], metadata: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
    """True when a key is a factor of one of litgpt's own modules inside a layer (``attn.qkv``, ``mlp.fc_1`` ...)."""
    return any(_KEY.fullmatch(key) and key.startswith("transformer.") for key in keys)


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, hints: Hints = NO_HINTS) -> Portable:
    """``config`` may hold litgpt's hyperparameters (``lora_alpha``, ``lora_query`` ...), ``enable_lora`` (three truth values) and ``litgpt_qkv``.

    Raises:
        MissingError: no base. UsageError: alpha, the adapted parts or the layout cannot be told and were not given.
        IncompatibleError: keys left over or without partner, wrong base. UnsupportedError: a family that is not mapped.
    """
    values = config or {}
    names, prefix = _family(hints.base_config)
    scale_alpha = _alpha(values, hints.alpha)
    layers: dict[str, Layer] = {}
    for path, slots in by_module(tensors, _KEY, "litgpt").items():
        if match := _FUSED.fullmatch(path):
            a, b = slots.pop("lora_A", None), slots.pop("lora_B", None)
            if a is None or b is None or a.ndim != 2 or b.ndim != 2:
                raise IncompatibleError(f"`{path}` lacks lora_A or lora_B, or they are not matrices")
            found = _fused(path, match[2], a, b, values, hints.base_config or {}, scale_alpha)
            layers |= {in_base(f"{prefix}.layers.{match[1]}.{leaf}", hints.modules): layer for leaf, layer in found.items()}
        else:
            a, b = take_pair(path, slots, ("lora_A", "lora_B"), (0, 1))
            layers[in_base(_hf_name(path, names, prefix), hints.modules)] = Layer(a, b, scale_alpha / b.shape[1])
    for module, layer in layers.items():
        hints.check_rank(module, round(scale_alpha / layer.scale))
    return Portable(checked_fit(layers, hints.modules))


def _fused(path: str, name: str, a: torch.Tensor, b: torch.Tensor, values: Mapping[str, Any], base_config: Mapping[str, Any], alpha: float) -> dict[str, Layer]:
    """The layers of one fused pair: three projections, or the one fused projection of GPT-NeoX."""
    count, rest = divmod(a.shape[0], max(b.shape[1], 1))
    heads, groups, size = _sizes(base_config)
    part_rows = (heads * size, groups * size, groups * size)
    if rest or not 1 <= count <= 3:
        raise IncompatibleError(f"`{path}`: lora_A {list(a.shape)} is not 1, 2 or 3 times the rank of lora_B {list(b.shape)}")
    enabled = _enabled(path, values, count, b.shape[0], part_rows)
    layout = _layout(path, name, values, enabled)
    pairs = list(zip(a.chunk(count), b.split([part_rows[part] for part in enabled]), strict=True))
    scale = alpha / b.shape[1]
    starts = [sum(part_rows[:part]) for part in enabled]
    neox = base_config.get("model_type") == "gpt_neox"
    if layout == "concatenated" and not neox:
        return {f"self_attn.{_PARTS[part][0]}_proj": Layer(part_a, part_b.contiguous(), scale) for part, (part_a, part_b) in zip(enabled, pairs, strict=True)}
    whole_a, whole_b = block_diagonal(pairs, starts, sum(part_rows))
    place = _interleaved_places(heads, groups, size)
    if neox:
        if layout == "concatenated":
            whole_b = torch.empty_like(whole_b).index_copy_(0, place, whole_b)
        return {"attention.query_key_value": Layer(whole_a, whole_b, scale)}
    split = whole_b[place].split(part_rows)
    return {f"self_attn.{part[0]}_proj": Layer(whole_a, rows.contiguous(), scale) for part, rows in zip(_PARTS, split, strict=True) if bool(rows.any())}


def _interleaved_places(heads: int, groups: int, size: int) -> torch.Tensor:
    """Where the rows of q | k | v lie in the weight that holds, per group, its queries, its key and its value."""
    per_group = heads // groups
    rows = torch.arange((heads + 2 * groups) * size).reshape(groups, per_group + 2, size)
    return torch.cat([rows[:, :per_group].reshape(-1), rows[:, per_group].reshape(-1), rows[:, per_group + 1].reshape(-1)])


def _enabled(path: str, values: Mapping[str, Any], count: int, rows: int, part_rows: Sequence[int]) -> tuple[int, ...]:
    """Which of query, key and value are adapted: as stated, or as the sizes allow only one answer."""
    fitting = [parts for parts in itertools.combinations(range(3), count) if sum(part_rows[part] for part in parts) == rows]
    stated = values.get("enable_lora")
    if stated is None and "lora_query" in values:
        stated = [bool(values.get(f"lora_{part}")) for part in _PARTS]
    if stated is not None:
        if not isinstance(stated, Sequence) or len(stated) != 3:
            raise UsageError(f"which of query, key and value are adapted is {stated!r}, expected three truth values")
        parts = tuple(part for part in range(3) if stated[part])
        if parts in fitting:
            return parts
        raise IncompatibleError(f"`{path}`: {', '.join(_PARTS[part] for part in parts) or 'nothing'} adapted does not fit {count} parts with {rows} rows")
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise IncompatibleError(f"`{path}`: {count} parts with {rows} rows do not fit query, key and value of {list(part_rows)} rows")
    choices = " or ".join("+".join(_PARTS[part] for part in parts) for parts in fitting)
    raise UsageError(
        f"`{path}` adapts {choices}, and its sizes do not tell which",
        hint='write "enable_lora": [true, false, true], or what it was, into an adapter_config.json beside the file',
    )


def _layout(path: str, name: str, values: Mapping[str, Any], enabled: tuple[int, ...]) -> str:
    stated = values.get(LAYOUT)
    if stated is not None:
        if stated not in LAYOUTS:
            raise UsageError(f"the layout of query, key and value is {stated!r}, expected {' or '.join(LAYOUTS)}")
        return str(stated)
    if name == "qkv":
        return "concatenated"
    if len(enabled) == 3:
        return "interleaved"
    raise UsageError(
        f"`{path}` is of a release before 0.5.4, and where its rows belong depends on when it was trained",
        hint='write "litgpt_qkv": "concatenated" (trained since January 2024) or "interleaved" (before) into an adapter_config.json beside the file',
    )


def _family(base_config: Mapping[str, Any] | None) -> tuple[Mapping[str, str], str]:
    """litgpt's module inside a layer -> Hugging Face's, and what stands before ``.layers``."""
    if base_config is None:
        raise MissingError("litgpt's names and fused projections need the base's config", hint="name the model the adapter belongs to with --base")
    model_type = str(base_config.get("model_type"))
    if model_type in _LLAMA_LIKE:
        return _LLAMA, "model"
    if model_type == "gpt_neox":
        return _NEOX, "gpt_neox"
    raise UnsupportedError(f"litgpt's names for model type `{model_type}` are not mapped", hint=f"mapped: {', '.join(sorted(_LLAMA_LIKE))}, gpt_neox")


def _hf_name(path: str, names: Mapping[str, str], prefix: str) -> str:
    if path == "lm_head":
        return "lm_head" if prefix == "model" else "embed_out"
    match = _LAYER.fullmatch(path)
    assert match is not None, path
    if match[2] not in names:
        raise IncompatibleError(f"`{path}` is not a module of this family", hint="check that --base is the right model")
    return f"{prefix}.layers.{match[1]}.{names[match[2]]}"


def _sizes(base_config: Mapping[str, Any]) -> tuple[int, int, int]:
    heads, groups = head_counts(base_config, "litgpt")
    size = base_config.get("head_dim") or whole_number(base_config.get("hidden_size"), "config.json of the base: `hidden_size`") // heads
    if heads % groups:
        raise IncompatibleError(f"config.json of the base: {heads} heads do not divide into {groups} groups")
    return heads, groups, whole_number(size, "config.json of the base: `head_dim`")


def _alpha(values: Mapping[str, Any], given: float | None) -> float:
    stated = values.get("lora_alpha", given)
    if stated is None:
        raise UsageError("litgpt's tensors do not state alpha", hint="give the `lora_alpha` of hyperparameters.yaml with --alpha (16 unless it was changed)")
    value = real_number(stated, "lora_alpha")
    if given is not None and given != value:
        raise UsageError(f"the hyperparameters state alpha {value:g}, {given:g} was given", hint="leave --alpha out")
    if not value:
        raise UsageError("alpha is 0, so the adapter would do nothing")
    return value
