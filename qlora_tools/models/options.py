"""How a decoder family's options are read: norms, activation, scales, windows and rotation, from the family's entry and a config.json.

The entry's keys are described in :mod:`qlora_tools.models.decoder`, which puts the options together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.reading import ConfigReader
from qlora_tools.models.rope import Rope, rope_entry, rope_of
from qlora_tools.names import shortened

#: What checkpoints call an activation -> what it is called here.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
#: The rotation of layers of no special kind.
GLOBAL = "global"
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Norm:
    """All norms of a decoder. ``kind`` is ``rms`` or ``layer``; ``offset`` is added to the scales in the checkpoint."""

    kind: str
    epsilon: float
    offset: float = 0.0
    biased: bool = False


@dataclass(frozen=True)
class Scales:
    """Factors of the embedding, of what each half adds, of attention scores and of logits. Softcap c: c * tanh(x / c), 0 is none."""

    attention: float
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0


def check_fixed(fixed: Mapping[str, Any], values: ConfigReader) -> None:
    for key, wanted in fixed.items():
        if values.get(key, wanted) != wanted:
            raise UnsupportedError(f"{key}={values.get(key)!r} has no graph here", hint=f"only {key}={wanted!r} has")


def norm_of(rule: Mapping[str, Any], values: ConfigReader) -> Norm:
    key = rule.get("epsilon", "rms_norm_eps")
    return Norm(rule.get("kind", "rms"), values.number(key), float(rule.get("offset", 0.0)), bool(rule.get("biased", False)))


def activation_of(facts: Mapping[str, Any], values: ConfigReader) -> str:
    found = values.get(facts.get("activation", "hidden_act")) or "silu"
    name = facts.get("activations", {}).get(found, found)
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"activation `{found}` has no graph here", hint=f"supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def scales_of(facts: Mapping[str, Any], values: ConfigReader, head_size: int) -> Scales:
    scales = {name: _scale(rule, values) for name, rule in facts.get("scales", {}).items()}
    caps = {name: values.number(key) if values.get(key) else 0.0 for name, key in facts.get("softcaps", {}).items()}
    return Scales(
        attention=scales.get("attention", head_size**-0.5),
        embedding=scales.get("embedding", 1.0),
        residual=scales.get("residual", 1.0),
        logits=scales.get("logits", 1.0),
        attention_softcap=caps.get("attention", 0.0),
        logit_softcap=caps.get("logits", 0.0),
    )


def _scale(rule: str, values: ConfigReader) -> float:
    """The number that "key", "sqrt key", "1/key" or "1/sqrt key" stands for."""
    inverse, key = rule.startswith("1/"), rule.removeprefix("1/")
    value = values.number(key.removeprefix("sqrt "))
    value = math.sqrt(value) if key.startswith("sqrt ") else value
    return 1 / value if inverse else value


def layer_types_of(facts: Mapping[str, Any], values: ConfigReader, layers: int) -> tuple[str, ...] | None:
    """``layer_types`` of the config, or of the family's interval where it has one; ``None`` where neither says anything."""
    kinds = values.get("layer_types")
    every = values.size(facts["full_every"], 1) if "full_every" in facts else None
    if kinds is None:
        return None if every is None else tuple(_FULL if (layer + 1) % every == 0 else _SLIDING for layer in range(layers))
    unknown = sorted(set(kinds) - {_FULL, _SLIDING})
    if unknown:
        raise UnsupportedError(f"layer_types holds {shortened(unknown)}", hint="only full_attention and sliding_attention have a graph here")
    if len(kinds) < layers:
        raise IncompatibleError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    return tuple(kinds[:layers])


def windows_of(facts: Mapping[str, Any], values: ConfigReader, kinds: tuple[str, ...] | None, layers: int) -> tuple[int | None, ...]:
    """Window of each layer: where ``kinds`` says so, else every layer from ``max_window_layers`` on (0 where unnamed)."""
    rule = facts.get("window")
    if rule is None:
        if kinds is not None and _SLIDING in kinds:
            raise UnsupportedError("layer_types holds sliding_attention, which this family does not have")
        return (None,) * layers
    enabled, size = rule is True or bool(values.get(rule)), values.get("sliding_window")
    first = (values.get("max_window_layers") or 0) if isinstance(rule, str) else 0
    size = values.size("sliding_window") if enabled and size is not None else None
    if kinds is not None:
        found = tuple(size if kind == _SLIDING else None for kind in kinds)
        if facts.get("uniform") and size is not None and None in found:
            raise UnsupportedError("layer_types with layers that see everything: this family's layers all have the window")
        return found
    return tuple(size if layer >= first else None for layer in range(layers))


def rotary_of(
    rule: Mapping[str, Any] | bool, values: ConfigReader, kinds: tuple[str, ...] | None, layers: int, head_size: int, max_positions: int
) -> tuple[dict[str, Rope], tuple[str | None, ...]]:
    """The rotations by name, and the name of each layer's."""
    if isinstance(rule, bool):
        assert not rule, "rotary is false or says how"
        return {}, (None,) * layers
    entry, theta = rope_entry(values), values.get("rope_theta")
    options: dict[str, Any] = {"partial": bool(rule.get("partial")), "aliases": rule.get("aliases")}
    if "kinds" not in rule:
        ropes = {GLOBAL: rope_of(entry, theta, values, head_size, max_positions, **options)}
        rotated = _rotated_layers(rule.get("unrotated"), values, layers)
        return ropes, tuple(GLOBAL if turns else None for turns in rotated)
    if values.get("rope_parameters") and not entry.keys() <= rule["kinds"].keys():
        raise UnsupportedError(f"rope_parameters holds {shortened(sorted(entry))}, expected {', '.join(rule['kinds'])}")
    ropes = {}
    for kind, (name, key, scaled) in rule["kinds"].items():
        own = entry.get(kind, {} if entry.keys() & rule["kinds"].keys() or not scaled else entry)
        ropes[name] = rope_of(own or {}, values.get(key), values, head_size, max_positions, **options)
    names = {kind: name for kind, (name, _, _) in rule["kinds"].items()}
    return ropes, tuple(names[kind] for kind in kinds or (_FULL,) * layers)


def _rotated_layers(rule: tuple[str, str] | None, values: ConfigReader, layers: int) -> list[bool]:
    """Whether each layer rotates: a list in the config, or every layer but each n-th."""
    if rule is None:
        return [True] * layers
    listed, every = values.get(rule[0]), values.size(rule[1])
    if listed is None:
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if len(listed) < layers:
        raise IncompatibleError(f"config.json: {rule[0]} has {len(listed)} entries for {layers} layers")
    return [bool(turns) for turns in listed[:layers]]
