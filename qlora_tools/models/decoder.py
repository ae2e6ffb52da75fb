"""What a decoder-only language model computes, as data: sizes, options and the names of its tensors.

:func:`decoder_of` reads the ``decoder`` entry of the family's JSON together with a config.json. The block it
describes is the Llama shape: RMS norm, attention with rotary positions, RMS norm, gated feed-forward, with a
residual round each half. Anything else is refused by name; nothing here guesses.

The JSON entry holds::

    architectures  names in config.json's ``architectures`` that this wiring serves
    embedding, final_norm, head, layer    module paths; ``layer`` holds ``{layer}``
    input_norm, post_norm, query, key, value, output, gate, up, down    module paths inside a layer
    query_norm, key_norm    per-head RMS norms between projection and rotary positions (Qwen3); optional
    biased         linear module -> true, or the config key that decides it
    window         the config key that switches the sliding window on, or true where its size alone does
    defaults       config values that hold where config.json is silent
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.family import family_of, known_families
from qlora_tools.models.rope import Rope, rope_of
from qlora_tools.names import shortened

LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
_GLOBAL = ("embedding", "final_norm", "head")
_SILU = ("silu", "swish")


@dataclass(frozen=True)
class Decoder:
    """One model's decoder. Sizes count elements; ``windows`` has one entry per layer (``None``: sees everything before it)."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    norm_epsilon: float
    max_positions: int
    rope: Rope
    windows: tuple[int | None, ...]
    tied: bool
    biased: frozenset[str]
    modules: Mapping[str, str]

    @property
    def query_size(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def head_norms(self) -> bool:
        """True where queries and keys are RMS-normalised per head."""
        return "query_norm" in self.modules

    def module(self, role: str, layer: int | None = None) -> str:
        """Module path of ``role`` (a key of the JSON entry), inside ``layer`` where it belongs to one."""
        path = self.modules[role]
        return path if layer is None else f"{self.modules['layer'].format(layer=layer)}.{path}"

    def linear_shape(self, role: str) -> tuple[int, int]:
        """(out, in) of a linear's weight; ``head`` and ``embedding`` count as (vocab, hidden)."""
        return {
            "query": (self.query_size, self.hidden),
            "key": (self.kv_size, self.hidden),
            "value": (self.kv_size, self.hidden),
            "output": (self.hidden, self.query_size),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "head": (self.vocab, self.hidden),
            "embedding": (self.vocab, self.hidden),
        }[role]

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape of every tensor the decoder reads."""
        shapes: dict[str, tuple[int, ...]] = {f"{self.module('embedding')}.weight": self.linear_shape("embedding")}
        for layer in range(self.layers):
            for role in ("input_norm", "post_norm"):
                shapes[f"{self.module(role, layer)}.weight"] = (self.hidden,)
            for role in ("query_norm", "key_norm") if self.head_norms else ():
                shapes[f"{self.module(role, layer)}.weight"] = (self.head_size,)
            for role in LINEARS:
                shapes[f"{self.module(role, layer)}.weight"] = self.linear_shape(role)
                if role in self.biased:
                    shapes[f"{self.module(role, layer)}.bias"] = self.linear_shape(role)[:1]
        shapes[f"{self.module('final_norm')}.weight"] = (self.hidden,)
        if not self.tied:
            shapes[f"{self.module('head')}.weight"] = self.linear_shape("head")
        return shapes


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """The decoder that ``config`` (a parsed config.json) describes.

    Raises:
        UnsupportedError: architecture, activation, rotary type or option without a faithful graph here.
        IncompatibleError: a size is missing, is no positive whole number, or does not fit the others.
    """
    facts = _facts(config)
    values = {**facts.get("defaults", {}), **config}
    activation = values.get("hidden_act") or "silu"
    if activation not in _SILU:
        raise UnsupportedError(f"activation `{activation}` has no graph here", hint=f"supported: {', '.join(_SILU)}")
    heads, hidden = _size(values, "num_attention_heads"), _size(values, "hidden_size")
    head_size = _size(values, "head_dim", hidden // heads)
    kv_heads = _size(values, "num_key_value_heads", heads)
    layers = _size(values, "num_hidden_layers")
    if heads % kv_heads:
        raise IncompatibleError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    max_positions = _size(values, "max_position_embeddings")
    modules = {role: path for role, path in facts.items() if isinstance(path, str) and role != "window"}
    return Decoder(
        model_type=str(config["model_type"]),
        hidden=hidden,
        intermediate=_size(values, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab=_size(values, "vocab_size"),
        norm_epsilon=float(values["rms_norm_eps"]),
        max_positions=max_positions,
        rope=rope_of(values, head_size, max_positions),
        windows=_windows(facts.get("window"), values, layers),
        tied=bool(family_of(config).ties(config)),
        biased=frozenset(role for role, rule in facts.get("biased", {}).items() if rule is True or values.get(rule)),
        modules=modules,
    )


def _facts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The family's ``decoder`` entry, after checking that it serves this config's architecture."""
    model_type = str(config.get("model_type", ""))
    entry = family_of(config).decoder if model_type in known_families() else None
    if entry is None:
        exportable = sorted(name for name in known_families() if family_of({"model_type": name}).decoder)
        raise UnsupportedError(f"model_type `{model_type}` cannot be exported", hint=f"exportable: {', '.join(exportable)}")
    for architecture in config.get("architectures") or ():
        if architecture not in entry["architectures"]:
            raise UnsupportedError(
                f"architecture `{architecture}` cannot be exported", hint=f"exportable for {model_type}: {', '.join(entry['architectures'])}"
            )
    missing = [role for role in (*_GLOBAL, "layer", "input_norm", "post_norm", *LINEARS) if role not in entry]
    assert not missing, f"{model_type}.json: decoder entry lacks {missing}"
    return entry


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    found = default if values.get(key) is None else values[key]
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise IncompatibleError(
            f"config.json: {key} is {found!r}, expected a positive whole number", hint="the config.json does not describe this model; take the original one"
        )
    return found


def _windows(rule: str | bool | None, values: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Window of each layer: ``layer_types`` where the config has it, else every layer from ``max_window_layers`` on (0 where unnamed)."""
    kinds = values.get("layer_types")
    if kinds is not None:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise UnsupportedError(f"layer_types holds {shortened(unknown)}", hint="only full_attention and sliding_attention have a graph here")
        if len(kinds) < layers:
            raise IncompatibleError(f"config.json: layer_types has {len(kinds)} entries for {layers} layers")
    enabled = rule is True or (isinstance(rule, str) and bool(values.get(rule)))
    if not enabled or values.get("sliding_window") is None:
        return (None,) * layers
    size = _size(values, "sliding_window")
    if kinds is not None:
        return tuple(size if kind == "sliding_attention" else None for kind in kinds[:layers])
    first = values.get("max_window_layers") or 0 if isinstance(rule, str) else 0
    return tuple(size if layer >= first else None for layer in range(layers))
