"""PEFT's adapter format as one of many: into the portable form, and out of it.

Reading takes what PEFT has ever written (see ``peft_keys.py``) and refuses what would be mis-applied. Writing says the scale
in the way that changes least: a scale that is a power of two is multiplied into B, which is exact, and ``lora_alpha`` equals
``r``; any other scale stays in ``lora_alpha`` (and ``alpha_pattern``), and the factors keep their bits.

Leaves out files (``recognise.py`` opens, the verbs write) and adapters that need a changed base (``modified_base.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from qlora_tools.adapters.adapter import Adapter, Part, bind
from qlora_tools.adapters.peft_config import PeftConfig, parse_config
from qlora_tools.adapters.peft_files import WEIGHTS, Target, adapter_config, saved_key, write_config
from qlora_tools.adapters.peft_keys import LORA, ORIGINAL, PREFIX, TOKENS, Key, parse_key
from qlora_tools.adapters.portable import CONV, EMBEDDING, LINEAR, Layer, Portable
from qlora_tools.adapters.stored import Hints
from qlora_tools.adapters.values import checked
from qlora_tools.checkpoint.writer import write_tensors
from qlora_tools.errors import CorruptError, UnsupportedError, UsageError
from qlora_tools.models.family import Family
from qlora_tools.names import shortened, split_tensor
from qlora_tools.specs import TensorSpec, spec_of

#: Written by old releases, without effect on what the adapter computes.
_HARMLESS_FIELDS = ("merge_weights",)
_QUANTIZED_NAME = re.compile(r"(?:-unsloth)?-bnb-[48]bit$")


@dataclass(frozen=True, eq=False)
class PeftContent:
    """The two files of a PEFT adapter in memory: ``config`` is adapter_config.json, ``tensors`` adapter_model.safetensors."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


class Bindable(Protocol):
    """What a base must tell for an adapter to be matched to it (a ``LogicalCheckpoint`` does)."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...
    @property
    def family(self) -> Family: ...
    @property
    def ties(self) -> Mapping[str, str]: ...


def normalised(content: Any) -> tuple[Any, list[str]]:
    """``adapter_config.json`` without fields that other tools or old releases add and that change nothing; and notes about them."""
    if not isinstance(content, dict):
        return content, []
    strange = sorted(name for name in content if name.startswith("unsloth_"))
    notes = [f"{', '.join(strange)}: unsloth's own settings, left out"] if strange else []
    content = {name: value for name, value in content.items() if name not in (*_HARMLESS_FIELDS, *strange)}
    name = content.get("base_model_name_or_path")
    if isinstance(name, str) and _QUANTIZED_NAME.search(name):
        content["base_model_name_or_path"] = _QUANTIZED_NAME.sub("", name)
        notes.append(f"the adapter was trained on {name}; its 16-bit original is {content['base_model_name_or_path']}")
    return content, notes


def config_of_shapes(specs: Mapping[str, TensorSpec], hints: Hints, where: str) -> dict[str, Any]:
    """A configuration for a raw state dict that came without one: ranks from the shapes, alpha as the caller says.

    Raises:
        UsageError: no alpha, which no file of this kind stores; a rank that is not the tensors'.
    """
    parsed = {name: parse_key(name) for name in specs}
    ranks = {key.path: specs[name].shape[0] for name, key in parsed.items() if key.slot in ("A", "embedding_A") and specs[name].shape}
    if hints.alpha is None:
        raise UsageError(
            f"{where} has no adapter_config.json, so its scale is not known", hint="give --alpha as it was in training (the scale is alpha / rank)"
        )
    for module, rank in ranks.items():
        hints.check_rank(module, rank)
    return {
        "r": max(ranks.values(), default=1),
        "lora_alpha": hints.alpha,
        "rank_pattern": {f"^{re.escape(module)}": rank for module, rank in ranks.items()},
        "target_modules": sorted(ranks),
        "use_dora": any(key.slot == "magnitude_vector" for key in parsed.values()),
        "lora_bias": any(key.slot == "B.bias" for key in parsed.values()),
    }


def read(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str = "the adapter") -> Portable:
    """The portable form of a PEFT adapter; ``tensors`` may read lazily: nothing is read before every key has found its place.

    Raises:
        UnsupportedError: the configuration asks for what is not plain LoRA or DoRA. CorruptError: keys, ranks and
        configuration contradict each other; every key concerned is named.
    """
    content, notes = normalised(content)
    groups = content.get("enable_lora") if isinstance(content, dict) else None
    config = parse_config({name: value for name, value in content.items() if name != "enable_lora"} if groups else content, where)
    found = _sorted_keys(tensors, config, where)
    layers = {module: _layer(module, slots, tensors, config, groups, where) for module, slots in found.lora.items()}
    if config.use_dora and (bare := [module for module, layer in layers.items() if layer.magnitude is None]):
        raise CorruptError(f"{where}: use_dora is set but lora_magnitude_vector is missing for {shortened(bare)}", hint="save the adapter again")
    if found.original:
        notes.append(f"{len(found.original)} copies of base tensors left out: {shortened(found.original, 2)}")
    if groups:
        notes.append("grouped factors of PEFT 0.1 are written out as one block-diagonal B")
    return Portable(
        layers,
        {path: checked(key, tensors[key]) for path, key in found.whole.items()},
        {f"{module}.weight": (rows, checked(key, tensors[key])) for module, (rows, key) in found.rows.items()},
        config.base_model,
        tuple(notes),
        inputs_first=config.fan_in_fan_out,
        tied=config.ensure_weight_tying,
    )


@dataclass(frozen=True)
class _Sorted:
    lora: Mapping[str, Mapping[str, str]]
    rows: Mapping[str, tuple[tuple[int, ...], str]]
    whole: Mapping[str, str]
    original: tuple[str, ...]


def _sorted_keys(keys: Iterable[str], config: PeftConfig, where: str) -> _Sorted:
    """Stored keys by what they name. Raises CorruptError for doubles, strays and keys that PEFT would not apply."""
    lora: dict[str, dict[str, str]] = {}
    rows: dict[str, tuple[tuple[int, ...], str]] = {}
    whole: dict[str, str] = {}
    original: list[str] = []
    strays: list[str] = []
    taken: dict[tuple[str, str, str], str] = {}
    names: set[str] = set()
    for key in sorted(keys):
        parsed = parse_key(key)
        slot = (parsed.kind, parsed.path, parsed.slot)
        if slot in taken:
            raise CorruptError(f"{where}: `{key}` and `{taken[slot]}` are the same tensor of one adapter", hint="save one adapter per file")
        taken[slot] = key
        names |= {parsed.adapter} - {None}  # type: ignore[arg-type]
        if parsed.kind == ORIGINAL:
            original.append(key)
        elif parsed.kind == TOKENS and (indices := config.tokens_of(parsed.path)) is not None:
            rows[parsed.path] = indices, key
        elif parsed.kind == LORA and (config.targets(parsed.path) or config.ensure_weight_tying) and _known_slot(parsed):
            lora.setdefault(parsed.path, {})[parsed.slot] = key
        elif parsed.kind not in (LORA, TOKENS) and "." in parsed.path:
            whole[parsed.path] = key
        else:
            strays.append(key)
    if strays:
        raise CorruptError(f"{where}: the configuration targets none of {len(strays)} tensors: {shortened(strays)}", hint="save the adapter again with PEFT")
    if len(names) > 1:
        raise CorruptError(f"{where}: keys of several adapters ({', '.join(sorted(names))}) in one file", hint="save each adapter by itself")
    if not (lora or rows or whole):
        raise CorruptError(f"{where} holds no tensors", hint="save the adapter again")
    return _Sorted(lora, rows, whole, tuple(original))


def _known_slot(key: Key) -> bool:
    return key.slot in ("A", "B", "embedding_A", "embedding_B", "magnitude_vector", "B.bias")


def _layer(module: str, slots: Mapping[str, str], tensors: Mapping[str, torch.Tensor], config: PeftConfig, groups: Any, where: str) -> Layer:
    embedding = "embedding_A" in slots or "embedding_B" in slots
    a_key, b_key = (slots.get(f"embedding_{side}" if embedding else side) for side in "AB")
    others = slots.keys() - ({"embedding_A", "embedding_B", "magnitude_vector"} if embedding else {"A", "B", "B.bias", "magnitude_vector"})
    if a_key is None or b_key is None or others:
        raise CorruptError(f"{where}: `{module}` has {', '.join(sorted(slots))}: not one A and one B", hint="save the adapter again")
    a, b, rank = checked(a_key, tensors[a_key]), checked(b_key, tensors[b_key]), config.rank_of(module)
    if groups and b.ndim == 3 and isinstance(groups, list):
        a, b = _ungrouped(module, a, b, groups, rank, where)
        rank = a.shape[0]
    kind = EMBEDDING if embedding else CONV if a.ndim > 2 else LINEAR
    wanted = (rank, *(1 for _ in a.shape[2:]))
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[0] != rank or tuple(b.shape[1:]) != wanted:
        raise CorruptError(
            f"{where}: `{module}` has A {list(a.shape)} and B {list(b.shape)}, the configuration says rank {rank}", hint="save the adapter again with PEFT"
        )
    scale = config.alpha / config.rank if groups and a.shape[0] != config.rank else config.scale_of(module)
    bias = checked(slots["B.bias"], tensors[slots["B.bias"]]) if "B.bias" in slots else None
    magnitude = checked(slots["magnitude_vector"], tensors[slots["magnitude_vector"]]) if "magnitude_vector" in slots else None
    for key, vector in (("B.bias", bias), ("magnitude_vector", magnitude)):
        if vector is not None and vector.numel() != b.shape[0]:
            raise CorruptError(f"{where}: `{slots[key]}` has {list(vector.shape)}, expected [{b.shape[0]}]", hint="save the adapter again")
    return Layer(a, b, scale, kind, None if bias is None else bias.to(_wide(bias)).reshape(-1) * scale, None if magnitude is None else magnitude.reshape(-1))


def _ungrouped(module: str, a: torch.Tensor, b: torch.Tensor, groups: list[Any], rank: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """MergedLinear's factors as plain ones: output part g of a fused projection is changed by its own R rows of A.

    ``a`` [G R, I], ``b`` [O / N * G, R, 1] for G enabled of N parts -> [G R, I] and [O, G R].
    """
    enabled = [position for position, wanted in enumerate(groups) if wanted is True]
    if a.ndim != 2 or not enabled or a.shape[0] != rank * len(enabled) or b.shape[1:] != (rank, 1) or b.shape[0] % len(enabled):
        raise CorruptError(f"{where}: `{module}` has A {list(a.shape)} and B {list(b.shape)}, enable_lora is {groups}", hint="save the adapter again")
    width = b.shape[0] // len(enabled)
    wide_b = b.new_zeros(width * len(groups), rank * len(enabled))
    for number, position in enumerate(enabled):
        wide_b[position * width : (position + 1) * width, number * rank : (number + 1) * rank] = b[number * width : (number + 1) * width, :, 0]
    return a, wide_b


def scale_baked(layer: Layer) -> Layer:
    """The same update with the scale multiplied into B where that is exact in B's dtype, else the layer itself."""
    if layer.scale == 0.0:
        return replace(layer, b=torch.zeros_like(layer.b), scale=1.0)
    if layer.scale == 1.0 or math.frexp(abs(layer.scale))[0] != 0.5:
        return layer
    b = layer.b * layer.scale
    return replace(layer, b=b, scale=1.0) if torch.equal(b / layer.scale, layer.b) else layer


def content(portable: Portable, *, modules: Iterable[str] | None = None, task_type: str | None = None) -> PeftContent:
    """What PEFT stores for ``portable``. ``modules``: every module path of the base where it is known; short target names need it.

    Raises:
        UnsupportedError: PEFT's format cannot say it (DoRA on some layers only, a bias on an embedding).
    """
    layers = {module: scale_baked(layer) for module, layer in sorted(portable.layers.items())}
    with_bias = _one_for_all(layers, portable)
    targets = [
        Target(module, tuple(layer.b.shape[:1]), layer.rank, portable.inputs_first and layer.kind == LINEAR, layer.kind == EMBEDDING, with_bias)
        for module, layer in layers.items()
    ]
    tensors: dict[str, torch.Tensor] = {}
    for target in targets:
        tensors |= {_nested(key, target.module, layers): value for key, value in _stored(target, layers[target.module]).items()}
    for name, value in portable.replacements.items():
        tensors[saved_key(name, wrapped=split_tensor(name)[0] in layers)] = value
    for name, (_, rows) in portable.token_rows.items():
        tensors[f"{PREFIX}{split_tensor(name)[0]}.token_adapter.trainable_tokens_delta"] = rows
    config = _config(portable, layers, targets, modules, task_type)
    parse_config(config, "the adapter to be written")  # what is written must be readable, whatever scale a foreign file had
    return PeftContent(config, {key: value.contiguous() for key, value in sorted(tensors.items())})


def write(folder: Path, stored: PeftContent) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``."""
    write_tensors(folder / WEIGHTS, stored.tensors)
    write_config(folder, stored.config)


def bound(stored: PeftContent, base: Bindable, name: str = "the adapter") -> Adapter:
    """``stored`` matched to the tensors of a base: raises what is wrong with keys and shapes, as :func:`bind` does."""
    parts = [Part(key, spec_of(key, value), _reading(value)) for key, value in stored.tensors.items()]
    return bind(name, parse_config(stored.config, name), parts, base.specs, base.family, ties=base.ties)


def _reading(value: torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda rows=None: value if rows is None else value[rows[0] : rows[1]]


def _stored(target: Target, layer: Layer) -> dict[str, torch.Tensor]:
    found = {target.a_key: layer.a, target.b_key: layer.b}
    if target.bias:
        bias = layer.b.new_zeros(layer.b.shape[0]) if layer.bias is None else (layer.bias.to(_wide(layer.bias)) / layer.scale).to(layer.b.dtype)
        found[target.bias_key] = bias
    if layer.magnitude is not None:
        shape = (1, -1, *(1 for _ in layer.a.shape[2:])) if layer.kind == CONV else (-1,)
        found[f"{PREFIX}{target.module}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    return found


def _nested(key: str, module: str, layers: Mapping[str, Layer]) -> str:
    """PEFT wraps a module that holds an adapted one (attention with ``in_proj``), so that the inner path goes through ``base_layer``."""
    parent, leaf = split_tensor(module)
    return key.replace(f"{PREFIX}{module}.", f"{PREFIX}{parent}.base_layer.{leaf}.", 1) if parent in layers else key


def _one_for_all(layers: Mapping[str, Layer], portable: Portable) -> bool:
    """Check PEFT's switches that hold for all layers at once. Returns whether ``lora_bias`` is on."""
    dora = [module for module, layer in layers.items() if layer.magnitude is not None]
    if dora and len(dora) < len(layers):
        rest = [module for module in layers if module not in set(dora)]
        raise UnsupportedError(
            f"DoRA on {shortened(dora, 2)} but not on {shortened(rest, 2)}: PEFT has one switch for all layers", hint="merge it into the base instead"
        )
    biased = [module for module, layer in layers.items() if layer.bias is not None]
    embeddings = [module for module, layer in layers.items() if layer.kind == EMBEDDING]
    if biased and (embeddings or dora):
        raise UnsupportedError(
            f"biases on {shortened(biased, 2)} together with {'DoRA' if dora else 'factors on ' + embeddings[0]} cannot be stored for PEFT",
            hint="merge it into the base instead",
        )
    return bool(biased)


def _config(portable: Portable, layers: Mapping[str, Layer], targets: list[Target], modules: Iterable[str] | None, task_type: str | None) -> dict[str, Any]:
    whole = {split_tensor(name) for name in portable.replacements}
    only_bias = {module for module, _ in whole if {leaf for other, leaf in whole if other == module} == {"bias"}}
    saved = {module for module, _ in whole} - only_bias - layers.keys()
    config = adapter_config(
        targets,
        sorted({*layers, *(modules or ())}),
        modules_to_save=saved,
        bias="all" if only_bias else "none",
        ensure_weight_tying=portable.tied,
        base_model=portable.base_name,
        task_type=task_type,
    )
    if modules is None:
        config["target_modules"] = sorted(layers)  # short names might select more in a base that is not at hand
    config["use_dora"] = any(layer.magnitude is not None for layer in layers.values())
    config["fan_in_fan_out"] = portable.inputs_first and any(layer.kind == LINEAR for layer in layers.values())
    alphas = {module: _number(layer.scale * layer.rank) for module, layer in layers.items()}
    if alphas:
        values = list(alphas.values())
        config["lora_alpha"] = max(sorted(set(values)), key=values.count)
        config["alpha_pattern"] = {f"^{re.escape(module)}": alpha for module, alpha in alphas.items() if alpha != config["lora_alpha"]}
    if portable.token_rows:
        config["trainable_token_indices"] = {split_tensor(name)[0]: list(rows) for name, (rows, _) in portable.token_rows.items()}
    return config


def _number(value: float) -> float | int:
    return int(value) if abs(value) < 1 << 53 and value == int(value) else value


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
