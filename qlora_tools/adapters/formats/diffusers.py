"""Adapters of diffusers: ``pytorch_lora_weights.safetensors``, one file for all components of a pipeline.

Keys, after ``unet.``, ``transformer.``, ``text_encoder.``, ``text_encoder_2.`` ... or nothing for a model saved alone::

    X.lora_A.weight, X.lora_B.weight, X.lora_B.bias                     as PEFT names them
    X.lora.down.weight, X.lora.up.weight                                older; also X.lora_down.weight, X.lora_linear_layer.down.weight
    X.processor.to_q_lora.down.weight                                   oldest: X.to_q, and to_out_lora is X.to_out.0
    X.lora_magnitude_vector                                             DoRA
    X.alpha                                                             alpha of one module

The scale of a module is what the configuration in the metadata (``lora_adapter_metadata``) says, else alpha / rank, else 1.
Written files have the scale baked into B and say so in that configuration, because readers differ in what they do about it.

Source: huggingface/diffusers ``loaders/peft.py``, ``loaders/lora_base.py``, ``utils/state_dict_utils.py``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.adapters.formats import grouped, names, pairs
from qlora_tools.adapters.formats.flux import Piece
from qlora_tools.adapters.formats.kohya import refuse_unwritable
from qlora_tools.adapters.formats.names import Base, Modules, Target
from qlora_tools.adapters.peft_config import PeftConfig, parse_config
from qlora_tools.adapters.portable import Layer, Portable
from qlora_tools.adapters.values import checked
from qlora_tools.errors import CorruptError, IncompatibleError, QltError, UnsupportedError
from qlora_tools.names import natural_key, shortened

METADATA_KEY = "lora_adapter_metadata"
DOWN, UP, BIAS, MAGNITUDE, ALPHA = "down", "up", "bias", "magnitude", "alpha"
_ROLE = {"lora_A": DOWN, "lora_B": UP, "down": DOWN, "up": UP}
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<peft>lora_[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
    r"|(?:lora|lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|lora_(?P<dotted>down|up)\.weight"
    r"|(?P<projection>\w+)_lora\.(?P<oldest>down|up)\.weight"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?"
    r"|(?P<alpha>alpha))"
)
#: What the oldest files call ``out`` projections of the two kinds of models.
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_MARKS = re.compile(r"\.(processor\.|to_[qkv]\.|to_[qkv]_lora\.|to_out[._]|lora_linear_layer\.|lora\.(down|up)\.)|transformer_blocks\.|(down|up)_blocks\.")
#: Language models whose paths begin with ``transformer.`` too.
_LANGUAGE_MODEL = re.compile(r"transformer\.(h|wte|wpe|word_embeddings|layers?|blocks)\.")


@dataclass
class _Module:
    """The keys of one module by their role."""

    keys: dict[str, str] = field(default_factory=dict)


def recognise(keys: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file with these keys is one of this format."""
    listed = [key for key in keys if key != ALPHA]
    matches = {key: match for key in listed if (match := _KEY.fullmatch(key))}
    if not any(match["module"] and not (match["magnitude"] or match["alpha"]) for match in matches.values()):
        return False
    if any(key.startswith(("base_model.", *names.UNDERSCORED)) for key in listed) or len(matches) < len(listed):
        return False
    if any(match["peft"] and not match["leaf"] for match in matches.values()):  # bare parameters: other formats write them
        return False
    if METADATA_KEY in metadata or any(_MARKS.search(key) for key in listed):
        return True
    return all(names.component_of(key) and not _LANGUAGE_MODEL.match(key) for key in listed)


def read(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    modules: Modules | Mapping[str, Modules] | None = None,
    *,
    component: str | None = None,
) -> dict[str, Portable]:
    """Component of the pipeline -> adapter for it; ``""`` for the file of one model. ``modules``: the base's modules, of one
    model or by component; without, paths and shapes are taken as the file has them. ``component``: read this one alone.

    Raises:
        IncompatibleError: keys or modules that fit nothing, shapes that do not fit the base, a configuration that disagrees
        with the tensors. CorruptError, NonFiniteError: broken tensors or metadata. UnsupportedError: a configuration that this
        version cannot follow. UsageError: several components for one base model.
    """
    chosen, notes = grouped.choose(_sort(tensors), component)
    problems: list[QltError] = []
    result: dict[str, Portable] = {}
    for part, base in names.bases(modules, chosen).items():
        config = _config(metadata, part)
        targets = _targets(list(chosen[part]), base)
        layers: dict[str, Layer] = {}
        for path in sorted(chosen[part], key=natural_key):
            try:
                layer = _layer(tensors, chosen[part][path], path, config, targets[path].shape)
            except QltError as error:
                problems.append(error)
            else:
                layers |= {piece.module: piece.cut(layer) for piece in targets[path].pieces}
        result[base.component] = Portable(layers, base_name=config.base_model if config else None, notes=notes)
    grouped.raise_all(problems)
    return result


def _sort(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, _Module]]:
    """Component -> path in the file -> keys by role."""
    found: dict[str, dict[str, _Module]] = {}
    leftover: list[str] = []
    for key in tensors:
        component, rest = names.component_of(key) or ("", key)
        match = None if key.startswith(tuple(names.UNDERSCORED)) else _KEY.fullmatch(rest)
        if match is None:
            leftover.append(key)
            continue
        path, role = _meaning(match, component)
        previous = found.setdefault(component, {}).setdefault(path, _Module()).keys.setdefault(role, key)
        if previous != key:
            raise IncompatibleError(f"`{previous}` and `{key}` are the same factor of `{path}`", hint="remove one of them")
    if leftover or (len(found) > 1 and "" in found):
        strange = leftover or [key for module in found[""].values() for key in module.keys.values()]
        raise IncompatibleError(
            f"{len(strange)} keys of the adapter are not understood: {shortened(strange, 20)}",
            hint="nothing was converted: leaving them out would change what the adapter does",
        )
    if not found:
        raise CorruptError("the adapter holds no tensors", hint="save the adapter again")
    return found


def _meaning(match: re.Match[str], component: str) -> tuple[str, str]:
    """(module path, role) of one key."""
    path = f"{match['module']}.".replace(".processor.", ".").removesuffix(".")
    if projection := match["projection"]:
        return _old_projection(path, projection, component), _ROLE[match["oldest"]]
    if match["magnitude"] or match["alpha"]:
        module, _, last = path.rpartition(".")
        if last.endswith("_lora"):  # alpha beside the oldest names
            path = _old_projection(module, last.removesuffix("_lora"), component)
        path = path.removesuffix(".lora").removesuffix(".lora_linear_layer")
        return (f"{path}.0" if path.endswith(".to_out") else path), (MAGNITUDE if match["magnitude"] else ALPHA)
    if match["leaf"] == "bias":
        return path, BIAS if match["peft"] == "lora_B" else "bias of lora_A"
    return path, _ROLE[match["peft"] or match["old"] or match["dotted"]]


def _old_projection(path: str, projection: str, component: str) -> str:
    if component.startswith("text_encoder"):
        return f"{path}.{_TEXT_PROJECTIONS.get(projection, projection)}"
    return f"{path}.{projection}.0" if projection == "to_out" else f"{path}.{projection}"


def _targets(found: list[str], base: Base) -> dict[str, Target]:
    """Path in the file -> what it is in the base."""
    if base.modules is None:
        return {path: Target(None, (Piece(path),)) for path in found}
    result = names.resolve(found, base.component, base.modules)
    counts = Counter(piece.module for target in result.values() for piece in target.pieces)
    twice = [module for module, count in counts.items() if count > 1]
    if twice:
        raise IncompatibleError(f"the adapter changes `{twice[0]}` under two names", hint="remove one of them")
    return result


def _layer(tensors: Mapping[str, torch.Tensor], module: _Module, path: str, config: PeftConfig | None, shape: tuple[int, ...] | None) -> Layer:
    missing = [role for role in (DOWN, UP) if role not in module.keys]
    if missing or "bias of lora_A" in module.keys:
        raise CorruptError(f"`{path}` has {shortened(module.keys.values())} but no {missing[0] if missing else 'use for it'}", hint="the file is incomplete")
    parts = {role: (pairs.factor if role in (DOWN, UP) else checked)(key, tensors[key]) for role, key in module.keys.items() if role != ALPHA}
    scale = _scale(tensors, module, path, parts[DOWN].shape[0], config)
    if config is not None and config.use_dora != (MAGNITUDE in parts):
        raise IncompatibleError(f"`{path}`: use_dora is {config.use_dora} in the metadata, the file says otherwise", hint="save the adapter again")
    made = pairs.layer(path, parts[DOWN], parts[UP], scale, shape, parts.get(MAGNITUDE))
    if BIAS not in parts:
        return made
    if parts[BIAS].shape != (made.b.shape[0],):
        raise IncompatibleError(f"`{module.keys[BIAS]}` is {list(parts[BIAS].shape)} for {made.b.shape[0]} outputs", hint="save the adapter again")
    return Layer(made.a, made.b, made.scale, made.kind, parts[BIAS].float() * scale, made.magnitude)


def _scale(tensors: Mapping[str, torch.Tensor], module: _Module, path: str, rank: int, config: PeftConfig | None) -> float:
    key = module.keys.get(ALPHA)
    stored = pairs.alpha_scale(key, tensors[key], rank) if key else None
    if config is None:
        return 1.0 if stored is None else stored
    if config.rank_of(path) != rank:
        raise IncompatibleError(f"`{path}` has rank {rank}, the metadata says {config.rank_of(path)}", hint="save the adapter again")
    said = config.scale_of(path)
    if stored is not None and abs(stored - said) > 1e-6 * abs(said):
        raise IncompatibleError(f"`{key}` makes the scale {stored:g}, the metadata {said:g}", hint=f"remove one of the two: `{METADATA_KEY}` or the alphas")
    return said


def _config(metadata: Mapping[str, str], component: str) -> PeftConfig | None:
    """The configuration for one component in the metadata, ``None`` without."""
    if METADATA_KEY not in metadata:
        return None
    where = f"metadata `{METADATA_KEY}`"
    try:
        content = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where} is not JSON: {error}", hint="save the adapter again") from None
    if not isinstance(content, dict):
        raise CorruptError(f"{where} holds {type(content).__name__}, expected an object", hint="save the adapter again")
    prefix = f"{component}."
    own = content if not component else {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    return parse_config(own, where) if own else None


def write(portables: Mapping[str, Portable]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of one file with every component's adapter; ``""`` alone makes the file of one model.

    The scale is in B: exactly, in fp32 where B's own type could not hold the product.

    Raises:
        UnsupportedError: something that this format cannot hold (embeddings, whole tensors, DoRA beside plain layers), by name.
    """
    if len(portables) > 1 and "" in portables:
        raise UnsupportedError("a component without a name beside others", hint="name every component, as in `unet`")
    tensors: dict[str, torch.Tensor] = {}
    content: dict[str, Any] = {}
    for component, portable in portables.items():
        refuse_unwritable(portable, "diffusers", biases=True)
        prefix = f"{component}." if component else ""
        biased = any(layer.bias is not None for layer in portable.layers.values())
        for module, layer in portable.layers.items():
            tensors |= {f"{prefix}{module}.{leaf}": tensor.contiguous() for leaf, tensor in _leaves(layer, biased).items()}
        content |= {f"{prefix}{name}": value for name, value in _written_config(portable, component, biased).items()}
    return tensors, {"format": "pt", METADATA_KEY: json.dumps(content, indent=2, sort_keys=True)}


def _leaves(layer: Layer, biased: bool) -> dict[str, torch.Tensor]:
    wide = layer.b.double() * layer.scale
    exact = bool(torch.equal(wide.to(layer.b.dtype).double(), wide))
    leaves = {"lora_A.weight": layer.a, "lora_B.weight": wide.to(layer.b.dtype if exact else torch.float32)}
    if biased:  # loaders want all or none
        leaves["lora_B.bias"] = layer.bias if layer.bias is not None else torch.zeros(layer.b.shape[0], dtype=layer.b.dtype)
    if layer.magnitude is not None:
        kernel = layer.a.shape[2:]
        leaves["lora_magnitude_vector"] = layer.magnitude.reshape(1, -1, *(1 for _ in kernel)) if kernel else layer.magnitude
    return leaves


def _written_config(portable: Portable, component: str, biased: bool) -> dict[str, Any]:
    """What diffusers passes to PEFT's ``LoraConfig``: alpha is the rank everywhere."""
    dora = {module for module, layer in portable.layers.items() if layer.magnitude is not None}
    plain = sorted(set(portable.layers) - dora)
    if dora and (plain or biased):
        raise UnsupportedError(
            f"diffusers has DoRA for all layers or none, and without biases: {shortened(plain or sorted(dora))}", hint="write kohya, or merge the adapter"
        )
    # text encoders lost the leading `text_model.` of their paths in newer libraries; names without it match both
    said = {module: module.removeprefix("text_model.") if component.startswith("text_encoder") else module for module in portable.layers}
    ranks = Counter(layer.rank for layer in portable.layers.values())
    rank = ranks.most_common(1)[0][0] if ranks else 8
    others = {re.escape(said[module]): layer.rank for module, layer in portable.layers.items() if layer.rank != rank}
    anchored = others if component.startswith("text_encoder") else {f"^{name}": value for name, value in others.items()}
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": anchored, "alpha_pattern": anchored}
    config |= {"target_modules": sorted(said.values(), key=natural_key), "use_dora": bool(dora)}
    return config | {"lora_bias": True} if biased else config
