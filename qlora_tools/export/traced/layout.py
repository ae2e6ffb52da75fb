"""Which of a traced graph's weights are carried in which form, decided from how the graph uses them.

A matrix that is only multiplied with gets a linear's format, a table that is only looked up gets a table's, one that is both (a tied embedding) the
format of such. What the graph does anything else with, vectors, and matrices too small to be worth it stay floats. So no list of layer names decides
what is a weight; names only tell attention from the rest (:mod:`qlora_tools.models.family`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

import onnx_ir as ir

from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.format import WeightFormat
from qlora_tools.export.schemes import Scheme
from qlora_tools.models.family import Family
from qlora_tools.specs import TensorSpec, dtype

#: Below this many weights a matrix, a head with a row per class, or a table stays in floats: what could be saved is not worth its rounding.
_SMALL_MATRIX, _SMALL_HEAD, _SMALL_TABLE = 1 << 10, 1 << 16, 1 << 18


class Kind(Enum):
    MULTIPLY = "multiplied by its transpose"
    MULTIPLY_TURNED = "multiplied as it is, [in, out]"
    LOOKUP = "rows are looked up"
    TRANSPOSE = "transposed for something else"
    OTHER = "something else"


@dataclass(frozen=True)
class Use:
    """``node`` is the MatMul, Gemm or Gather that uses the weight, or whatever else does. ``transpose``: the node in between, if there is one."""

    kind: Kind
    node: ir.Node
    transpose: ir.Node | None = None


@dataclass(frozen=True)
class Weight:
    """One tensor of the checkpoint as the graph carries it. ``name``: in the checkpoint and in the file; ``live``: names in the model.

    With ``form`` a matrix [rows, columns], which the checkpoint may hold ``turned``; without, a tensor of ``dtype``, whose axes are exchanged in the file
    if ``turned``.
    """

    name: str
    live: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    form: WeightFormat | None = None
    turned: bool = False

    @property
    def rows(self) -> int:
        return self.shape[1] if self.turned else self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape) // self.rows

    @property
    def carried(self) -> str:
        """What it becomes, in the words of schemes."""
        return (self.form or Dense(self.dtype, self.dtype)).carried

    def specs(self) -> tuple[TensorSpec, ...]:
        """What is stored."""
        if self.form is not None:
            return self.form.parts(self.name, self.rows, self.columns)
        return (TensorSpec(self.name, self.dtype, self.shape[::-1] if self.turned else self.shape),)


def uses_of(value: ir.Value, graph: ir.Graph) -> Iterator[Use]:
    """How ``graph`` uses a weight."""
    for node, index in value.uses():
        if node.graph is not graph:
            yield Use(Kind.OTHER, node)
        elif node.op_type == "Transpose" and list(node.attributes["perm"].as_ints() if "perm" in node.attributes else [1, 0]) == [1, 0]:
            output = node.outputs[0]
            users = list(output.uses())
            plain = not output.is_graph_output() and all(user.op_type == "MatMul" and place == 1 and user.graph is graph for user, place in users)
            for user, _ in users:
                yield Use(Kind.MULTIPLY if plain else Kind.TRANSPOSE, user, node)
        else:
            yield Use(_direct(node, index), node)


def _direct(node: ir.Node, index: int) -> Kind:
    if node.op_type == "MatMul" and index == 1:
        return Kind.MULTIPLY_TURNED
    if node.op_type == "Gather" and index == 0 and _integer(node, "axis", 0) == 0:
        return Kind.LOOKUP
    if node.op_type == "Gemm" and index == 1 and _scale(node, "alpha") == _scale(node, "beta") == 1.0 and not _integer(node, "transA", 0):
        return Kind.MULTIPLY if _integer(node, "transB", 0) else Kind.MULTIPLY_TURNED
    return Kind.OTHER


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _scale(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float() if name in node.attributes else 1.0


def weight_of(name: str, live: tuple[str, ...], spec: TensorSpec, uses: list[Use], scheme: Scheme, family: Family) -> Weight:
    """How the checkpoint's ``spec`` is carried."""
    floating = dtype(spec.dtype).is_float
    plain = Weight(name, live, spec.shape, scheme.target.compute if floating else spec.dtype)
    kinds = {use.kind for use in uses}
    if not floating or len(spec.shape) != 2:
        return plain
    if kinds == {Kind.TRANSPOSE} or (kinds == {Kind.MULTIPLY} and scheme.dense and all(use.transpose for use in uses)):
        return replace(plain, turned=True)
    turned = kinds == {Kind.MULTIPLY_TURNED}
    if not (turned or kinds <= {Kind.MULTIPLY, Kind.LOOKUP}) or not kinds:
        return plain
    form = _form(replace(plain, turned=turned), kinds, spec.dtype, scheme, family)
    if form is None or (isinstance(form, Dense) and form.stored == form.compute):
        return plain
    return replace(plain, form=form, turned=turned)


def _form(weight: Weight, kinds: set[Kind], stored: str, scheme: Scheme, family: Family) -> WeightFormat | None:
    size, module = weight.rows * weight.columns, weight.name.removesuffix(".weight")
    if Kind.LOOKUP in kinds:
        if size < _SMALL_TABLE:
            return None
        return _table(scheme, stored) if kinds == {Kind.LOOKUP} else scheme.tied(weight.rows, weight.columns)
    role = family.role(module)
    if role == "head":
        gentle = replace(scheme, carried="int8") if scheme.carried == "int4" else scheme  # classes are few, and nothing comes after to even them out
        return gentle.linear("head", weight.rows, weight.columns) if size >= _SMALL_HEAD else None
    if size < _SMALL_MATRIX:
        return None
    attention = ("qkv" if family.projection(module) else "output") if role == "attn" else "up"
    return scheme.linear(attention, weight.rows, weight.columns)


def _table(scheme: Scheme, stored: str) -> WeightFormat:
    """8 bits in int8 graphs too: a table of fp32, as encoders are stored, would be a quarter of the file."""
    return (replace(scheme, carried="int4") if scheme.carried in ("int8", "w8a8") else scheme).table(stored)
