"""What a decoder-only language model computes, as data: sizes, options and the names of its tensors.

:func:`decoder_of` reads the ``decoder`` entry of the family's JSON together with a config.json. Every family is the
same block, with parts left out::

    x = embedding * scale (+ learned positions)
    x = x + residual_scale * norm_after_attention(attention(norm_before_attention(x)))
    x = x + residual_scale * norm_after_feed(feed(norm_before_feed(x)))
    logits = softcap(head(finalnorm_of(x)) * scale)

Whatever else a config asks for is refused by name; nothing here guesses. The JSON entry holds::

    architectures  names in config.json's ``architectures`` that this wiring serves
    embedding, positions, final_norm, head, layer    module paths; ``layer`` holds ``{layer}``, ``positions`` is a table of learned positions
    norm_before_attention, norm_after_attention, norm_before_feed, norm_after_feed    module paths inside a layer; any may be left out
    query, key, value, output, gate, up, down    the same, of linears; without ``gate`` the feed-forward is down(activation(up(x)))
    fused          module path inside a layer -> the linears it holds one below the other
    experts        the feed-forward of layers that have a mixture of experts; see :mod:`qlora_tools.models.experts`
    query_norm, key_norm    norms between projection and rotary positions; ``head_norms`` says whether over each "head" or the whole "projection"
    biased         linear -> true, or the config key that decides it
    norm           kind ("rms", "layer"), epsilon (config key), offset (added to stored scales), biased
    activation     the config key; ``activations`` translates names that the family reads in its own way
    scales, softcaps    embedding, residual, attention, logits -> config key, or "sqrt key", "1/key", "1/sqrt key"
    rotary         false, or: partial (heads may be rotated in part), aliases (kinds under other names), unrotated (config keys: list of
                   layers that rotate, and the interval of those that do not), kinds (layer type -> cache name, key of the base, whether scaled)
    inner          times the hidden size the feed-forward is wide where the config does not say
    window         the config key that switches the sliding window on, or true where its size alone does
    uniform        true where all layers have the window or none
    full_every     the config key of the interval of layers without window, where ``layer_types`` is missing
    renamed, defaults, ignored    usual config key -> the family's; values where config.json is silent; keys known to change nothing
    fixed          config key -> the one value that has a graph here
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.experts import Experts, Place, experts_of
from qlora_tools.models.family import Family, family_of, known_families
from qlora_tools.models.options import Norm, Scales, activation_of, check_fixed, layer_types_of, norm_of, rotary_of, scales_of, windows_of
from qlora_tools.models.reading import ConfigReader
from qlora_tools.models.rope import Rope

LINEARS = ("query", "key", "value", "output", "gate", "up", "down")
FEED = ("gate", "up", "down")
LAYER_NORMS = ("norm_before_attention", "norm_after_attention", "norm_before_feed", "norm_after_feed")
_GLOBAL = ("embedding", "positions", "final_norm", "head", "layer")
_HEAD_NORMS = ("query_norm", "key_norm")


@dataclass(frozen=True)
class Piece:
    """Rows ``[first, first + rows)`` of the [out, in] weight of ``module``, which has ``of`` rows and may be stored ``transposed``, [in, out]."""

    module: str
    first: int
    rows: int
    of: int
    transposed: bool = False

    @property
    def whole(self) -> bool:
        return self.rows == self.of


@dataclass(frozen=True)
class Decoder:
    """One model's decoder. Sizes count elements. Per layer: ``windows`` (``None``: sees everything before it), ``rotary`` (a key of ``ropes``, or ``None``)."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    max_positions: int
    norm: Norm
    activation: str
    scales: Scales
    ropes: Mapping[str, Rope]
    rotary: tuple[str | None, ...]
    windows: tuple[int | None, ...]
    tied: bool
    biased: frozenset[str]
    modules: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    transposed: frozenset[str]
    head_norms: str = ""
    """What ``query_norm`` and ``key_norm`` go over: each "head", the whole "projection", or "": there are none."""
    experts: Experts | None = None

    @property
    def query_size(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def gated(self) -> bool:
        """True where the feed-forward multiplies up(x) by activation(gate(x))."""
        return "gate" in self.linears

    @property
    def linears(self) -> tuple[str, ...]:
        """Roles of a layer's linears."""
        return tuple(role for role in LINEARS if role in self.modules or any(role in roles for roles in self.fused.values()))

    def linears_of(self, layer: int) -> tuple[str, ...]:
        """Roles of the linears of one layer: where it is a mixture, those of a feed-forward are not among them."""
        return tuple(role for role in self.linears if role not in FEED) if self.mixes(layer) else self.linears

    def mixes(self, layer: int) -> bool:
        """Whether the feed-forward of the layer is a mixture of experts."""
        return self.experts is not None and layer in self.experts.layers

    def layer_path(self, layer: int) -> str:
        return self.modules["layer"].format(layer=layer)

    def module(self, role: str, layer: int | None = None) -> str:
        """Module path of ``role`` (a key of the JSON entry), inside ``layer`` where it belongs to one. A fused linear's is that of the module that holds it."""
        fused = next((path for path, roles in self.fused.items() if role in roles), None)
        path = self.modules[role] if fused is None else fused
        return path if layer is None else f"{self.modules['layer'].format(layer=layer)}.{path}"

    def has(self, role: str) -> bool:
        return role in self.modules

    def piece(self, role: str, layer: int | None = None) -> Piece:
        """Where the checkpoint keeps the weight of ``role``."""
        roles = next((roles for roles in self.fused.values() if role in roles), (role,))
        sizes = [self.linear_shape(each)[0] for each in roles]
        return Piece(self.module(role, layer), sum(sizes[: roles.index(role)]), sizes[roles.index(role)], sum(sizes), role in self.transposed)

    def linear_shape(self, role: str) -> tuple[int, int]:
        """(out, in) of a linear's weight; tables count as (entries, hidden)."""
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
            "positions": (self.max_positions, self.hidden),
        }[role]

    def norm_modules(self) -> dict[str, int]:
        """Module path -> size of every norm, in the order of the graph."""
        found: dict[str, int] = {}
        heads = {"head": (self.head_size, self.head_size), "projection": (self.query_size, self.kv_size), "": ()}[self.head_norms]
        for layer in range(self.layers):
            found |= {self.module(role, layer): self.hidden for role in LAYER_NORMS if self.has(role)}
            found |= {self.module(role, layer): size for role, size in zip(_HEAD_NORMS, heads, strict=False)}
        return found | {self.module("final_norm"): self.hidden}

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape as stored of every tensor the decoder reads."""
        tables = ("embedding", "positions") if self.has("positions") else ("embedding",)
        shapes: dict[str, tuple[int, ...]] = {f"{self.module(role)}.weight": self.linear_shape(role) for role in tables}
        for module, size in self.norm_modules().items():
            shapes |= {f"{module}.{leaf}": (size,) for leaf in (("weight", "bias") if self.norm.biased else ("weight",))}
        for layer in range(self.layers):
            for role in self.linears_of(layer):
                piece = self.piece(role, layer)
                columns = self.linear_shape(role)[1]
                shapes[f"{piece.module}.weight"] = (columns, piece.of) if piece.transposed else (piece.of, columns)
                if role in self.biased:
                    shapes[f"{piece.module}.bias"] = (piece.of,)
            if self.experts is not None and self.mixes(layer):
                shapes |= {f"{self.layer_path(layer)}.{module}.weight": shape for module, shape in self.experts.weights(self.hidden).items()}
        if not self.tied:
            shapes[f"{self.module('head')}.weight"] = self.linear_shape("head")
        return shapes

    def stacked_places(self) -> dict[str, Place]:
        """Where the tensors of mixtures lie in checkpoints that stack all experts, and in transformers' model."""
        if self.experts is None:
            return {}
        mixed = [layer for layer in range(self.layers) if self.mixes(layer)]
        return {name: place for layer in mixed for name, place in self.experts.stacked_places(self.layer_path(layer), self.hidden).items()}

    def first(self, layers: int, vocab: int, experts: int | None = None) -> Decoder:
        """The same decoder cut off after its first layers and vocabulary entries, and its first experts."""
        mixture = self.experts if self.experts is None or experts is None else replace(self.experts, count=experts)
        return replace(self, layers=layers, vocab=vocab, windows=self.windows[:layers], rotary=self.rotary[:layers], experts=mixture)

    def as_stored(self, names: Container[str]) -> Decoder:
        """The decoder with its modules named as in a checkpoint that holds ``names``: some leave out the prefix of the body (GPT-2's ``transformer.``)."""
        prefix, _, rest = self.modules["embedding"].partition(".")
        if not rest or f"{self.modules['embedding']}.weight" in names or f"{rest}.weight" not in names:
            return self
        return replace(self, modules={role: path.removeprefix(f"{prefix}.") if role in _GLOBAL else path for role, path in self.modules.items()})


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """The decoder that ``config`` (a parsed config.json) describes.

    Raises:
        UnsupportedError: architecture, activation, rotary type or option without a faithful graph here.
        IncompatibleError: a size is missing, is no positive whole number, or does not fit the others.
    """
    facts, family = decoder_facts(config), family_of(config)
    values = ConfigReader(config, facts.get("renamed", {}), facts.get("defaults", {}), facts.get("ignored", ()))
    check_fixed(facts.get("fixed", {}), values)
    heads, hidden = values.size("num_attention_heads"), values.size("hidden_size")
    kv_heads = values.size("num_key_value_heads", heads)
    layers = values.size("num_hidden_layers")
    if heads % kv_heads:
        raise IncompatibleError(f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    head_size, max_positions = values.size("head_dim", hidden // heads), values.size("max_position_embeddings")
    kinds = layer_types_of(facts, values, layers)
    windows = windows_of(facts, values, kinds, layers)
    ropes, rotary = rotary_of(facts.get("rotary", {}), values, kinds, layers, head_size, max_positions)
    found = Decoder(
        model_type=str(config["model_type"]),
        hidden=hidden,
        intermediate=values.size("intermediate_size", facts["inner"] * hidden if "inner" in facts else None),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab=values.size("vocab_size"),
        max_positions=max_positions,
        norm=norm_of(facts.get("norm", {}), values),
        activation=activation_of(facts, values),
        scales=scales_of(facts, values, head_size),
        ropes=ropes,
        rotary=rotary,
        windows=windows,
        tied=bool(family.ties(config)),
        biased=frozenset(role for role, rule in facts.get("biased", {}).items() if rule is True or values.get(rule)),
        modules={role: facts[role] for role in (*_GLOBAL, *LAYER_NORMS, *LINEARS, *_HEAD_NORMS) if role in facts},
        fused={path: tuple(roles) for path, roles in facts.get("fused", {}).items()},
        transposed=_transposed(facts, family),
        head_norms=facts.get("head_norms", "head") if "query_norm" in facts else "",
        experts=experts_of(facts["experts"], values, layers) if "experts" in facts else None,
    )
    values.refuse_unread()
    return found


def decoder_facts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The family's ``decoder`` entry, after checking that it serves this config's architecture.

    Raises:
        UnsupportedError: it has none, or serves another architecture.
    """
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
    return entry


def _transposed(facts: Mapping[str, Any], family: Family) -> frozenset[str]:
    """Linears stored [in, out]."""
    alone = {role: facts[role] for role in LINEARS if role in facts}
    fused = {role: path for path, roles in facts.get("fused", {}).items() for role in roles}
    return frozenset(role for role, path in (alone | fused).items() if family.is_transposed(path))
