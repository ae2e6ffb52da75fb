"""Low-rank branches beside a graph's stored matrices: y = x W' + (x A) B, with A and B in 16 bits whatever W' is stored in.

One pair of factors serves a stored matrix, packed or not: the ranks of its modules are added up, A's columns stand side by side and B is
block-diagonal over the modules' outputs, so that packed projections stay packed and a branch costs two products and a sum. Every scale is
already in the factors.

A branch is *kept*: its factors are graph inputs of any rank that default to rank 0, the base's own output. Or it is *fixed*: its factors lie in
the external file. A matrix may have both. What is no low-rank change of a matrix that the graph multiplies by is refused by name.
Left out: the file of a kept adapter (``export/onnx_adapter.py``).

Axes: I inputs, O outputs of the matrix, R rank, T tokens (on one axis or on two).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from qlora_tools.adapters.adapter import Adapter
from qlora_tools.adapters.values import checked
from qlora_tools.engine.plan import Outcome, Plan, Unit, Write
from qlora_tools.errors import NonFiniteError, UnsupportedError
from qlora_tools.export.decoder.layout import Layer, Layout
from qlora_tools.export.decoder.matrices import Matrix, Mixture
from qlora_tools.export.nodes import Nodes
from qlora_tools.export.target import Target
from qlora_tools.finite import is_finite
from qlora_tools.models.decoder import Decoder
from qlora_tools.names import shortened, split_tensor
from qlora_tools.specs import TensorSpec, dtype

Weighted = tuple[Adapter, float]


def kept_names(matrix: str) -> tuple[str, str]:
    """Names of the graph inputs A [I, R] and B [R, O]."""
    return f"{matrix}.lora_A", f"{matrix}.lora_B"


def fixed_names(matrix: str) -> tuple[str, str]:
    """Names of the stored A [I, R] and B [O, R]; outputs first, so that a graph with fewer of them reads the beginning."""
    return f"{matrix}.branch_A", f"{matrix}.branch_B"


def factor_dtype(target: Target) -> str:
    """dtype of factors in graphs for ``target``: 16 bits, of the kind the graph computes in where that has 16."""
    return target.compute if target.compute in ("F16", "BF16") else "F16"


@dataclass(frozen=True, eq=False)
class Factors:
    """``a_IR`` [I, R] and ``b_RO`` [R, O] of one stored matrix in :func:`factor_dtype`, scales and all."""

    a_IR: torch.Tensor
    b_RO: torch.Tensor

    @property
    def rank(self) -> int:
        return self.a_IR.shape[1]

    def widened(self) -> Factors:
        """The same in fp32."""
        return Factors(self.a_IR.float(), self.b_RO.float())


@dataclass(frozen=True)
class Place:
    """Where outputs of a module lie: ``rows`` of them, from the module's ``first`` on, are those of ``matrix`` from ``row`` on."""

    matrix: Matrix
    row: int
    rows: int
    first: int = 0

    @property
    def there(self) -> slice:
        """In the matrix."""
        return slice(self.row, self.row + self.rows)

    @property
    def here(self) -> slice:
        """In the module."""
        return slice(self.first, self.first + self.rows)


@dataclass(frozen=True, eq=False)
class Beside:
    """What to put beside a model's weights: adapters by the name they can be chosen by, and adapters that are always on. With their weights."""

    kept: Mapping[str, Weighted] = field(default_factory=dict)
    fixed: Sequence[Weighted] = ()


@dataclass(frozen=True, eq=False)
class Branches:
    """:class:`Beside` as factors by matrix."""

    kept: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    fixed: Mapping[str, Factors] = field(default_factory=dict)

    @property
    def inputs(self) -> frozenset[str]:
        """Matrices with factors as graph inputs: those that any kept adapter changes."""
        return frozenset(matrix for factors in self.kept.values() for matrix in factors)

    def active(self, adapter: str | None) -> list[tuple[str, Factors]]:
        """(matrix, factors) of everything that adds to the graph's products while ``adapter`` is chosen."""
        return [*self.fixed.items(), *(self.kept[adapter].items() if adapter is not None else ())]


def places_of(layout: Layout, decoder: Decoder) -> dict[str, list[Place]]:
    """Module path -> where its outputs lie, for every linear that a branch can stand beside. An embedding is looked up, not multiplied by; routers
    and experts, of which each token sees few, have no place for one."""
    found: dict[str, list[Place]] = {decoder.module("head"): [Place(layout.head, 0, layout.head.total_rows)]}
    for matrix in (matrix for layer in layout.layers for matrix in _multiplied(layer)):
        for piece, row in matrix.placed():
            found.setdefault(piece.module, []).append(Place(matrix, row, piece.rows, piece.first))
    return found


def _multiplied(layer: Layer) -> tuple[Matrix, ...]:
    feed = layer.feed.shared if isinstance(layer.feed, Mixture) else layer.feed
    return layer.qkv, layer.output, *(feed.matrices() if feed is not None else ())


def bind_branches(beside: Beside, layout: Layout, decoder: Decoder, target: Target) -> Branches:
    """The factors of ``beside`` in the form that a graph of ``layout`` takes. Raises what :func:`bind_at` raises."""
    return bind_at(beside, places_of(layout, decoder), target)


def bind_at(beside: Beside, places: Mapping[str, list[Place]], target: Target) -> Branches:
    """The factors of ``beside`` for the matrices of ``places`` (module path -> where its outputs lie).

    Raises:
        UnsupportedError: an adapter holds something else than low-rank changes of linears; all of it is named. NonFiniteError: NaN or
        infinity in a factor, or a product too large for 16 bits.
    """
    for adapter, _ in (*beside.kept.values(), *beside.fixed):
        _refuse_others(adapter, places)
    kept = {name: _factors([pair], places, target) for name, pair in beside.kept.items()}
    return Branches(kept, _factors(beside.fixed, places, target))


def _refuse_others(adapter: Adapter, places: Mapping[str, list[Place]]) -> None:
    """Name everything in ``adapter`` that no branch can carry."""
    others = [f"DoRA on `{name}`" for name, delta in adapter.deltas.items() if delta.magnitude is not None]
    others += [f"LoRA on `{name}`, beside which a graph has no place" for name in adapter.deltas if split_tensor(name)[0] not in places]
    others += [f"a change of `{name}`" for name in adapter.biases] + [f"a whole `{name}`" for name in adapter.replacements]
    others += [f"rows of `{name}`" for name in adapter.token_rows]
    if others:
        raise UnsupportedError(
            f"adapter {adapter.name} is more than low-rank changes of linears, and cannot be kept beside a graph: {shortened(others)}",
            hint="merge it: qlt export --base BASE --adapter DIR --merge",
        )


def _factors(adapters: Sequence[Weighted], places: Mapping[str, list[Place]], target: Target) -> dict[str, Factors]:
    """By matrix, in the order of the layout: every adapter's factors side by side."""
    matrices = {place.matrix.name: place.matrix for several in places.values() for place in several}
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in matrices}
    for module, several in places.items():
        for adapter, weight in adapters:
            delta = adapter.deltas.get(f"{module}.weight")
            if delta is not None:
                a_RI, b_OR = (checked(part.key, part.read()).to(torch.float32) for part in (delta.a, delta.b))
                for name in dict.fromkeys(place.matrix.name for place in several):
                    b_RO = torch.zeros(delta.rank, matrices[name].total_rows)
                    for place in (place for place in several if place.matrix.name == name):
                        b_RO[:, place.there] = b_OR[place.here].T * (delta.scale * weight)
                    pairs[name].append((a_RI, b_RO))
    return {name: _packed(matrices[name], found, target) for name, found in pairs.items() if found}


def _packed(matrix: Matrix, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], target: Target) -> Factors:
    a_RI, b_RO = _balanced(torch.cat([a_RI for a_RI, _ in pairs]), torch.cat([b_RO for _, b_RO in pairs]))
    kind = dtype(factor_dtype(target)).torch
    found = Factors(a_RI.T.contiguous().to(kind), b_RO.to(kind))
    if not (is_finite(found.a_IR) and is_finite(found.b_RO)):
        raise NonFiniteError(f"the adapter's factors for `{matrix.name}` overflow in {factor_dtype(target)}", hint="merge it: qlt export --adapter DIR --merge")
    return found


def _balanced(a_RI: torch.Tensor, b_RO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with equal largest values on both sides, by powers of two: narrow floats then lose nothing at either end of their range."""
    largest_a, largest_b = (factor.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) for factor in (a_RI, b_RO))
    both = (a_RI.any(1) & b_RO.any(1)).to(torch.float32)
    power_R = both * torch.round((largest_b.log2() - largest_a.log2()) / 2)
    return torch.ldexp(a_RI, power_R[:, None]), torch.ldexp(b_RO, -power_R[:, None])


def fixed_specs(branches: Branches, matrices: Iterable[Matrix], target: Target) -> list[TensorSpec]:
    """What the fixed branches of ``matrices`` are stored as."""
    specs, kind = [], factor_dtype(target)
    for matrix in matrices:
        if matrix.name in branches.fixed:
            rank, (a, b) = branches.fixed[matrix.name].rank, fixed_names(matrix.name)
            specs += [TensorSpec(a, kind, (matrix.columns, rank)), TensorSpec(b, kind, (matrix.total_rows, rank))]
    return specs


def with_fixed(plan: Plan, branches: Branches, matrices: Iterable[Matrix], target: Target) -> Plan:
    """``plan`` and the storing of the fixed branches, at the end of the file."""
    units = [_storing(matrix, factors) for matrix, factors in branches.fixed.items()]
    return Plan((*plan.outputs, *fixed_specs(branches, matrices, target)), (*plan.units, *units))


def _storing(matrix: str, factors: Factors) -> Unit:
    a, b = fixed_names(matrix)
    return Unit(f"{matrix}.branch", (), (Write(a), Write(b)), lambda: Outcome({a: factors.a_IR, b: factors.b_RO.T.contiguous()}))


class Branching:
    """Draws the branches of one graph. ``kept``: names of the matrices whose factors are inputs; ``inputs`` and ``drawn``
    (matrices multiplied by) grow as the graph does. What is multiplied by twice has one pair of inputs."""

    def __init__(self, kept: Collection[str] = ()) -> None:
        self._kept = frozenset(kept)
        self._made: dict[str, list[ir.Value]] = {}
        self.drawn: set[str] = set()

    @property
    def inputs(self) -> list[ir.Value]:
        return [value for pair in self._made.values() for value in pair]

    def add(self, nodes: Nodes, matrix: Matrix, x_TI: ir.Value, product_TO: ir.Value) -> ir.Value:
        """``product_TO`` plus the branches of ``matrix``, if it has any."""
        total = product_TO
        self.drawn.add(matrix.name)
        a, b = fixed_names(matrix.name)
        if nodes.holds(a):
            total = _added(nodes, x_TI, nodes.stored(a), nodes.op("Transpose", nodes.stored(b), perm=[1, 0]), total)
        if matrix.name in self._kept:
            if matrix.name not in self._made:
                self._made[matrix.name] = self._optional(matrix, nodes.target)
            a_IR, b_RO = self._made[matrix.name]
            total = _added(nodes, x_TI, a_IR, b_RO, total)
        return total

    @staticmethod
    def _optional(matrix: Matrix, target: Target) -> list[ir.Value]:
        """Inputs with a default: the runtime counts an input that has an initializer of its name as optional."""
        rank, code = f"{matrix.name}.rank", dtype(factor_dtype(target)).onnx
        assert code is not None
        kind = ir.DataType(code)
        found = []
        shapes: list[tuple[int | str, ...]] = [(matrix.columns, rank), (rank, matrix.total_rows)]
        for name, shape in zip(kept_names(matrix.name), shapes, strict=True):
            default = np.zeros([size if isinstance(size, int) else 0 for size in shape], kind.numpy())
            found.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=ir.tensor(default, dtype=kind, name=name)))
        return found


def _added(nodes: Nodes, x_TI: ir.Value, a_IR: ir.Value, b_RO: ir.Value, product_TO: ir.Value) -> ir.Value:
    """Where the graph computes in 32 bits the factors are widened: at every run for inputs, once when the graph is loaded for stored ones."""
    if factor_dtype(nodes.target) != nodes.target.compute:
        a_IR, b_RO = (nodes.op("Cast", factor, to=nodes.target.float_type) for factor in (a_IR, b_RO))
    return nodes.op("Add", product_TO, nodes.op("MatMul", nodes.op("MatMul", x_TI, a_IR), b_RO))


def truncated_branches(branches: Branches, matrices: Iterable[Matrix]) -> Branches:
    """The branches of ``matrices`` alone, with as many outputs as those have."""
    rows = {matrix.name: matrix.total_rows for matrix in matrices}

    def cut(found: Mapping[str, Factors]) -> dict[str, Factors]:
        return {name: Factors(factors.a_IR, factors.b_RO[:, : rows[name]].contiguous()) for name, factors in found.items() if name in rows}

    return Branches({name: cut(factors) for name, factors in branches.kept.items()}, cut(branches.fixed))


def attach(model: nn.Module, branches: Branches, places: Mapping[str, list[Place]], adapter: str | None) -> None:
    """Let transformers' ``model`` compute the branches too: what is fixed, and ``adapter``, are added to its modules' outputs in fp32."""
    active = branches.active(adapter)
    for module, several in places.items():
        for place in several:
            for factors in (factors for matrix, factors in active if matrix == place.matrix.name):
                model.get_submodule(module).register_forward_hook(partial(_add_branch, place, factors))


def _add_branch(place: Place, factors: Factors, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    changed = output.clone()
    changed[..., place.here] += inputs[0] @ factors.a_IR.float() @ factors.b_RO[:, place.there].float()
    return changed
