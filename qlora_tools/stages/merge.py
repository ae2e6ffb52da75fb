"""Write a merged model, dense or quantized, and measure how much of the adapter survives.

Merging itself is a view (``adapters/merged.py``): this stage stores that view. How a weight is rounded is in ``merge_units.py``, what is
measured of every tensor that the adapter changes in ``merge_sums.py``.

A quantized weight that the adapter leaves alone keeps its stored bytes where the base is in the wanted form already.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit, Write, copy_units, row_tiles, tile_label
from qlora_tools.finite import refuse_non_finite
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.models.family import Family
from qlora_tools.quant.codec import Codec, Stored
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.merge_sums import MergeReport, added_by_name, measured
from qlora_tools.stages.merge_units import AsBase, Given, MomentsOf, OnGrid, Requantized, Rounding, StoredMerge, store_unit, stored_as
from qlora_tools.stages.quantize import quantized_names, stored_spec


@dataclass(frozen=True, eq=False)
class Storing:
    """How a merged model is stored. ``codec=None``: dense.

    ``held``: weights that the base stores in the wanted form: those, and only those, are quantized, and unchanged ones keep their bytes.
    ``held_specs``: of the tensors they are stored in, whoever made them.
    ``rounding``: of the weights that change, but for those in ``healed``, which come rounded already but for the last step. ``judged_by`` and ``branch_rank``: see :func:`~qlora_tools.stages.merge_units.store_unit`.
    """

    codec: Codec | None = None
    held: Mapping[str, Stored] = field(default_factory=dict)
    held_specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    rounding: Rounding = field(default_factory=Requantized)
    healed: frozenset[str] = frozenset()
    judged_by: MomentsOf = lambda name: None
    branch_rank: int = 0

    def forms(self, merged: Source, family: Family) -> dict[str, Stored]:
        """Weight -> its stored form, of all weights that are quantized."""
        if self.held:
            return {name: item for name, item in self.held.items() if _oriented(item.spec, family).shape == merged.specs[name].shape}
        names = quantized_names(merged, family, self.codec)
        return {name: stored_as(self.codec, stored_spec(merged.specs[name], family)) for name in names if self.codec is not None}

    def rounding_of(self, name: str) -> Rounding:
        """How a weight that changes is rounded."""
        if name in self.healed:
            return Given(self.rounding if isinstance(self.rounding, OnGrid) else None)
        return self.rounding

    def part_specs(self, form: Stored) -> tuple[TensorSpec, ...]:
        """The tensors that a weight is stored in."""
        return tuple(self.held_specs[part] for part in form.parts) if self.held else form.codec.part_specs(form.spec)


def plan_merge(merged: Source, base: Source, changed: Collection[str], family: Family, storing: Storing) -> Plan:
    """Store ``merged`` (source name ``model``); ``changed`` names what the adapter touches.

    Sources at run time: ``model``, ``base``, and what ``storing`` adds. Units of changed tensors report a :class:`MergeReport` or
    a :class:`StoredMerge`.
    """
    forms = storing.forms(merged, family)
    outputs: list[TensorSpec] = []
    units: list[Unit] = []
    for name, spec in merged.specs.items():
        comparable = name in base.specs and base.specs[name].shape == spec.shape
        form = forms.get(name)
        if form is None:
            outputs.append(spec)
            units.extend(_measured_copies(spec) if name in changed and comparable else copy_units("model", spec))
            continue
        outputs.extend(storing.part_specs(form))
        if name in changed:
            unit = store_unit(form, family, storing.rounding_of(name), comparable=comparable, judged_by=storing.judged_by, branch_rank=storing.branch_rank)
            units.append(unit)
        else:
            untouched = AsBase(storing.rounding) if isinstance(storing.rounding, OnGrid) else storing.rounding
            units.append(_parts_copy(form) if storing.held else store_unit(form, family, untouched, comparable=False))
    return Plan(tuple(outputs), tuple(units))


def merge_reports(reports: Iterable[Any]) -> list[MergeReport]:
    """The merge reports among what ``run`` gave back, tiles of one tensor added up, in plan order."""
    found = (report.report if isinstance(report, StoredMerge) else report for report in reports)
    return added_by_name(report for report in found if isinstance(report, MergeReport))


def branches(reports: Iterable[Any]) -> dict[str, LowRank]:
    """Weight -> the low-rank branch for what storing it lost."""
    return {report.report.name: report.branch for report in reports if isinstance(report, StoredMerge) and report.branch is not None}


def _oriented(spec: TensorSpec, family: Family) -> TensorSpec:
    """A spec in [out, in] as the dense model has it."""
    turned = family.stores_inputs_first(spec.name, spec.shape)
    return TensorSpec(spec.name, spec.dtype, spec.shape[::-1]) if turned else spec


def _parts_copy(form: Stored) -> Unit:
    """The stored tensors of one weight as they are."""

    def apply(*tensors: torch.Tensor) -> Outcome:
        return Outcome(dict(zip(form.parts, tensors, strict=True)))

    return Unit(f"keep {form.spec.name}", tuple(Read("parts", part) for part in form.parts), tuple(Write(part) for part in form.parts), apply)


def _measured_copies(spec: TensorSpec) -> list[Unit]:
    units = []
    for rows in row_tiles(spec):
        write = Write(spec.name) if rows is None else Write(spec.name, rows[0], rows[1] - rows[0])

        def apply(exact: torch.Tensor, base: torch.Tensor, row: int = write.row) -> Outcome:
            stored = exact.to(spec.torch_dtype)
            refuse_non_finite(spec.name, stored, row=row)
            return Outcome({spec.name: stored}, measured(spec.name, exact, stored, base))

        units.append(Unit(f"merge {tile_label(spec.name, rows)}", (Read("model", spec.name, rows), Read("base", spec.name, rows)), (write,), apply))
    return units
