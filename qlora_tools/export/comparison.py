"""Does the data file of a finished export hold what a checkpoint encodes to? Its plan is run once more, and read instead of written.

Encoding is deterministic, so codes and packed bytes must be equal; floats may differ by the last bits, which another processor's products of merged factors
move. Where calibration chose the codes and its statistics are not at hand, the plain encoding says how far the weights in the file may be from the
checkpoint's.

Left out: whether the graph does the right thing with the weights (the parity checks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qlora_tools.engine.plan import Outcome, Plan, Unit
from qlora_tools.export.external import place, read_elements
from qlora_tools.specs import TensorSpec

#: Share of a tensor's elements that may differ: codes on the border between two values, decided by a float's last bit.
TOLERATED = 1e-3
#: Calibration trades the error of weights for that of outputs; it does not move them further than this many times what plain rounding does.
CALIBRATED_DISTANCE = 3.0
_LAST_BITS = 4.0

Decode = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Compared:
    """One unit's tensors: ``label`` is the checkpoint's tensor (or rows of it). ``by_distance``: codes that calibration chose, held to a distance."""

    label: str
    elements: int
    differing: int
    by_distance: bool = False

    @property
    def equal(self) -> bool:
        return self.differing <= TOLERATED * self.elements


def comparing(plan: Plan, path: Path, decoders: Mapping[str, Decode] | None = None) -> Plan:
    """``plan`` as one that writes nothing and reports a :class:`Compared` per unit. ``path`` is a file of the size that the plan's outputs have.

    ``decoders``: for outputs whose codes were chosen by calibration that this plan does not know, what decodes a unit's parts to its weight.
    """
    specs, offsets = {spec.name: spec for spec in plan.outputs}, place(plan.outputs)[0]
    return Plan((), tuple(_comparing(unit, path, specs, offsets, decoders or {}) for unit in plan.units))


def _comparing(unit: Unit, path: Path, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], decoders: Mapping[str, Decode]) -> Unit:
    rows = {write.name: write.row for write in unit.writes}
    decode = next((decoders[name] for name in rows if name in decoders), None)

    def compare(*tensors: torch.Tensor) -> Outcome:
        planned = unit.apply(*tensors).tensors
        stored = {
            name: read_elements(path, specs[name], offsets[name] + rows[name] * specs[name].row_bytes, tensor.nbytes).view(tensor.shape)
            for name, tensor in planned.items()
        }
        if decode is not None:
            plain = decode(planned)
            return Outcome(report=_held(unit.label, _dense(tensors, plain), plain, decode(stored)))
        differing = sum(_differing(tensor, stored[name]) for name, tensor in planned.items())
        return Outcome(report=Compared(unit.label, sum(tensor.numel() for tensor in planned.values()), differing))

    return replace(unit, writes=(), apply=compare)


def _differing(planned: torch.Tensor, stored: torch.Tensor) -> int:
    """Elements that are not the same: by value for floats, up to their last bits, else bit for bit."""
    if not planned.is_floating_point():
        return int((planned != stored).sum())
    wanted, found = planned.double(), stored.double()
    close = torch.finfo(planned.dtype).eps * _LAST_BITS * torch.maximum(wanted.abs(), 1e-3 * wanted.abs().amax())
    return int((~((wanted - found).abs() <= close)).sum())


def _dense(read: Sequence[torch.Tensor], plain: torch.Tensor) -> torch.Tensor:
    """The weight that ``plain`` is the plain encoding of: one tensor as it was read, or turned round, or the first of them one below the other."""
    for weight in (read[0], *([read[0].T] if read[0].ndim == 2 else [])):
        if weight.flatten(1).shape == plain.shape:
            return weight.flatten(1)
    count = next(count for count in range(1, len(read) + 1) if sum(len(tensor) for tensor in read[:count]) >= len(plain))
    return torch.cat(list(read[:count]))


def _held(label: str, weight: torch.Tensor, plain: torch.Tensor, stored: torch.Tensor) -> Compared:
    """All elements differ, or none: a distance is one number."""
    wide = weight.double()
    allowed = CALIBRATED_DISTANCE * torch.linalg.vector_norm(wide - plain.double())
    near = bool(torch.linalg.vector_norm(wide - stored.double()) <= allowed)
    return Compared(label, weight.numel(), 0 if near else weight.numel(), by_distance=True)
