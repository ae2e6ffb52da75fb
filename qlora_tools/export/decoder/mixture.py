"""The matrices of a mixture of experts: all experts in the few that one node takes, or a feed-forward for each.

One node (``QMoE``, ``MoE``) decodes a token several times faster than a feed-forward for each of many experts, most of which get no token; where the
target has none that takes the sizes, each expert is a feed-forward over the tokens that chose it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_tools.export.decoder.matrices import Feed, Matrix, Mixture
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.experts import has_one_node
from qlora_tools.export.formats.format import WeightFormat
from qlora_tools.export.schemes import Scheme
from qlora_tools.models.decoder import Decoder, Piece
from qlora_tools.models.experts import ROLES, SHARED_ROLES, Experts


def mixture_of(decoder: Decoder, experts: Experts, scheme: Scheme, layer: int) -> Mixture:
    """The mixture in ``layer``. Router and gates of shared experts stay in floats: they decide."""
    part = _Part(decoder, experts, scheme, layer)
    floats = Dense(scheme.target.compute, scheme.target.compute)
    form = scheme.expert(decoder.hidden, experts.intermediate)
    every = tuple(range(experts.count))
    joint = decoder.activation == "silu" and not scheme.target.standard and has_one_node(form, decoder.hidden, experts.intermediate)
    if joint:
        gate_up = part.matrix("experts.gate_up", ROLES[:2], form, every, woven=True, joint=True)
        feeds: tuple[Feed, ...] = (Feed((gate_up,), part.matrix("experts.down", ROLES[2:], form, every, joint=True)),)
    else:
        feeds = tuple(part.feed(f"experts.{expert}", ROLES, form, form, (expert,)) for expert in every)
    return Mixture(
        part.matrix("router", ("router",), floats),
        feeds,
        part.shared() if experts.shared is not None else None,
        part.matrix("shared_scale", ("shared_scale",), floats) if "shared_scale" in experts.shared_roles else None,
    )


@dataclass(frozen=True)
class _Part:
    """What the matrices of one layer's mixture have in common."""

    decoder: Decoder
    experts: Experts
    scheme: Scheme
    layer: int

    def matrix(
        self, name: str, roles: tuple[str, ...], form: WeightFormat, of: tuple[int | None, ...] = (None,), *, woven: bool = False, joint: bool = False
    ) -> Matrix:
        """The weights of ``roles``, for each expert in ``of`` (None: they are no expert's)."""
        rows, columns = self.experts.linear_shape(roles[0], self.decoder.hidden)
        path = self.decoder.layer_path(self.layer)
        pieces = tuple(Piece(f"{path}.{self.experts.module(role, expert)}", 0, rows, rows) for expert in of for role in roles)
        unbiased = (False,) * len(pieces)
        return Matrix(f"layers.{self.layer}.{name}", form, pieces, columns, unbiased, self.scheme.target.compute, woven=woven, joint=joint)

    def feed(self, name: str, roles: tuple[str, ...], into: WeightFormat, down: WeightFormat, of: tuple[int | None, ...] = (None,)) -> Feed:
        halves = (self.matrix(f"{name}.gate", roles[:1], into, of), self.matrix(f"{name}.up", roles[1:2], into, of))
        return Feed(halves, self.matrix(f"{name}.down", roles[2:3], down, of))

    def shared(self) -> Feed:
        """The expert that sees every token is stored like any feed-forward."""
        rows, columns = self.experts.linear_shape(SHARED_ROLES[0], self.decoder.hidden)
        return self.feed("shared", SHARED_ROLES, self.scheme.linear("gate", rows, columns), self.scheme.linear("down", columns, rows))
