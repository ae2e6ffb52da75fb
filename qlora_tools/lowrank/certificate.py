"""How good a low-rank adapter is, in numbers that are measured or bounded, never assumed.

For a delta D and the factors that will be stored: the norm of D, the error that remains after the factors were
rounded to their stored dtype (measured on the rounded factors), the best error that any matrix of that rank could
have, and the part of D that no low rank can reach because it is rounding noise of the checkpoint itself.

The noise floor: a weight w stored with p significand bits carries a rounding error that is uniform on +-ulp(w)/2, so
its energy is ulp(w)^2 / 12, with ulp read off the exponent of each stored value. The error is white across the
matrix, so its singular values lie below the Marchenko-Pastur edge ``sigma (sqrt(O) + sqrt(I))``; what a delta holds
below that edge cannot be told from rounding.

Axes: O rows, I columns, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import Truncated, squared_norm

#: Explicit bits of the significand; the ulp of a value with exponent e is 2^(e - bits).
_SIGNIFICAND_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7, torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}
_TILE_ELEMENTS = 1 << 19
#: Below this relative error the measured error is summed in float64: in fp32 the product's own rounding would show.
_FINE_ERROR = 1e-4


@dataclass(frozen=True)
class Certificate:
    """Numbers about one tensor. Norms are Frobenius norms, ``error``, ``optimum`` and ``gap`` are relative to ``delta_norm``.

    ``error``: of the factors as stored. ``optimum``: no matrix of this rank has a smaller error; exact when
    ``optimum_is_exact``, otherwise a residual-bound estimate (see ``svd.py``) that is at most ``gap`` below what was
    reached before rounding. ``kept_energy``: 1 - error^2. ``noise_norm``: of the checkpoint's rounding noise in D.
    """

    rank: int
    delta_norm: float
    weight_norm: float
    error: float
    optimum: float
    gap: float
    optimum_is_exact: bool
    noise_norm: float

    @property
    def kept_energy(self) -> float:
        return max(0.0, 1.0 - self.error**2)

    @property
    def signal_energy(self) -> float:
        """||D||^2 above the noise floor."""
        return max(0.0, self.delta_norm**2 - self.noise_norm**2)

    @property
    def kept_signal(self) -> float:
        """Kept energy as a share of the energy above the noise floor, at most 1; 1 when there is none."""
        return min(1.0, self.kept_energy * self.delta_norm**2 / self.signal_energy) if self.signal_energy > 0 else 1.0


@dataclass(frozen=True)
class Total:
    """Certificates of many tensors, seen as one long vector: energies add up. Errors relative to the total ``delta_norm``."""

    tensors: int
    delta_norm: float
    weight_norm: float
    error: float
    optimum: float
    noise_norm: float
    kept_energy: float
    kept_signal: float


def total_of(certificates: list[Certificate]) -> Total:
    """The total over all tensors of an adapter."""
    energy = math.fsum(c.delta_norm**2 for c in certificates)
    weights = math.fsum(c.weight_norm**2 for c in certificates)
    noise = math.fsum(c.noise_norm**2 for c in certificates)
    lost = math.fsum((c.error * c.delta_norm) ** 2 for c in certificates)
    least = math.fsum((c.optimum * c.delta_norm) ** 2 for c in certificates)
    signal = math.fsum(c.signal_energy for c in certificates)
    if energy <= 0.0:
        return Total(len(certificates), 0.0, math.sqrt(weights), 0.0, 0.0, math.sqrt(noise), 1.0, 1.0)
    kept = max(0.0, 1.0 - lost / energy)
    kept_signal = min(1.0, kept * energy / signal) if signal > 0 else 1.0
    return Total(
        len(certificates), math.sqrt(energy), math.sqrt(weights), math.sqrt(lost / energy), math.sqrt(least / energy), math.sqrt(noise), kept, kept_signal
    )


def noise_energy(stored: torch.Tensor) -> float:
    """Sum of ulp(w)^2 / 12 over a stored tensor: the expected energy of its rounding error. 0 for integers and zeros."""
    bits = _SIGNIFICAND_BITS.get(stored.dtype)
    if bits is None:
        return 0.0
    if stored.dtype == torch.bfloat16:  # same exponent field as fp32, masked in place of a slow frexp
        powers = (stored.contiguous().view(torch.int16) & 0x7F80).view(torch.bfloat16).float()
    elif stored.dtype in (torch.float32, torch.float64):
        powers = (stored.float().contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    else:
        powers = (stored.float().view(torch.int32) & 0x7F800000).view(torch.float32)
    return squared_norm(powers) * 4.0**-bits / 12.0


def noise_edge(energy: float, shape: tuple[int, int]) -> float:
    """The largest singular value that white noise of this total energy has in a matrix of this shape (Marchenko-Pastur edge)."""
    rows, columns = shape
    sigma = math.sqrt(energy / max(1, rows * columns))
    return sigma * (math.sqrt(rows) + math.sqrt(columns))


def residual_energy(delta_OI: torch.Tensor, factors: LowRank, *, wide: bool = False) -> float:
    """||D - b a||_F^2 with the factors as they are stored, row tile by row tile, in fp32 (``wide``: float64)."""
    dtype = torch.float64 if wide else torch.float32
    a_RI, b_OR = factors.a_RI.to(dtype), factors.b_OR.to(dtype)
    return math.fsum(squared_norm(torch.addmm(delta_OI[rows].to(dtype), b_OR[rows], a_RI, alpha=-1)) for rows in _tiles(*delta_OI.shape))


def certify(delta_OI: torch.Tensor, found: Truncated, stored: LowRank, *, weight_norm: float = 0.0, noise: float = 0.0) -> Certificate:
    """The certificate of ``stored`` (``found.factors``, cut and rounded) for the delta that ``found`` was computed from.

    ``noise``: energy of the rounding noise in D.
    """
    energy, rank = found.energy, stored.rank
    if energy == 0.0:
        return Certificate(rank, 0.0, weight_norm, 0.0, 0.0, 0.0, True, math.sqrt(noise))
    lost = residual_energy(delta_OI, stored)
    if lost < _FINE_ERROR * energy:
        lost = residual_energy(delta_OI, stored, wide=True)
    reached = max(0.0, energy - float(found.spectrum[:rank].double().square().sum()))
    if reached < _FINE_ERROR * energy:  # the difference above has lost its digits
        reached = residual_energy(delta_OI, found.factors.cut(rank), wide=True)
    return certificate_of(found, rank, lost, reached=reached, weight_norm=weight_norm, noise=noise)


def certificate_of(found: Truncated, rank: int, lost: float, *, reached: float | None = None, weight_norm: float = 0.0, noise: float = 0.0) -> Certificate:
    """The certificate for the energy ``lost`` that was measured at ``rank`` (at most ``found``'s own).

    ``reached``: energy lost before rounding, where the spectrum is too steep to tell. The gap of all kept pairs also
    bounds that of the leading ones, since every pair's own share of it is positive.
    """
    energy = found.energy
    if reached is None:
        reached = max(0.0, energy - float(found.spectrum[:rank].double().square().sum()))
    reached = min(reached, lost)
    optimum = math.sqrt(max(0.0, reached - found.gap) / energy)
    return Certificate(
        rank, math.sqrt(energy), weight_norm, math.sqrt(lost / energy), optimum, math.sqrt(reached / energy) - optimum, found.exact, math.sqrt(noise)
    )


def error_curve(delta_OI: torch.Tensor, stored: LowRank) -> torch.Tensor:
    """||D - b[:, :r] a[:r]||_F^2 for every r from 0 to the rank (R + 1 values, float64, CPU), with the factors as stored.

    From ``||D||^2 - 2 sum b_i^T D a_i + sum (b_i b_j)(a_i a_j)``, in float64 row tiles: one pass for all ranks.
    """
    a_RI, b_OR = stored.a_RI.double(), stored.b_OR.double()
    cross_R = torch.zeros(stored.rank, dtype=torch.float64, device=a_RI.device)
    energy = 0.0
    for rows in _tiles(*delta_OI.shape):
        tile = delta_OI[rows].double()
        cross_R += ((b_OR[rows].T @ tile) * a_RI).sum(dim=1)
        energy += float(tile.square().sum())
    gram_RR = (b_OR.T @ b_OR) * (a_RI @ a_RI.T)
    # the leading r x r block grows by row r, column r and the corner
    grown_R = 2 * gram_RR.tril(-1).sum(dim=1) + gram_RR.diagonal()
    steps = (grown_R - 2 * cross_R).cumsum(0).cpu()
    return torch.cat([torch.zeros(1, dtype=torch.float64), steps]).add(energy).clamp(min=0.0)


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))
