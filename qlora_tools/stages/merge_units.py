"""How one changed weight goes into its stored form while merging: with fresh scales, on its base's own grid, or given already.

A :class:`Rounding` says what to read and how to round; :func:`store_unit` makes the unit of the engine from it, measures what survives
(``merge_sums.py``) and, if asked, keeps what was lost as a low-rank branch. Weights are worked on in the [out, in] orientation of
the stored parts.

Sources that units read: ``model`` (merged), ``base``, and as the rounding asks ``parts`` (the base's stored tensors), ``original`` (the
16-bit base whose quantized form is simulated), ``directions`` (what the adapters read, see :class:`Directions`), ``stats`` (moments), ``healed`` (weights that
training through the quantizer arrived at).

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qlora_tools.adapters.adapter import Adapter, Delta
from qlora_tools.engine.plan import Outcome, Read, Unit, Write
from qlora_tools.finite import refuse_non_finite
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import seed_of, truncated_svd
from qlora_tools.lowrank.weighted import Metric, square_root, weighted_svd
from qlora_tools.models.family import Family
from qlora_tools.quant.calibrated import encode_calibrated
from qlora_tools.quant.codec import Codec, Stored
from qlora_tools.quant.keep_grid import STRENGTH, grid_of, keep_grid, nearest, recoded
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.merge_sums import MergeReport, measured

Parts = Mapping[str, torch.Tensor]
#: The tensor of the source ``stats`` that holds moments of the inputs of a weight; ``None`` where there is none.
MomentsOf = Callable[[str], str | None]


@dataclass(frozen=True, eq=False)
class StoredMerge:
    """What storing one weight did. ``branch``: the best low-rank matrix for what storing lost, in [out, in]."""

    report: MergeReport
    branch: LowRank | None = None


class Rounding(Protocol):
    """One way to store a merged weight."""

    def label(self, stored: Stored) -> str:
        """What the unit is called."""

    def reads(self, stored: Stored) -> tuple[Read, ...]:
        """What :meth:`parts` wants beside the merged weight."""

    def parts(self, stored: Stored, target: torch.Tensor, *read: torch.Tensor) -> Parts:
        """``target`` (shape of ``stored.spec``) in stored form."""


@dataclass(frozen=True, eq=False)
class Requantized:
    """Scales anew from the merged weight, as the codec takes them; with moments the best of several ways (``quant/calibrated.py``), judged by others."""

    moments_of: MomentsOf = lambda name: None
    judged_by: MomentsOf = lambda name: None

    def label(self, stored: Stored) -> str:
        return f"{stored.codec.name} {stored.spec.name}"

    def reads(self, stored: Stored) -> tuple[Read, ...]:
        found = [read for read in (self.moments_of(stored.spec.name), self.judged_by(stored.spec.name)) if read]
        return tuple(Read("stats", name) for name in found) if self.moments_of(stored.spec.name) else ()

    def parts(self, stored: Stored, target: torch.Tensor, *read: torch.Tensor) -> Parts:
        return encode_calibrated(stored.codec, stored.spec, target, *read).parts if read else stored.codec.encode(stored.spec, target)


@dataclass(frozen=True, eq=False)
class OnGrid:
    """The base's own scales, codes by error feedback that knows what the adapter reads (``quant/keep_grid.py``).

    ``simulated``: the base's parts are not stored anywhere and come from encoding the source ``original``. ``inputs_first``: which weights that
    source holds turned round. ``moments_of``: input moments that take the place of the identity.
    """

    simulated: bool = False
    inputs_first: Callable[[str], bool] = lambda name: False
    moments_of: MomentsOf = lambda name: None
    strength: float = STRENGTH

    def label(self, stored: Stored) -> str:
        return f"{stored.codec.name} on its grid {stored.spec.name}"

    def reads(self, stored: Stored) -> tuple[Read, ...]:
        moments = self.moments_of(stored.spec.name)
        return (*self.grid_reads(stored), Read("directions", stored.spec.name), *((Read("stats", moments),) if moments else ()))

    def parts(self, stored: Stored, target: torch.Tensor, *read: torch.Tensor) -> Parts:
        count = len(self.grid_reads(stored))
        parts, directions_RI = self.grid_parts(stored, *read[:count]), read[count]
        moments_II = read[count + 1] if len(read) > count + 1 else None
        return keep_grid(target.flatten(1), stored, parts, directions_RI, moments_II, strength=self.strength).parts

    def grid_reads(self, stored: Stored) -> tuple[Read, ...]:
        """What tells the grid."""
        return (Read("original", stored.spec.name),) if self.simulated else tuple(Read("parts", part) for part in stored.parts)

    def grid_parts(self, stored: Stored, *read: torch.Tensor) -> Parts:
        """The base's parts from what :meth:`grid_reads` asked for."""
        if not self.simulated:
            return dict(zip(stored.parts, read, strict=True))
        dense = read[0].T.contiguous() if self.inputs_first(stored.spec.name) else read[0]
        return {name: part.to(dense.device) for name, part in stored.codec.encode(stored.spec, dense).items()}


@dataclass(frozen=True, eq=False)
class AsBase:
    """The base's own parts: of a weight that nothing changes."""

    onto: OnGrid

    def label(self, stored: Stored) -> str:
        return f"{stored.codec.name} as it was {stored.spec.name}"

    def reads(self, stored: Stored) -> tuple[Read, ...]:
        return self.onto.grid_reads(stored)

    def parts(self, stored: Stored, target: torch.Tensor, *read: torch.Tensor) -> Parts:
        return self.onto.grid_parts(stored, *read)


@dataclass(frozen=True, eq=False)
class Given:
    """The weights of the source ``healed`` ([out, in]), rounded to the nearest point: of the grid that ``onto`` keeps, or of a fresh one."""

    onto: OnGrid | None = None

    def label(self, stored: Stored) -> str:
        return f"{stored.codec.name} healed {stored.spec.name}"

    def reads(self, stored: Stored) -> tuple[Read, ...]:
        return (Read("healed", stored.spec.name), *(self.onto.grid_reads(stored) if self.onto else ()))

    def parts(self, stored: Stored, target: torch.Tensor, *read: torch.Tensor) -> Parts:
        healed, *rest = read
        if self.onto is None:
            return stored.codec.encode(stored.spec, healed)
        parts = self.onto.grid_parts(stored, *rest)
        return recoded(stored, parts, nearest(grid_of(stored, parts), healed))


class Directions:
    """A source: per weight, what all adapters together read of its input, fp32 [R, I]. Zeros, of one row, where a change is no low-rank one."""

    def __init__(self, adapters: Sequence[tuple[Adapter, float]], shapes: Mapping[str, tuple[int, int]]) -> None:
        self._adapters = [adapter for adapter, weight in adapters if weight]
        self._shapes = shapes
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, "F32", (max(1, sum(delta.rank for delta in self._deltas(name))), inputs)) for name, (_, inputs) in shapes.items()
        }

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The A factors of all adapters, one above the other."""
        found = [delta.a.read().float().flatten(1) for delta in self._deltas(name)]
        stacked_RI = torch.cat(found) if found else torch.zeros(1, self._shapes[name][1])
        return stacked_RI if rows is None else stacked_RI[rows[0] : rows[1]]

    def _deltas(self, name: str) -> list[Delta]:
        return [adapter.deltas[name] for adapter in self._adapters if name in adapter.deltas]


def store_unit(
    stored: Stored,
    family: Family,
    rounding: Rounding,
    *,
    comparable: bool = True,
    judged_by: MomentsOf = lambda name: None,
    branch_rank: int = 0,
) -> Unit:
    """The merged weight ``stored.spec.name`` (a spec in [out, in]) through ``rounding``; reports a :class:`StoredMerge`.

    ``judged_by``: moments under which losses of output are measured, and the branch is fitted. ``comparable=False``: the base has no
    tensor of this shape, so nothing is measured.
    """
    spec, codec = stored.spec, stored.codec
    turn = family.stores_inputs_first(spec.name, spec.shape[::-1])
    asked = rounding.reads(stored)
    judge = judged_by(spec.name)
    others = (*((Read("base", spec.name),) if comparable else ()), *((Read("stats", judge),) if judge and comparable else ()))

    def apply(dense: torch.Tensor, *read: torch.Tensor) -> Outcome:
        target = dense.T.contiguous() if turn else dense
        refuse_non_finite(spec.name, target)
        parts = rounding.parts(stored, target, *read[: len(asked)])
        if not comparable:
            return Outcome(parts)
        base, *moments = read[len(asked) :]
        moments_II = moments[0] if moments else None
        found = codec.decode(spec, parts).to(target.device)
        report = measured(spec.name, target, found, base.T if turn else base, codec=codec, moments_II=moments_II)
        branch = lost_branch(spec.name, target.float() - found.float(), branch_rank, moments_II) if branch_rank else None
        return Outcome(parts, StoredMerge(report, branch))

    writes = tuple(Write(part) for part in stored.parts)
    return Unit(rounding.label(stored), (Read("model", spec.name), *asked, *others), writes, apply)


def lost_branch(name: str, lost: torch.Tensor, rank: int, moments_II: torch.Tensor | None) -> LowRank:
    """The matrix of rank ``rank`` that brings back most of ``lost`` [O, I...]: of its outputs where moments are given, else of its entries. Its factors are on the
    CPU: they wait for the whole merge."""
    lost_OI = lost.flatten(1)
    rank = min(rank, *lost_OI.shape)
    root = None if moments_II is None else square_root(moments_II)
    if root is None:
        return truncated_svd(lost_OI, rank, seed=seed_of(name)).factors.cpu()
    return weighted_svd(lost_OI, Metric(root, None), rank, seed=seed_of(name)).factors.cpu()


def stored_as(codec: Codec, spec: TensorSpec) -> Stored:
    """The form that ``codec`` gives a weight whose spec is in [out, in]."""
    return Stored(codec, spec, tuple(part.name for part in codec.part_specs(spec)))
