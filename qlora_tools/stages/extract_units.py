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


@dataclass(frozen=True, eq=False)
class Factored:
    """A targeted tensor. ``factors``: rounded to their stored dtype, on the CPU, at the largest rank that may be kept.

    ``found`` is the decomposition without its fp32 factors; both are ``None`` where the delta is zero. ``lost``: error
    energy of each cut from rank 0 on (adaptive ranks), or ``certificate`` for the one rank asked for.
    """

    name: str
    weight_norm: float = 0.0
    noise: float = 0.0
    base_sha256: str | None = None
    found: Truncated | None = None
    factors: LowRank | None = None
    certificate: Certificate | None = None
    lost: torch.Tensor | None = None

    def at(self, rank: int) -> Certificate:
        """The certificate of the factors cut to ``rank``."""
        if self.certificate is not None and rank == self.certificate.rank:
            return self.certificate
        assert self.found is not None and self.lost is not None
        return certificate_of(self.found, rank, float(self.lost[rank]), weight_norm=self.weight_norm, noise=self.noise)


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
        if _same(base, tuned):
            return Outcome(report=Factored(name))
        delta_OI = _delta(base, tuned).reshape(base.shape[0], -1)
        energy = squared_norm(delta_OI)
        _check_finite(name, energy, base, tuned)
        if energy == 0.0:
            return Outcome(report=Factored(name))
        weight_norm = math.sqrt(squared_norm(base.float()))
        digest = tensor_sha256(base.cpu()) if hash_base else base_sha256
        noise = min(energy, noise_energy(_coarser(base, tuned)))
        found = truncated_svd(delta_OI, rank, seed=seed_of(name))
        stored = found.factors.to(dtype)
        if adaptive:
            certificate, lost = None, error_curve(delta_OI, stored)
        else:
            certificate, lost = certify(delta_OI, found, stored, weight_norm=weight_norm, noise=noise), None
        factors = LowRank(stored.a_RI.cpu(), stored.b_OR.cpu(), found.factors.singular_values)
        slim = Truncated(factors, found.energy, found.gap, found.spectrum.cpu(), found.exact, found.passes)
        return Outcome(report=Factored(name, weight_norm, noise, digest, slim, factors, certificate, lost))

    return apply


def compare(name: str, *, keep_change: bool = False, refuse_change: str | None = None) -> Callable[[torch.Tensor, torch.Tensor], Outcome]:
    """The unit function of a tensor, or tile, that is not factored.

    ``keep_change``: carry the difference in the report. ``refuse_change``: a change is an error, and this says why.
    """

    def apply(base: torch.Tensor, tuned: torch.Tensor) -> Outcome:
        if _same(base, tuned):
            return Outcome(report=Compared(name, False))
        if refuse_change is not None and bool((base != tuned).any()):
            raise UnsupportedError(f"`{name}` changed, and {refuse_change}", hint=f"leave it out of the adapter, knowingly, with --drop '{name}'")
        change = _delta(base, tuned)
        energy = squared_norm(change)
        _check_finite(name, energy, base, tuned)
        return Outcome(report=Compared(name, energy > 0.0, energy, change.cpu() if keep_change else None))

    return apply


def inspect_new(name: str) -> Callable[[torch.Tensor], Outcome]:
    """The unit function of a tensor whose shape changed, so that it cannot be compared; only its values are checked."""

    def apply(tuned: torch.Tensor) -> Outcome:
        energy = squared_norm(tuned.float())
        _check_finite(name, energy, None, tuned)
        return Outcome(report=Compared(name, True, energy))

    return apply


def _same(base: torch.Tensor, tuned: torch.Tensor) -> bool:
    return base.dtype == tuned.dtype and torch.equal(base, tuned)


def _delta(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """tuned - base in fp32, with one fp32 tensor alive: the subtraction widens its right side element by element."""
    if torch.float64 in (base.dtype, tuned.dtype):
        return (tuned.double() - base.double()).float()
    return tuned.to(torch.float32, copy=True).sub_(base)


def _coarser(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """The tensor whose grid is the coarser one: its rounding is what a delta contains. The tuned one where both are alike,
    since training starts from the base exactly as it is stored."""
    return base if torch.finfo(base.dtype).eps > torch.finfo(tuned.dtype).eps else tuned


def _check_finite(name: str, energy: float, base: torch.Tensor | None, tuned: torch.Tensor) -> None:
    """Raise when ``energy``, which saw every value, is not finite."""
    if math.isfinite(energy):
        return
    which = "base" if base is not None and not math.isfinite(squared_norm(base.float())) else "tuned"
    raise NonFiniteError(f"`{name}` of the {which} model holds NaN or infinity", hint="use an earlier checkpoint of that training run")
