"""Which matrices an exported decoder has, what each is made of and how it is stored.

The graph and the plan that fills its weights are both read off this one description.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from qlora_tools.export.decoder.matrices import Feed, Matrix, Mixture
from qlora_tools.export.decoder.mixture import mixture_of
from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.format import WeightFormat
from qlora_tools.export.formats.normal_floats import NormalFloats
from qlora_tools.export.schemes import Scheme
from qlora_tools.export.target import CPU, Target
from qlora_tools.models.decoder import Decoder, Piece


@dataclass(frozen=True)
class Layer:
    qkv: Matrix
    output: Matrix
    feed: Feed | Mixture

    def matrices(self) -> tuple[Matrix, ...]:
        return self.qkv, self.output, *self.feed.matrices()


@dataclass(frozen=True)
class Vector:
    """Scale or bias of a norm, stored under its own name; ``offset`` is added on the way."""

    name: str
    size: int
    offset: float = 0.0


@dataclass(frozen=True)
class Layout:
    """``head`` is ``embedding`` itself where the two are tied."""

    embedding: Matrix
    layers: tuple[Layer, ...]
    head: Matrix
    norms: tuple[Vector, ...]
    compute: str = "F32"
    positions: Matrix | None = None
    """Table of learned positions."""

    @property
    def flat(self) -> bool:
        """Whether some product takes tokens in one row only: ``QGemm``, ``Gemm`` (the router of every mixture is one), or a ``MatMul`` that pads its inputs."""
        multiplied = [self.head, *(matrix for layer in self.layers for matrix in layer.matrices())]
        return not all(isinstance(matrix.format, Blocks | NormalFloats) for matrix in multiplied)

    def matrices(self) -> Iterator[Matrix]:
        """Every stored matrix once, in the order of the file."""
        yield self.embedding
        if self.positions is not None:
            yield self.positions
        for layer in self.layers:
            yield from layer.matrices()
        if self.head is not self.embedding:
            yield self.head


def layout_of(decoder: Decoder, scheme: Scheme, table_dtype: str, target: Target = CPU) -> Layout:
    """The layout of ``decoder`` under ``scheme``. ``table_dtype`` is the checkpoint's dtype for its embedding."""

    def matrix(name: str, roles: tuple[str, ...], layer: int | None = None, form: WeightFormat | None = None) -> Matrix:
        rows, columns = sum(decoder.linear_shape(role)[0] for role in roles), decoder.linear_shape(roles[0])[1]
        pieces, biased = _pieces(decoder, roles, layer)
        return Matrix(name, form or scheme.linear(name.rpartition(".")[2], rows, columns), pieces, columns, biased, target.compute)

    def feed_of(index: int) -> Feed | Mixture:
        if decoder.experts is not None and decoder.mixes(index):
            return mixture_of(decoder, decoder.experts, scheme, index)
        base = f"layers.{index}"
        roles = ("gate", "up") if decoder.gated else ("up",)  # one matrix for both was tried: copying the halves costs what one pass less spares
        into = tuple(matrix(f"{base}.{role}", (role,), index) for role in roles)
        return Feed(into, matrix(f"{base}.down", ("down",), index))

    def layer_of(index: int) -> Layer:
        base = f"layers.{index}"
        return Layer(matrix(f"{base}.qkv", ("query", "key", "value"), index), matrix(f"{base}.output", ("output",), index), feed_of(index))

    if decoder.tied:
        embedding = head = matrix("head", ("embedding",), form=scheme.tied(*decoder.linear_shape("head")))
    else:
        embedding = matrix("embedding", ("embedding",), form=scheme.table(table_dtype))
        head = matrix("head", ("head",))
    positions = matrix("positions", ("positions",), form=scheme.table(table_dtype)) if decoder.has("positions") else None
    return Layout(embedding, tuple(layer_of(index) for index in range(decoder.layers)), head, tuple(_vectors(decoder)), target.compute, positions)


def _pieces(decoder: Decoder, roles: tuple[str, ...], layer: int | None) -> tuple[tuple[Piece, ...], tuple[bool, ...]]:
    """Where the rows of ``roles`` come from, and which of the pieces have a bias. What lies together in the checkpoint is one piece."""
    pieces: list[Piece] = []
    biased: list[bool] = []
    for role in roles:
        piece = decoder.piece(role, layer)
        last = pieces[-1] if pieces else None
        if last is not None and last.module == piece.module and last.first + last.rows == piece.first:
            pieces[-1] = replace(last, rows=last.rows + piece.rows)
        else:
            pieces.append(piece)
            biased.append(role in decoder.biased)
    return tuple(pieces), tuple(biased)


def _vectors(decoder: Decoder) -> Iterator[Vector]:
    for module, size in decoder.norm_modules().items():
        yield Vector(f"{module}.weight", size, decoder.norm.offset)
        if decoder.norm.biased:
            yield Vector(f"{module}.bias", size)
