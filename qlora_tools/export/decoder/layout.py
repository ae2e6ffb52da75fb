"""Which matrices an exported decoder has, what each is made of and how it is stored.

The graph and the plan that fills its weights are both read off this one description.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_tools.export.formats.format import WeightFormat
from qlora_tools.export.schemes import Scheme
from qlora_tools.export.target import CPU, Target
from qlora_tools.models.decoder import Decoder
from qlora_tools.specs import TensorSpec


@dataclass(frozen=True)
class Matrix:
    """One stored weight: the rows of ``modules``' weights one below the other. ``rows`` counts those of each module."""

    name: str
    format: WeightFormat
    modules: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    biased: tuple[bool, ...]
    compute: str = "F32"
    """dtype of the stored bias."""

    @property
    def total_rows(self) -> int:
        return sum(self.rows)

    @property
    def bias(self) -> str | None:
        """Name of the stored bias, where any module has one."""
        return f"{self.name}.bias" if any(self.biased) else None

    def specs(self) -> tuple[TensorSpec, ...]:
        """What is stored: the format's parts, then the bias."""
        parts = self.format.parts(self.name, self.total_rows, self.columns)
        return (*parts, TensorSpec(self.bias, self.compute, (self.total_rows,))) if self.bias else parts


@dataclass(frozen=True)
class Layer:
    qkv: Matrix
    output: Matrix
    feed: tuple[Matrix, ...]
    """``gate_up`` in one, or ``gate`` and ``up``."""
    down: Matrix

    def matrices(self) -> tuple[Matrix, ...]:
        return self.qkv, self.output, *self.feed, self.down


@dataclass(frozen=True)
class Layout:
    """``head`` is ``embedding`` itself where the two are tied."""

    embedding: Matrix
    layers: tuple[Layer, ...]
    head: Matrix
    norms: tuple[tuple[str, int], ...]
    """(tensor name in the source, its size), stored in ``compute`` under its own name."""
    compute: str = "F32"

    def matrices(self) -> Iterator[Matrix]:
        """Every stored matrix once, in the order of the file."""
        yield self.embedding
        for layer in self.layers:
            yield from layer.matrices()
        if self.head is not self.embedding:
            yield self.head


def layout_of(decoder: Decoder, scheme: Scheme, table_dtype: str, target: Target = CPU) -> Layout:
    """The layout of ``decoder`` under ``scheme``. ``table_dtype`` is the checkpoint's dtype for its embedding."""

    def matrix(name: str, roles: tuple[str, ...], layer: int | None = None, form: WeightFormat | None = None) -> Matrix:
        shapes = [decoder.linear_shape(role) for role in roles]
        rows, columns = tuple(shape[0] for shape in shapes), shapes[0][1]
        form = form or scheme.linear(name.rpartition(".")[2], sum(rows), columns)
        modules = tuple(decoder.module(role, layer) for role in roles)
        return Matrix(name, form, modules, rows, columns, tuple(role in decoder.biased for role in roles), target.compute)

    def layer_of(index: int) -> Layer:
        base = f"layers.{index}"
        packed = scheme.packs_feed(2 * decoder.intermediate, decoder.hidden)
        feed = (("gate_up", ("gate", "up")),) if packed else (("gate", ("gate",)), ("up", ("up",)))
        return Layer(
            qkv=matrix(f"{base}.qkv", ("query", "key", "value"), index),
            output=matrix(f"{base}.output", ("output",), index),
            feed=tuple(matrix(f"{base}.{name}", roles, index) for name, roles in feed),
            down=matrix(f"{base}.down", ("down",), index),
        )

    norms = [name for name in decoder.expected_shapes() if name.rpartition(".")[0] in _norm_modules(decoder)]
    shapes = decoder.expected_shapes()
    if decoder.tied:
        embedding = head = matrix("head", ("embedding",), form=scheme.tied(*decoder.linear_shape("head")))
    else:
        embedding = matrix("embedding", ("embedding",), form=scheme.table(table_dtype))
        head = matrix("head", ("head",))
    return Layout(embedding, tuple(layer_of(index) for index in range(decoder.layers)), head, tuple((name, shapes[name][0]) for name in norms), target.compute)


def _norm_modules(decoder: Decoder) -> set[str]:
    inner = ("input_norm", "post_norm", *(("query_norm", "key_norm") if decoder.head_norms else ()))
    return {decoder.module(role, layer) for role in inner for layer in range(decoder.layers)} | {decoder.module("final_norm")}
