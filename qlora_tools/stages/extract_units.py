"""What extraction does to one tensor: compare it, or form its delta and factor it. Pure functions and their reports.

The delta is formed elementwise in fp32 before anything is multiplied: products of base and tuned weights would lose a
change of a thousandth of the weight to cancellation.

Axes: O rows and I columns of the delta as a matrix, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qlora_tools.checkpoint.reader import tensor_sha256
from qlora_tools.engine.plan import Outcome
from qlora_tools.errors import NonFiniteError, UnsupportedError
from qlora_tools.lowrank.certificate import Certificate, certificate_of, certify, error_curve, noise_energy
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import Truncated, seed_of, squared_norm, truncated_svd

#: A tile of 128 Ki elements is 512 KiB in fp32: it fits a core's cache with its temporaries.
_TILE_ELEMENTS = 1 << 17


@dataclass(frozen=True, eq=False)
class Factored:
    """A targeted tensor. ``factors``: rounded to their stored dtype, on the CPU, at the largest rank that may be kept.

    ``found`` is the decomposition without its fp32 factors; both are ``None`` where the delta is zero. ``lost``: error
    energy of each cut from rank 0 on (adaptive ranks), or ``certificate`` for the one rank asked for. ``weighted``: the same
    three under the metric of calibration statistics, ``None`` without. ``kept_change``: share of the delta that the product
    has along it, where more than the delta was approximated.
    """

    name: str
    weight_norm: float = 0.0
    noise: float = 0.0
    base_sha256: str | None = None
    found: Truncated | None = None
    factors: LowRank | None = None
    certificate: Certificate | None = None
    lost: torch.Tensor | None = None
    weighted: Weighed | None = None
    kept_change: float | None = None

    def at(self, rank: int) -> Certificate:
        """The certificate of the factors cut to ``rank``."""
        if self.certificate is not None and rank == self.certificate.rank:
            return self.certificate
        assert self.found is not None and self.lost is not None
        return certificate_of(self.found, rank, float(self.lost[rank]), weight_norm=self.weight_norm, noise=self.noise)

    def weighted_at(self, rank: int) -> Certificate | None:
        """The certificate of the weighted error of the factors cut to ``rank``; ``None`` where nothing was weighed."""
        return None if self.weighted is None else self.weighted.at(rank)


@dataclass(frozen=True, eq=False)
class Weighed:
    """The weighted side of a :class:`Factored`: the best decomposition under the metric, without its factors, and what the stored ones lose."""

    found: Truncated
    certificate: Certificate | None = None
    lost: torch.Tensor | None = None

    def at(self, rank: int) -> Certificate:
        """The certificate of the factors cut to ``rank``; norms are weighted ones."""
        if self.certificate is not None and rank == self.certificate.rank:
            return self.certificate
        assert self.lost is not None
        return certificate_of(self.found, rank, float(self.lost[rank]))


@dataclass(frozen=True, eq=False)
class Compared:
    """A tensor, or tile of one, that is not factored. ``change``: tuned - base in fp32, kept for biases only."""

    name: str
    changed: bool
    delta_energy: float = 0.0
    change: torch.Tensor | None = None


def factor(
    name: str, rank: int, dtype: torch.dtype, *, adaptive: bool, base_sha256: str | None, hash_base: bool
) -> Callable[[torch.Tensor, torch.Tensor], Outcome]:
    """The unit function of a targeted tensor. ``rank``: the one to keep, or with ``adaptive`` the largest that may be.

    ``hash_base``: take the sha256 of the base tensor as read; else ``base_sha256`` is what is known of it.
    """

    def apply(base: torch.Tensor, tuned: torch.Tensor) -> Outcome:
        if is_same(base, tuned):
            return Outcome(report=Factored(name))
        delta_OI, energy, weight_energy, noise = scan_delta(base.reshape(base.shape[0], -1), tuned.reshape(base.shape[0], -1))
        check_finite(name, energy, base, tuned)
        if energy == 0.0:
            return Outcome(report=Factored(name))
        weight_norm = math.sqrt(weight_energy)
        digest = tensor_sha256(base.cpu()) if hash_base else base_sha256
        found = truncated_svd(delta_OI, rank, seed=seed_of(name))
        stored = found.factors.to(dtype)
        if adaptive:
            certificate, lost = None, error_curve(delta_OI, stored)
        else:
            certificate, lost = certify(delta_OI, found, stored, weight_norm=weight_norm, noise=noise), None
        factors = LowRank(stored.a_RI.cpu(), stored.b_OR.cpu(), found.factors.singular_values)
        return Outcome(report=Factored(name, weight_norm, noise, digest, slimmed(found, factors), factors, certificate, lost))

    return apply


def slimmed(found: Truncated, factors: LowRank) -> Truncated:
    """``found`` with the stored factors in place of its own."""
    return Truncated(factors, found.energy, found.gap, found.spectrum.cpu(), found.exact, found.passes)


def compare(name: str, *, keep_change: bool = False, refuse_change: str | None = None) -> Callable[[torch.Tensor, torch.Tensor], Outcome]:
    """The unit function of a tensor, or tile, that is not factored.

    ``keep_change``: carry the difference in the report. ``refuse_change``: a change is an error, and this says why.
    """

    def apply(base: torch.Tensor, tuned: torch.Tensor) -> Outcome:
        if is_same(base, tuned):
            return Outcome(report=Compared(name, False))
        if refuse_change is not None and bool((base != tuned).any()):
            raise UnsupportedError(f"`{name}` changed, and {refuse_change}", hint=f"leave it out of the adapter, knowingly, with --drop '{name}'")
        change = _delta(base, tuned)
        energy = squared_norm(change)
        check_finite(name, energy, base, tuned)
        return Outcome(report=Compared(name, energy > 0.0, energy, change.cpu() if keep_change else None))

    return apply


def inspect_new(name: str) -> Callable[[torch.Tensor], Outcome]:
    """The unit function of a tensor whose shape changed, so that it cannot be compared; only its values are checked."""

    def apply(tuned: torch.Tensor) -> Outcome:
        energy = squared_norm(tuned.float())
        check_finite(name, energy, None, tuned)
        return Outcome(report=Compared(name, True, energy))

    return apply


def is_same(base: torch.Tensor, tuned: torch.Tensor) -> bool:
    """Equal in dtype and values."""
    return base.dtype == tuned.dtype and torch.equal(base, tuned)


def _delta(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """tuned - base in fp32, formed in the wider of their dtypes."""
    wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    return (tuned.to(wide) - base.to(wide)).float()


def scan_delta(base_OI: torch.Tensor, tuned_OI: torch.Tensor) -> tuple[torch.Tensor, float, float, float]:
    """The delta in fp32, ||delta||^2, ||base||^2 and the noise energy, in one pass over row tiles that stay in the cache.

    The noise is that of the coarser of the two grids: of the tuned one where they are alike, since training starts from
    the base exactly as it is stored.
    """
    coarse_OI = base_OI if torch.finfo(base_OI.dtype).eps > torch.finfo(tuned_OI.dtype).eps else tuned_OI
    delta_OI = torch.empty(base_OI.shape, dtype=torch.float32, device=base_OI.device)
    sums = [0.0, 0.0, 0.0]
    step = max(1, _TILE_ELEMENTS // base_OI.shape[1])
    for first in range(0, base_OI.shape[0], step):
        rows = slice(first, first + step)
        delta_OI[rows] = _delta(base_OI[rows], tuned_OI[rows])
        for position, energy in enumerate((squared_norm(delta_OI[rows]), squared_norm(base_OI[rows].float()), noise_energy(coarse_OI[rows]))):
            sums[position] += energy
    return delta_OI, sums[0], sums[1], min(sums[0], sums[2])


def check_finite(name: str, energy: float, base: torch.Tensor | None, tuned: torch.Tensor) -> None:
    """Raise when ``energy``, which saw every value, is not finite."""
    if math.isfinite(energy):
        return
    which = "base" if base is not None and not math.isfinite(squared_norm(base.float())) else "tuned"
    raise NonFiniteError(f"`{name}` of the {which} model holds NaN or infinity", hint="use an earlier checkpoint of that training run")
