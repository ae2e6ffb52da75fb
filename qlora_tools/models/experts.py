"""Mixtures of experts in a decoder, as data: how many there are, which layers have them, what their tensors are called.

A router scores the experts for every token, the ``per_token`` best compute its gated feed-forward, and their outputs are summed with the
softmax of the scores as weights. Some families add a shared expert that sees every token, scaled by a gate of its own.

The entry ``experts`` of a family's ``decoder`` holds::

    count, intermediate, shared    config keys (the first of a list that the config has): experts, their inner size, the shared expert's
    normalized     true, or the config key that says whether the weights of a token's experts are made to sum to 1
    sparse         true where ``mlp_only_layers`` and ``decoder_sparse_step`` say which layers are dense
    router, gate, up, down         module paths inside a layer; the last three hold ``{expert}``
    shared_gate, shared_up, shared_down, shared_scale    the same for the shared expert
    stacked        ``router``, ``gate_up``, ``down``: the names of the same tensors where all experts lie in one

Checkpoints store experts one by one, or all in one 3-D tensor [E, rows, columns] with gate above up, as transformers holds them in memory.
Names here are the ones of single experts; :meth:`Experts.stacked_places` says where each lies in the other form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qlora_tools.errors import IncompatibleError

ROLES = ("gate", "up", "down")
SHARED_ROLES = ("shared_gate", "shared_up", "shared_down", "shared_scale")


class Config(Protocol):
    """How a config.json is asked for its values."""

    def get(self, key: str, default: Any = None) -> Any: ...
    def size(self, key: str, default: int | None = None) -> int: ...


@dataclass(frozen=True)
class Place:
    """Where an expert's weight, or the router's (``expert`` None), lies in the stacked form: rows ``[start, stop)`` of one expert's part of ``tensor``."""

    tensor: str
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Experts:
    """The mixture of a decoder. ``layers`` have it, the others a plain feed-forward. ``shared``: inner size of the shared expert, if there is one."""

    count: int
    per_token: int
    intermediate: int
    normalized: bool
    layers: frozenset[int]
    shared: int | None
    modules: Mapping[str, str]
    stacked: Mapping[str, str]

    def module(self, role: str, expert: int | None = None) -> str:
        """Module path inside a layer."""
        path = self.modules[role]
        return path if expert is None else path.format(expert=expert)

    def linear_shape(self, role: str, hidden: int) -> tuple[int, int]:
        """(out, in) of a weight."""
        inner = self.shared if role.startswith("shared_") else self.intermediate
        assert inner is not None, f"no shared expert, so no {role}"
        if role == "router":
            return self.count, hidden
        if role == "shared_scale":
            return 1, hidden
        return (hidden, inner) if role.endswith("down") else (inner, hidden)

    def weights(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Module path inside a layer -> (out, in) of every weight of its mixture."""
        found = {self.module("router"): self.linear_shape("router", hidden)}
        for expert in range(self.count):
            found |= {self.module(role, expert): self.linear_shape(role, hidden) for role in ROLES}
        return found | {self.module(role): self.linear_shape(role, hidden) for role in self.shared_roles}

    def expert_elements(self, hidden: int) -> int:
        """Weights of one expert."""
        return 3 * hidden * self.intermediate

    @property
    def shared_roles(self) -> tuple[str, ...]:
        return tuple(role for role in SHARED_ROLES if role in self.modules) if self.shared is not None else ()

    def stacked_places(self, layer_path: str, hidden: int) -> dict[str, Place]:
        """Tensor name of each single expert's weight, and of the router's, in the layer at ``layer_path`` -> its place in the stacked form."""
        places = {f"{layer_path}.{self.module('router')}.weight": Place(f"{layer_path}.{self.stacked['router']}.weight", None, 0, self.count)}
        inner = self.intermediate
        for expert in range(self.count):
            for role, tensor, start, stop in (("gate", "gate_up", 0, inner), ("up", "gate_up", inner, 2 * inner), ("down", "down", 0, hidden)):
                places[f"{layer_path}.{self.module(role, expert)}.weight"] = Place(f"{layer_path}.{self.stacked[tensor]}", expert, start, stop)
        return places


def experts_of(entry: Mapping[str, Any], config: Config, layers: int) -> Experts | None:
    """The mixture that ``config`` describes; ``entry`` is the family's ``experts``. None where no layer has one.

    Raises:
        IncompatibleError: a size is missing or no positive whole number, or a token sees more experts than there are.
    """
    dense = frozenset(config.get("mlp_only_layers") or ()) if entry.get("sparse") else frozenset()
    step = config.size("decoder_sparse_step", 1) if entry.get("sparse") else 1
    mixed = frozenset(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    normalized = entry["normalized"] is True or bool(config.get(entry["normalized"]))
    count_key = _present(entry["count"], config)
    keys = ["num_experts_per_tok", entry["intermediate"], *([entry["shared"]] if "shared" in entry else [])]
    for key in keys:
        config.get(key)  # known, even where no layer needs it
    if not mixed or config.get(count_key) == 0:
        return None
    count, per_token = config.size(count_key), config.size("num_experts_per_tok")
    if per_token > count:
        raise IncompatibleError(f"config.json: num_experts_per_tok {per_token} is above {count_key} {count}")
    return Experts(
        count=count,
        per_token=per_token,
        intermediate=config.size(entry["intermediate"]),
        normalized=normalized,
        layers=mixed,
        shared=config.size(entry["shared"]) if "shared" in entry else None,
        modules={role: entry[role] for role in ("router", *ROLES, *SHARED_ROLES) if role in entry},
        stacked=entry["stacked"],
    )


def _present(keys: str | Sequence[str], config: Config) -> str:
    """The first of ``keys`` that the config has a value for; all are asked for. The family's default is that of the last."""
    listed = [keys] if isinstance(keys, str) else list(keys)
    found = [key for key in listed if config.get(key) is not None]
    return found[0] if found else listed[-1]
