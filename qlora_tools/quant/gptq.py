"""Rounding with error feedback: codes of a grid chosen so that a layer's *output* stays, not its weights.

Method: GPTQ (Frantar et al. 2022) in the form of LDLQ (Chee et al. 2023, theorem 6, which proves the two equal). With the inputs' second
moments R = E[x x'] written as R = (U + 1) D (U + 1)', U strictly upper triangular, column j is rounded as

    q_j = nearest(w_j + sum over i < j of (w_i - q_i) U_ij)

so every column takes up what the roundings before it did to the output. One Cholesky factorization of R in fp64, in reversed order,
gives U; nothing is inverted. Columns go in descending order of R_jj ("activation order"): scales are given per element and fixed beforehand, so
the order leaves no trace in what is stored.

The sum over earlier blocks of columns is a matrix product, the one inside a block a numba kernel that works on many rows at once; its
plain torch twin runs on accelerators and is what tests compare with. :func:`descend` improves codes further: coordinate descent on the same output
error, every column in turn given all others, which never raises it. Rows are independent given U and go in tiles, so that memory holds
two fp64 copies of R while it is factored and afterwards U in fp32 and a tile.

Left out: choosing scales (the formats do) and which result to keep (:mod:`qlora_tools.quant.calibrated`).

Axes: O outputs, I inputs in the weight's order, J the same in the order of the sweep, K levels, T rows of a tile, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from qlora_tools.errors import NonFiniteError
from qlora_tools.quant.floats import in_threads
from qlora_tools.quant.kernels_gptq import LANES, descend_columns, sweep_columns

_TILE_ROWS = 512


@dataclass(frozen=True, eq=False)
class TableGrid:
    """``value = scale * levels[code]``. ``levels_K`` fp32, ascending, at most 256; ``scale_OI`` fp32 per element (an expanded view will do), may be
    negative or 0."""

    levels_K: torch.Tensor
    scale_OI: torch.Tensor

    def values(self, codes_OI: torch.Tensor) -> torch.Tensor:
        """What ``codes_OI`` (uint8) mean, fp32."""
        return self.levels_K.to(codes_OI.device)[codes_OI.long()] * self.scale_OI

    def tile(self, rows: slice, order_J: torch.Tensor) -> _Tile:
        scale_JT = _turned(self.scale_OI, rows, order_J)
        levels_K = self.levels_K.float().to(scale_JT.device)
        return _Tile(scale_JT, scale_JT, levels_K, (levels_K[1:] + levels_K[:-1]) / 2, 0, len(levels_K) - 1)


@dataclass(frozen=True, eq=False)
class StepGrid:
    """``value = scale * (code - zero)``, codes ``lowest..highest`` within 0..255; ``scale_OI`` and ``zero_OI`` fp32 per element (expanded views will do).
    A scale of 0 stores zeros; it may be negative."""

    lowest: int
    highest: int
    scale_OI: torch.Tensor
    zero_OI: torch.Tensor

    def __post_init__(self) -> None:
        assert 0 <= self.lowest < self.highest <= 255, f"codes {self.lowest}..{self.highest}"

    def values(self, codes_OI: torch.Tensor) -> torch.Tensor:
        """What ``codes_OI`` (uint8) mean, fp32."""
        return (codes_OI.float() - self.zero_OI) * self.scale_OI

    def tile(self, rows: slice, order_J: torch.Tensor) -> _Tile:
        scale_JT = _turned(self.scale_OI, rows, order_J)
        nothing = scale_JT.new_empty(0)
        return _Tile(scale_JT, _turned(self.zero_OI, rows, order_J), nothing, nothing, self.lowest, self.highest)


class Grid(Protocol):
    """What :func:`sweep` asks of a grid."""

    def values(self, codes_OI: torch.Tensor) -> torch.Tensor: ...

    def tile(self, rows: slice, order_J: torch.Tensor) -> _Tile: ...


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some rows of a grid, turned: columns of the sweep first. No levels: steps of ``scale`` around ``zero``; with levels ``zero_JT`` is unused."""

    scale_JT: torch.Tensor
    zero_JT: torch.Tensor
    levels_K: torch.Tensor
    bounds: torch.Tensor  # midpoints between levels, one fewer
    lowest: int
    highest: int

    def values(self, codes_JT: torch.Tensor) -> torch.Tensor:
        """What ``codes_JT`` mean, fp32."""
        return (self.levels_K[codes_JT.long()] if len(self.levels_K) else codes_JT.float() - self.zero_JT) * self.scale_JT

    def nearest(self, wanted_T: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, their values) nearest to ``wanted_T`` in a column."""
        scale_T = self.scale_JT[column]
        units_T = torch.where(scale_T == 0, 0, wanted_T / scale_T)
        if len(self.levels_K):
            codes_T = torch.bucketize(units_T, self.bounds)
            return codes_T, self.levels_K[codes_T] * scale_T
        codes_T = torch.round(units_T + self.zero_JT[column]).clamp(self.lowest, self.highest)
        return codes_T, (codes_T - self.zero_JT[column]) * scale_T


@dataclass(frozen=True, eq=False)
class Feedback:
    """Factored moments: ``order_J`` i64, the columns in the order of the sweep; ``u_JJ`` fp32, what the rounding error of column i (row) adds to the
    wanted value of column j (column), i < j."""

    order_J: torch.Tensor
    u_JJ: torch.Tensor


def sweep(
    w_OI: torch.Tensor,
    moments_II: torch.Tensor | Feedback,
    grid: Grid,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    block: int = 128,
    threads: int = 1,
) -> torch.Tensor:
    """Codes uint8 [O, I] of ``grid`` for ``w_OI`` (any float dtype), by error feedback under ``moments_II`` (fp32 or fp64, positive semi-definite).

    Moments that serve several sweeps are factored once, with :func:`feedback`, and given in that form; ``damp`` and ``act_order`` then do nothing.
    ``damp`` times the mean of the moments' diagonal is added to it. Inputs that are never active (R_jj = 0) are rounded to nearest and feed nothing.
    ``block`` columns go through the kernel between two matrix products; ``threads`` share its rows.

    Raises:
        NonFiniteError: NaN or infinity in the moments.
    """
    factored = moments_II if isinstance(moments_II, Feedback) else feedback(moments_II.to(w_OI.device), damp=damp, act_order=act_order)
    order_J, u_JJ = factored.order_J, factored.u_JJ
    assert len(order_J) == w_OI.shape[1], f"moments of {len(order_J)} inputs, a weight {list(w_OI.shape)}"
    codes_OI = torch.empty(w_OI.shape, dtype=torch.uint8, device=w_OI.device)
    for start in range(0, len(w_OI), _TILE_ROWS):
        rows = slice(start, min(start + _TILE_ROWS, len(w_OI)))
        codes_JT = _sweep_tile(_turned(w_OI, rows, order_J), u_JJ, grid.tile(rows, order_J), block, threads)
        codes_OI[rows, order_J] = codes_JT.T
    return codes_OI


def feedback(moments_II: torch.Tensor, *, damp: float = 0.01, act_order: bool = True) -> Feedback:
    """The order of the columns and the factor U of the damped moments; see :func:`sweep`.

    Raises:
        NonFiniteError: NaN or infinity in the moments.
    """
    diagonal_I = moments_II.diagonal().double()
    if not bool(torch.isfinite(moments_II.sum(dtype=torch.float64))):
        raise NonFiniteError("the moments of a layer's inputs hold NaN or infinity", hint="calibrate again, on other text or in a wider dtype")
    count = len(diagonal_I)
    order_J = torch.argsort(diagonal_I, descending=True, stable=True) if act_order else torch.arange(count, device=moments_II.device)
    dead_J = diagonal_I[order_J] <= 0
    mean = diagonal_I.clamp(min=0).sum() / max(int((~dead_J).sum()), 1)
    backwards_J, dead = order_J.flip(0), dead_J.flip(0)
    reversed_JJ = moments_II.index_select(0, backwards_J).index_select(1, backwards_J).double()
    if bool(dead.any()):
        reversed_JJ[dead] = 0
        reversed_JJ[:, dead] = 0
    reversed_JJ.diagonal().add_(torch.where(dead, 1.0, damp * mean))
    lower_JJ = _factor(reversed_JJ)
    u_JJ = torch.empty((count, count), dtype=torch.float32, device=moments_II.device)
    scale_J = 1 / lower_JJ.diagonal()
    for start in range(0, count, _TILE_ROWS):  # turned round in tiles: one fp64 copy less
        rows = slice(start, min(start + _TILE_ROWS, count))
        u_JJ[count - rows.stop : count - rows.start] = (lower_JJ[rows] * scale_J).float().flip(0, 1)
    u_JJ.fill_diagonal_(0)
    return Feedback(order_J, u_JJ)


def _factor(moments_JJ: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor, fp64; of moments that are not positive definite, after their small eigenvalues are raised to what fp32 can tell from 0."""
    lower_JJ: torch.Tensor
    lower_JJ, failed = torch.linalg.cholesky_ex(moments_JJ)
    if not int(failed):
        return lower_JJ
    values_J, vectors_JJ = torch.linalg.eigh(moments_JJ)
    floor = len(values_J) * torch.finfo(torch.float32).eps * float(values_J[-1].clamp(min=1e-30))
    raised_JJ = (vectors_JJ * values_J.clamp(min=floor)) @ vectors_JJ.T
    lower_JJ = torch.linalg.cholesky((raised_JJ + raised_JJ.T) / 2)
    return lower_JJ


def descend(
    w_OI: torch.Tensor,
    codes_OI: torch.Tensor,
    moments_II: torch.Tensor,
    grid: Grid,
    *,
    sweeps: int = 2,
    damp: float = 0.01,
    block: int = 128,
    threads: int = 1,
) -> torch.Tensor:
    """Better codes than ``codes_OI``, uint8 [O, I]: ``sweeps`` rounds of coordinate descent on tr(D R D') with R damped as in :func:`sweep`.

    A column's best value given all others is its value plus (D R)_j / R_jj; it moves to the level nearest to that. No move raises the damped error.
    """
    order_J = torch.argsort(moments_II.diagonal().double(), descending=True, stable=True).to(w_OI.device)
    r_JJ = moments_II.to(w_OI.device).float()[order_J][:, order_J]
    mean = float(r_JJ.diagonal().double().mean())
    r_JJ.diagonal().add_(damp * mean if mean > 0 else 1.0)
    better_OI = torch.empty_like(codes_OI)
    for start in range(0, len(w_OI), _TILE_ROWS):
        rows = slice(start, min(start + _TILE_ROWS, len(w_OI)))
        w_JT, tile = _turned(w_OI, rows, order_J), grid.tile(rows, order_J)
        inside = descend_block_plain if w_JT.is_cuda else _descend_block
        codes_JT = codes_OI[rows].T[order_J].contiguous()
        errors_JT = w_JT - tile.values(codes_JT)
        for _ in range(sweeps):
            for columns in _blocks(len(w_JT), block):
                inside(w_JT, r_JJ[columns] @ errors_JT, r_JJ[columns, columns].contiguous(), tile, columns, codes_JT, errors_JT, threads)
        better_OI[rows, order_J] = codes_JT.T
    return better_OI


def output_error(difference_OI: torch.Tensor, moments_II: torch.Tensor) -> float:
    """tr(D R D'): the summed squared error of the outputs per token, where D = ``difference_OI`` [O, I] is what a weight lost. Products in fp32, sum in fp64."""
    moments_II = moments_II.float()
    total = 0.0
    for start in range(0, len(difference_OI), _TILE_ROWS):
        tile_TI = difference_OI[start : start + _TILE_ROWS].float()
        total += float(((tile_TI @ moments_II) * tile_TI).sum(dtype=torch.float64))
    return total


def _turned(matrix_OI: torch.Tensor, rows: slice, order_J: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix as contiguous fp32 [J, T], inputs in the order of the sweep."""
    return matrix_OI[rows].float().T[order_J].contiguous()


def _blocks(columns: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, columns)) for start in range(0, columns, block))


def _sweep_tile(w_JT: torch.Tensor, u_JJ: torch.Tensor, tile: _Tile, block: int, threads: int) -> torch.Tensor:
    """Codes uint8 [J, T] of some rows."""
    inside = sweep_block_plain if w_JT.is_cuda else _sweep_block
    codes_JT = torch.empty(w_JT.shape, dtype=torch.uint8, device=w_JT.device)
    errors_JT = torch.empty_like(w_JT)
    for columns in _blocks(len(w_JT), block):
        wanted_CT = w_JT[columns].addmm(u_JJ[: columns.start, columns].T, errors_JT[: columns.start])
        inside(w_JT, wanted_CT, u_JJ[columns, columns].contiguous(), tile, columns, codes_JT, errors_JT, threads)
    return codes_JT


def sweep_block_plain(
    w_JT: torch.Tensor,
    wanted_CT: torch.Tensor,
    u_CC: torch.Tensor,
    tile: _Tile,
    columns: slice,
    codes_JT: torch.Tensor,
    errors_JT: torch.Tensor,
    threads: int = 1,
) -> None:
    """One block of columns in plain torch: fills ``codes_JT`` and ``errors_JT`` there, uses up ``wanted_CT``."""
    for position, column in enumerate(range(columns.start, columns.stop)):
        codes_T, values_T = tile.nearest(wanted_CT[position], column)
        codes_JT[column] = codes_T.to(torch.uint8)
        errors_JT[column] = w_JT[column] - values_T
        wanted_CT[position + 1 :] += u_CC[position, position + 1 :, None] * errors_JT[column]


def descend_block_plain(
    w_JT: torch.Tensor,
    gradient_CT: torch.Tensor,
    r_CC: torch.Tensor,
    tile: _Tile,
    columns: slice,
    codes_JT: torch.Tensor,
    errors_JT: torch.Tensor,
    threads: int = 1,
) -> None:
    """One block of columns of :func:`descend` in plain torch; uses up ``gradient_CT``."""
    for position, column in enumerate(range(columns.start, columns.stop)):
        wanted_T = w_JT[column] - errors_JT[column] + gradient_CT[position] / r_CC[position, position]
        codes_T, values_T = tile.nearest(wanted_T, column)
        codes_JT[column] = codes_T.to(torch.uint8)
        step_T = w_JT[column] - values_T - errors_JT[column]
        errors_JT[column] += step_T
        gradient_CT[position + 1 :] += r_CC[position, position + 1 :, None] * step_T


def _by_kernel(kernel: Callable[..., None]) -> Callable[..., None]:
    """A kernel over a block of columns in the place of its plain twin."""

    def run(
        w_JT: torch.Tensor,
        wanted_CT: torch.Tensor,
        weights_CC: torch.Tensor,
        tile: _Tile,
        columns: slice,
        codes_JT: torch.Tensor,
        errors_JT: torch.Tensor,
        threads: int,
    ) -> None:
        arrays = [tensor[columns].numpy() for tensor in (w_JT, tile.scale_JT, tile.zero_JT, codes_JT, errors_JT)]
        arrays += [wanted_CT.numpy(), weights_CC.numpy(), tile.levels_K.numpy(), tile.bounds.numpy()]
        ends = np.float32(tile.lowest), np.float32(tile.highest)
        in_threads(lambda low, high: kernel(*arrays, *ends, low, high), w_JT.shape[1], LANES, threads)

    return run


_sweep_block, _descend_block = _by_kernel(sweep_columns), _by_kernel(descend_columns)
