"""Rounding a changed weight onto the grid that its base already sits on, so that a small change survives.

Dequantized weights lie exactly on the points of their grid, so a change smaller than half a step is rounded away by whoever rounds to the
nearest point; a realistic adapter is smaller by an order of magnitude. Error feedback (:mod:`qlora_tools.quant.gptq`) keeps what a layer
*outputs* instead, and is told which inputs matter: the second moments R of the layer's inputs, in units of their mean, and on top of them the
subspace that the adapter reads, P the orthogonal projector on it:

    R' = R / mean(diag R) + ridge 1 + mu P

Without moments R' = 1 + mu P, which serves nearly as well. The ridge keeps inputs that the calibration text lacks from being sacrificed to those it has.
Enlarging by R A' (A R A')^-1 A R instead, the projector as the moments measure it, loses more of the adapter where the text is of another kind.
Scales are untouched, bit for bit: only some codes move.

:func:`unrounded` gives weights that round to the chosen codes and lie between the points of the grid as any other weights do: training through
the quantizer starts there, because on the grid itself a small step changes nothing.

Left out: GPTQ itself, which strength is best (the stage measures), and changed scales (the codecs' own encode).

Axes: O outputs, I inputs, R directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qlora_tools.errors import UnsupportedError
from qlora_tools.quant.codec import Codec, Stored
from qlora_tools.quant.gptq import Feedback, Grid, StepGrid, TableGrid, feedback, sweep
from qlora_tools.quant.grids import INT8_LIMIT, int8_grid, nf4_grid, signed
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.kernels import NF4_LEVELS
from qlora_tools.quant.nf4 import NF4, STATE_SUFFIX, restore_absmax
from qlora_tools.quant.quant_state import read_state
from qlora_tools.specs import TensorSpec

#: mu: between 300 and 10,000 the share of an adapter that survives hardly changes.
STRENGTH = 1000.0
RIDGE = 0.1
#: Damping of the factorization, in units of the mean of R'. Small: the enlarged directions must stay larger than what is added to all.
DAMP = 1e-4


@dataclass(frozen=True, eq=False)
class Kept:
    """A weight on its base's grid: ``parts`` as stored, ``values_OI`` what the grid says they mean (fp32), and what chose them."""

    parts: Mapping[str, torch.Tensor]
    values_OI: torch.Tensor
    used: Feedback


def enlarged(moments_II: torch.Tensor | None, directions_RI: torch.Tensor, strength: float) -> torch.Tensor:
    """R' of the module's docstring, fp64 [I, I]. ``moments_II=None``, or of inputs that are never active: the identity in place of R and ridge.

    Directions that are parallel count once, directions of zeros not at all.
    """
    found_II = torch.eye(directions_RI.shape[1], dtype=torch.float64, device=directions_RI.device)
    mean = 0.0 if moments_II is None else float(moments_II.diagonal().double().mean())
    if moments_II is not None and mean > 0:
        found_II = moments_II.double() / mean + RIDGE * found_II
    wide_RI = directions_RI.double()
    values_R, vectors_RR = torch.linalg.eigh(wide_RI @ wide_RI.T)
    alive = values_R > len(values_R) * torch.finfo(torch.float32).eps * values_R[-1].clamp(min=0)
    basis_IR = wide_RI.T @ (vectors_RR[:, alive] / values_R[alive].sqrt())
    return found_II.addmm_(basis_IR, basis_IR.T, alpha=strength)


def keep_grid(
    target_OI: torch.Tensor,
    stored: Stored,
    parts: Mapping[str, torch.Tensor],
    directions_RI: torch.Tensor,
    moments_II: torch.Tensor | None = None,
    *,
    strength: float = STRENGTH,
    damp: float = DAMP,
    threads: int = 1,
) -> Kept:
    """``target_OI`` (float, [out, in], convolutions flattened) with the scales of ``parts``: new codes, everything else as it was.

    ``directions_RI``: the inputs that the change of the weight reads, in any basis. ``moments_II``: E[x x'] of the layer's inputs.
    """
    grid = grid_of(stored, parts)
    used = feedback(enlarged(moments_II, directions_RI.to(target_OI.device), strength), damp=damp)
    codes_OI = sweep(target_OI, used, grid, threads=threads)
    return Kept(recoded(stored, parts, codes_OI), grid.values(codes_OI), used)


def unrounded(target_OI: torch.Tensor, kept: Kept) -> torch.Tensor:
    """What error feedback wanted of every element before it was rounded, fp32: rounding it to the nearest point of the grid gives ``kept`` again."""
    lost_OJ = (target_OI.float() - kept.values_OI)[:, kept.used.order_J]
    wanted_OI = torch.empty_like(lost_OJ)
    wanted_OI[:, kept.used.order_J] = lost_OJ @ kept.used.u_JJ
    return wanted_OI + target_OI.float()


def grid_of(stored: Stored, parts: Mapping[str, torch.Tensor]) -> Grid:
    """The points that the scales in ``parts`` allow, as a grid of [out, in].

    Raises:
        UnsupportedError: a codec without such a grid.
    """
    spec = stored.spec
    shape = (spec.shape[0], spec.numel // spec.shape[0])
    if isinstance(stored.codec, NF4):
        state = read_state(spec.name, parts[f"{spec.name}{STATE_SUFFIX}"])
        absmax_B = parts[f"{spec.name}.absmax"].view(-1).float()
        if state.offset is not None:
            nested = parts[f"{spec.name}.nested_absmax"].view(-1)
            absmax_B = restore_absmax(parts[f"{spec.name}.absmax"].view(-1), nested, parts[f"{spec.name}.nested_quant_map"], state, 0, state.blocks)
        return nf4_grid(absmax_B, state.blocksize, shape)
    if isinstance(stored.codec, Int8):
        return int8_grid(parts[_scale_name(spec)], shape)
    raise UnsupportedError(f"{spec.name} is stored in {stored.codec.name}, whose grid cannot be kept", hint="requantize it instead")


def nearest(grid: Grid, w_OI: torch.Tensor) -> torch.Tensor:
    """Codes uint8 of the points nearest to ``w_OI``, element by element."""
    if isinstance(grid, TableGrid):
        units_OI = torch.where(grid.scale_OI == 0, 0.0, w_OI.float() / grid.scale_OI)
        return torch.bucketize(units_OI, (grid.levels_K[1:] + grid.levels_K[:-1]) / 2, out_int32=True).to(torch.uint8)
    assert isinstance(grid, StepGrid), type(grid)
    units_OI = torch.where(grid.scale_OI == 0, 0.0, w_OI.float() / grid.scale_OI)
    return torch.round(units_OI + grid.zero_OI).clamp(grid.lowest, grid.highest).to(torch.uint8)


def recoded(stored: Stored, parts: Mapping[str, torch.Tensor], codes_OI: torch.Tensor) -> dict[str, torch.Tensor]:
    """``parts`` with other codes (uint8 of :func:`grid_of`'s grid)."""
    name = stored.spec.name
    if isinstance(stored.codec, Int8):
        return {**parts, name: signed(codes_OI).view(parts[name].shape)}
    flat_N, packed = codes_OI.reshape(-1), parts[name].contiguous().view(torch.uint8).view(-1)
    if len(flat_N) % 2:  # the padding keeps its code
        flat_N = torch.cat([flat_N, packed[-1:] & 15])
    return {**parts, name: ((flat_N[::2] << 4) | flat_N[1::2]).view(torch.uint8).view(parts[name].dtype).view(parts[name].shape)}


def half_steps_square(codec: Codec, dense: torch.Tensor) -> float:
    """Sum over all elements of the square of half the mean distance between neighbouring points of the grid that ``codec`` lays under ``dense`` [O, I...].

    From the largest magnitude of each block or row, as stock encoding takes it; 0 for a codec that is not known here.
    """
    if isinstance(codec, NF4):
        values_N = dense.reshape(-1)
        if missing := -len(values_N) % codec.block_size:
            values_N = torch.nn.functional.pad(values_N, (0, missing))
        blocks, span = values_N.view(-1, codec.block_size), 2 / (len(NF4_LEVELS) - 1)
    elif isinstance(codec, Int8):
        blocks, span = dense.flatten(1), 1 / INT8_LIMIT
    else:
        return 0.0
    lowest, highest = blocks.aminmax(dim=1)  # no copy of the weight, as of its magnitudes there would be
    return float((torch.maximum(highest, -lowest).double() * span / 2).square().sum()) * blocks.shape[1]


def can_keep(codec: Codec | None) -> bool:
    """Whether weights in this form can be rounded onto their own grid."""
    return isinstance(codec, NF4 | Int8)


def _scale_name(spec: TensorSpec) -> str:
    return f"{spec.name.removesuffix('weight')}SCB"
