"""How much of an adapter survives being stored, measured on the stored tensor after its one rounding.

With W the base, D the change, W' what was stored and h half the distance between neighbouring points of the grid:

* ``delta_ratio``  ||D|| / ||W||, the size of the change; none where W is zero throughout, as the bias of a fresh head is;
* ``retention``    <W' - W, D> / <D, D>: the share of the change that the stored weight holds, 1 when all of it survives;
* ``noise``        ||W' - W - D|| / ||D||: what storing added, in units of the change;
* ``dead_zone``    ||D|| / ||h||: below about 1 rounding to the nearest point of a grid that W sits on erases most of D;
* ``output_retention`` and ``output_noise``: the same two where products are weighed with the second moments R of the layer's inputs
  (<X, Y> = tr(X R Y')), so that they speak of outputs. Only where moments are at hand.

Sums are fp64; products fp32, those with moments fp64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from qlora_tools.quant.codec import Codec
from qlora_tools.quant.keep_grid import half_steps_square
from qlora_tools.stages.sums import dot, row_slabs


@dataclass(frozen=True)
class MergeReport:
    """Sums over one tensor or tile; add them up with :func:`summarize`. Squared norms and inner products; zero where not measured."""

    name: str
    base_square: float
    delta_square: float
    kept_product: float
    noise_square: float
    step_square: float = 0.0
    output_square: float = 0.0
    output_product: float = 0.0
    output_noise: float = 0.0


@dataclass(frozen=True)
class Retention:
    """How much of a change survived being stored; see the module's docstring."""

    delta_ratio: float | None
    retention: float
    noise: float
    dead_zone: float | None = None
    output_retention: float | None = None
    output_noise: float | None = None


def measured(
    name: str,
    exact: torch.Tensor,
    stored: torch.Tensor,
    base: torch.Tensor,
    *,
    codec: Codec | None = None,
    moments_II: torch.Tensor | None = None,
) -> MergeReport:
    """The sums of one tensor or tile. ``codec``: how it was stored. ``moments_II``: of its inputs; the tensors are then [O, I...]."""
    totals = dict.fromkeys(("base_square", "delta_square", "kept_product", "noise_square"), 0.0)
    for rows in row_slabs(exact):  # so that no whole fp32 copy is made
        base_slab = base[rows].float()
        delta = exact[rows].float() - base_slab
        change = stored[rows].float() - base_slab
        for key, left, right in (("base_square", base_slab, base_slab), ("delta_square", delta, delta), ("kept_product", change, delta)):
            totals[key] += dot(left, right)
        change -= delta
        totals["noise_square"] += dot(change, change)
    if codec is not None:
        totals["step_square"] = half_steps_square(codec, base)
    if moments_II is not None:
        totals |= _weighed(exact, stored, base, moments_II)
    return MergeReport(name, **totals)


def _weighed(exact: torch.Tensor, stored: torch.Tensor, base: torch.Tensor, moments_II: torch.Tensor) -> dict[str, float]:
    totals = dict.fromkeys(("output_square", "output_product", "output_noise"), 0.0)
    wide_II = moments_II.double()
    for rows in row_slabs(exact):
        base_TI = base[rows].double().flatten(1)
        delta_TI = exact[rows].double().flatten(1) - base_TI
        change_TI = stored[rows].double().flatten(1) - base_TI
        seen_TI = delta_TI @ wide_II
        totals["output_square"] += float((seen_TI * delta_TI).sum())
        totals["output_product"] += float((seen_TI * change_TI).sum())
        change_TI -= delta_TI
        totals["output_noise"] += float(((change_TI @ wide_II) * change_TI).sum())
    return totals


def summarize(reports: Iterable[MergeReport]) -> Retention | None:
    """Totals over tensors; ``None`` when nothing changed. Outputs are summed over the tensors that were weighed."""
    total = _added("", list(reports))
    if not total.delta_square:
        return None
    weighed = total.output_square > 0
    return Retention(
        delta_ratio=(total.delta_square / total.base_square) ** 0.5 if total.base_square else None,
        retention=total.kept_product / total.delta_square,
        noise=(total.noise_square / total.delta_square) ** 0.5,
        dead_zone=(total.delta_square / total.step_square) ** 0.5 if total.step_square else None,
        output_retention=total.output_product / total.output_square if weighed else None,
        output_noise=(total.output_noise / total.output_square) ** 0.5 if weighed else None,
    )


def added_by_name(reports: Iterable[MergeReport]) -> list[MergeReport]:
    """Tiles of one tensor added up, in the order of their first appearance."""
    found: dict[str, list[MergeReport]] = {}
    for report in reports:
        found.setdefault(report.name, []).append(report)
    return [_added(name, tiles) for name, tiles in found.items()]


def _added(name: str, tiles: list[MergeReport]) -> MergeReport:
    return MergeReport(name, *(sum(getattr(tile, field.name) for tile in tiles) for field in fields(MergeReport)[1:]))
