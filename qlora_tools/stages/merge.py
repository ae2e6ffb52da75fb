"""Write a merged model, dense or requantized, and measure how much of the adapter survives.

Merging itself is a view (``adapters/merged.py``): this stage stores that view. Of every tensor that the
adapter changes, the unit also reads the base and reports

* ``delta_ratio``  ||D|| / ||W||, the size of the change;
* ``retention``    <W' - W, D> / <D, D>: the share of the change D that the stored weight W' really holds,
  1 when all of it survives. Rounding onto a grid that W already sits on erases small changes;
* ``noise``        ||W' - W - D|| / ||D||: what storing added, in units of the change.

Retention is measured on the stored tensor after its one rounding, in fp64 sums.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit, Write, copy_units, row_tiles, tile_label
from qlora_tools.finite import refuse_non_finite
from qlora_tools.models.family import Family
from qlora_tools.quant.codec import Codec
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.quantize import QuantizeReport, encode_unit, quantized_names, stored_spec
from qlora_tools.stages.sums import dot, row_slabs


@dataclass(frozen=True)
class MergeReport:
    """Sums over one tensor or tile; add them up with :func:`summarize`. Squared Frobenius norms and inner products."""

    name: str
    base_square: float
    delta_square: float
    kept_product: float
    noise_square: float


@dataclass(frozen=True)
class Retention:
    """How much of a change survived being stored; see the module's docstring."""

    delta_ratio: float
    retention: float
    noise: float


def plan_merge(merged: Source, base: Source, changed: Collection[str], family: Family, codec: Codec | None) -> Plan:
    """Store ``merged`` (source name ``model``) with ``codec`` or dense; ``changed`` names what the adapter touches.

    Sources at run time: ``model`` and ``base``. Units of changed tensors report a :class:`MergeReport`, in a
    requantized merge inside ``QuantizeReport.extra``.
    """
    quantized = set(quantized_names(merged, family, codec))
    outputs: list[TensorSpec] = []
    units: list[Unit] = []
    for name, spec in merged.specs.items():
        comparable = name in changed and name in base.specs and base.specs[name].shape == spec.shape
        if name in quantized:
            assert codec is not None
            outputs.extend(codec.part_specs(stored_spec(spec, family)))
            units.append(encode_unit(codec, spec, family, (Read("base", name),), _sums) if comparable else encode_unit(codec, spec, family))
            continue
        outputs.append(spec)
        units.extend(_measured_copies(spec) if comparable else copy_units("model", spec))
    return Plan(tuple(outputs), tuple(units))


def summarize(reports: list[MergeReport]) -> Retention | None:
    """Totals over tensors; ``None`` when nothing changed."""
    base, delta, kept, noise = (sum(getattr(report, field) for report in reports) for field in ("base_square", "delta_square", "kept_product", "noise_square"))
    if not delta:
        return None
    return Retention((delta / base) ** 0.5 if base else float("inf"), kept / delta, (noise / delta) ** 0.5)


def merge_reports(reports: list[object]) -> list[MergeReport]:
    """The merge reports among what ``run`` gave back, tiles of one tensor added up, in plan order."""
    found: dict[str, list[MergeReport]] = {}
    for report in reports:
        if isinstance(report, QuantizeReport) and report.extra:
            report = MergeReport(report.name, **report.extra)
        if isinstance(report, MergeReport):
            found.setdefault(report.name, []).append(report)
    return [_added(name, tiles) for name, tiles in found.items()]


def _measured_copies(spec: TensorSpec) -> list[Unit]:
    units = []
    for rows in row_tiles(spec):
        write = Write(spec.name) if rows is None else Write(spec.name, rows[0], rows[1] - rows[0])

        def apply(exact: torch.Tensor, base: torch.Tensor, row: int = write.row) -> Outcome:
            stored = exact.to(spec.torch_dtype)
            refuse_non_finite(spec.name, stored, row=row)
            return Outcome({spec.name: stored}, MergeReport(spec.name, **_sums(exact, stored, base)))

        units.append(Unit(f"merge {tile_label(spec.name, rows)}", (Read("model", spec.name, rows), Read("base", spec.name, rows)), (write,), apply))
    return units


def _sums(exact: torch.Tensor, stored: torch.Tensor, base: torch.Tensor) -> Mapping[str, float]:
    """The four sums of a :class:`MergeReport`, over row slabs so that no whole fp32 copy is made."""
    totals = dict.fromkeys(("base_square", "delta_square", "kept_product", "noise_square"), 0.0)
    for rows in row_slabs(exact):
        base_slab = base[rows].float()
        delta = exact[rows].float() - base_slab
        change = stored[rows].float() - base_slab
        for name, left, right in (("base_square", base_slab, base_slab), ("delta_square", delta, delta), ("kept_product", change, delta)):
            totals[name] += dot(left, right)
        change -= delta
        totals["noise_square"] += dot(change, change)
    return totals


def _added(name: str, tiles: list[MergeReport]) -> MergeReport:
    return MergeReport(name, *(sum(getattr(tile, field) for tile in tiles) for field in ("base_square", "delta_square", "kept_product", "noise_square")))
