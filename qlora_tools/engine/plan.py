"""Plans: what a stage is going to do, complete and checked before a byte of weights is read.

A :class:`Unit` reads some tensors (or row ranges of them), applies a pure function and gives tensors to
write. A :class:`Plan` lists the units and the specs of every output. Tensors that a stage leaves alone are
copy units, so an output that nobody writes is an error of the plan, not a surprise in the file.

A large tensor is split into row tiles (:func:`row_tiles`): several units, each writing its rows of the same
output. So memory follows the tile, not the vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from qlora_tools.errors import IncompatibleError, MissingError
from qlora_tools.finite import refuse_non_finite
from qlora_tools.names import nearest, shortened
from qlora_tools.specs import TensorSpec

#: A tensor whose dense form is larger than this is worked on in row tiles of about this size.
TILE_BYTES = 64 << 20


class Source(Protocol):
    """A model seen as dense named tensors, however they are stored.

    ``specs`` gives the dtype the model computes in. ``read`` may return a wider float than ``specs`` says (a
    merged tensor comes as fp32); whoever stores it rounds once, at the end. Reading is thread-safe.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The tensor, or its rows ``[start, stop)`` along axis 0."""


@dataclass(frozen=True)
class Read:
    """One input of a unit: a tensor of a named source, or the rows ``[start, stop)`` of it."""

    source: str
    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Write:
    """One output of a unit: rows ``[row, row + rows)`` of a planned tensor; ``rows=None`` is all of it."""

    name: str
    row: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What ``Unit.apply`` gives back: tensors by output name, and anything it measured on the way."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    report: Any = None


@dataclass(frozen=True)
class Unit:
    """One step of a plan. ``apply`` gets the tensors in the order of ``reads``, must not modify them, and is pure."""

    label: str
    reads: tuple[Read, ...]
    writes: tuple[Write, ...]
    apply: Callable[..., Outcome]


@dataclass(frozen=True)
class Plan:
    """Units and the outputs they fill."""

    outputs: tuple[TensorSpec, ...]
    units: tuple[Unit, ...]

    def check(self, sources: Mapping[str, Source]) -> None:
        """Every read exists and is in range; the writes cover every output exactly once.

        Raises:
            MissingError: a source lacks a tensor the plan reads.
            IncompatibleError: outputs not covered, covered twice, or not planned.
        """
        for unit in self.units:
            for read in unit.reads:
                _check_read(unit, read, sources)
        _check_coverage(self)

    @property
    def output_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


def read_bytes(read: Read, sources: Mapping[str, Source]) -> int:
    """Bytes of the dense tensor (or rows) that ``read`` asks for."""
    spec = sources[read.source].specs[read.name]
    return spec.nbytes if read.rows is None else (read.rows[1] - read.rows[0]) * spec.row_bytes


def row_tiles(spec: TensorSpec, tile_bytes: int = TILE_BYTES, multiple: int = 1) -> Iterator[tuple[int, int] | None]:
    """Row ranges ``[start, stop)`` that cut ``spec`` into tiles of at most ``tile_bytes`` (at least one row multiple).

    Yields a single ``None`` when the tensor fits whole. ``multiple``: every tile but the last has a multiple
    of this many rows.
    """
    if spec.nbytes <= tile_bytes or not spec.shape:
        yield None
        return
    step = max(1, tile_bytes // spec.row_bytes // multiple) * multiple
    for start in range(0, spec.shape[0], step):
        yield start, min(start + step, spec.shape[0])


def tile_label(name: str, rows: tuple[int, int] | None) -> str:
    """``name`` or ``name[0:4096]``."""
    return name if rows is None else f"{name}[{rows[0]}:{rows[1]}]"


def copy_units(source: str, spec: TensorSpec, target: TensorSpec | None = None) -> Iterator[Unit]:
    """Units that copy ``spec`` into ``target`` (default: the same), casting to the target's dtype once. NaN and infinity are refused."""
    target = target or spec

    def casting(first_row: int) -> Callable[[torch.Tensor], Outcome]:
        def cast(tensor: torch.Tensor) -> Outcome:
            stored = tensor.to(target.torch_dtype)
            refuse_non_finite(spec.name, stored, row=first_row)
            return Outcome({target.name: stored})

        return cast

    for rows in row_tiles(spec):
        write = Write(target.name) if rows is None else Write(target.name, rows[0], rows[1] - rows[0])
        yield Unit(f"copy {tile_label(spec.name, rows)}", (Read(source, spec.name, rows),), (write,), casting(write.row))


def _check_read(unit: Unit, read: Read, sources: Mapping[str, Source]) -> None:
    specs = sources[read.source].specs
    if read.name not in specs:
        close = nearest(read.name, specs)
        hint = f"the nearest names are {', '.join(close)}" if close else f"it holds {shortened(specs)}"
        raise MissingError(f"{unit.label}: `{read.source}` holds no tensor `{read.name}`", hint=hint)
    if read.rows is not None:
        length = specs[read.name].shape[0]
        assert 0 <= read.rows[0] < read.rows[1] <= length, f"{unit.label}: rows {read.rows} of {length}"


def _check_coverage(plan: Plan) -> None:
    planned = {spec.name: spec for spec in plan.outputs}
    assert len(planned) == len(plan.outputs), "two outputs of one name"
    pieces: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for unit in plan.units:
        for write in unit.writes:
            assert write.name in planned, f"{unit.label} writes `{write.name}`, which is not an output"
            length = planned[write.name].shape[0] if planned[write.name].shape else 1
            pieces[write.name].append((write.row, write.row + (length - write.row if write.rows is None else write.rows)))
    for spec in plan.outputs:
        end = 0
        for start, stop in sorted(pieces[spec.name]):
            if start != end:
                raise IncompatibleError(f"plan: rows {min(start, end)}:{max(start, end)} of `{spec.name}` are written {'twice' if start < end else 'never'}")
            end = stop
        length = spec.shape[0] if spec.shape else 1
        if end != length:
            raise IncompatibleError(f"plan: `{spec.name}` has {length} rows but {end} are written")
