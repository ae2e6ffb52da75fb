"""What can be known and done about low-rank matrices from their factors alone: norms, angles, spectra, cuts with their error.

Everything is float64 inside and costs O((O + I) R^2): ``QR(b) = Q_b R_b`` and ``QR(a^T) = Q_a R_a`` move a product of
any size into the R x R core ``R_b R_a^T``, which has its singular values. Sums and the record itself are in ``factors.py``;
adapters, files and names are not known here.

Axes: O rows of the matrix (outputs), I its columns (inputs), R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qlora_tools.lowrank.factors import LowRank, balanced

#: Singular values below this share of the largest count as zero: fp32 factors do not carry more.
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Decomposed:
    """The SVD of a product of factors: ``u_OR`` diag(``s_R``) ``v_IR``^T, float64, s descending."""

    u_OR: torch.Tensor
    s_R: torch.Tensor
    v_IR: torch.Tensor

    @property
    def energy(self) -> float:
        """||b a||_F^2."""
        return float(self.s_R.square().sum())

    @property
    def numerical_rank(self) -> int:
        """How many singular values are not lost in the rounding of fp32 factors."""
        return int((self.s_R > RANK_TOLERANCE * self.s_R[0]).sum()) if self.s_R.numel() and self.s_R[0] > 0 else 0

    def cut(self, rank: int) -> LowRank:
        """The best approximation of at most ``rank``: balanced, sorted, fp32."""
        kept = min(rank, self.s_R.numel())
        found = balanced(self.u_OR[:, :kept], self.s_R[:kept, None] * self.v_IR[:, :kept].T)
        return LowRank(found.a_RI.float(), found.b_OR.float(), found.singular_values)


def decompose(term: LowRank) -> Decomposed:
    """The SVD of ``b a`` without the dense matrix. min(R, O, I) values."""
    q_b, r_b = torch.linalg.qr(term.b_OR.double())
    q_a, r_a = torch.linalg.qr(term.a_RI.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    keep = min(s.numel(), *term.shape)
    return Decomposed(q_b @ u[:, :keep], s[:keep], q_a @ vh[:keep].T)


def inner(first: LowRank, second: LowRank) -> float:
    """``sum_ij x_ij y_ij`` of two products of one shape: ``tr((b2^T b1)(a1 a2^T))``."""
    assert first.shape == second.shape, (first.shape, second.shape)
    left_RR = second.b_OR.double().T @ first.b_OR.double()
    right_RR = first.a_RI.double() @ second.a_RI.double().T
    return float((left_RR * right_RR.T).sum())


def norm(term: LowRank) -> float:
    """||b a||_F, from the core: accurate where factors cancel."""
    r_b = torch.linalg.qr(term.b_OR.double(), mode="r").R
    r_a = torch.linalg.qr(term.a_RI.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(r_b @ r_a.T))


def distance(first: LowRank, second: LowRank) -> float:
    """||x - y||_F of two products, from the factors of the difference."""
    assert first.shape == second.shape, (first.shape, second.shape)
    a_RI = torch.cat([first.a_RI.double(), second.a_RI.double()])
    b_OR = torch.cat([first.b_OR.double(), -second.b_OR.double()], dim=1)
    return norm(LowRank(a_RI, b_OR))


@dataclass(frozen=True)
class Agreement:
    """How two low-rank changes of one matrix relate. ``cosine`` of the angle between them as vectors; ``ratio``: ||second|| / ||first||.

    ``output_overlap`` and ``input_overlap``: mean squared cosine of the principal angles between the spans of their outputs
    (inputs), 1 when the smaller span lies in the larger, near rank / width by chance. ``smallest_angle``: the smallest
    principal angle between the output spans, in degrees. All of these are ``nan`` when either is zero. ``norms`` and ``product``:
    the Frobenius norms and the inner product.
    """

    cosine: float
    ratio: float
    output_overlap: float
    input_overlap: float
    smallest_angle: float
    norms: tuple[float, float]
    product: float


def agreement(first: LowRank, second: LowRank) -> Agreement:
    """Compare two low-rank matrices of one shape."""
    x, y = decompose(first), decompose(second)
    norms, product = (math.sqrt(x.energy), math.sqrt(y.energy)), inner(first, second)
    if not x.numerical_rank or not y.numerical_rank:
        return Agreement(math.nan, math.nan, math.nan, math.nan, math.nan, norms, product)
    outputs = _principal_cosines(x.u_OR[:, : x.numerical_rank], y.u_OR[:, : y.numerical_rank])
    inputs = _principal_cosines(x.v_IR[:, : x.numerical_rank], y.v_IR[:, : y.numerical_rank])
    return Agreement(
        max(-1.0, min(1.0, product / (norms[0] * norms[1]))),
        norms[1] / norms[0],
        float(outputs.square().mean()),
        float(inputs.square().mean()),
        math.degrees(math.acos(float(outputs[0]))),
        norms,
        product,
    )


def _principal_cosines(first_OR: torch.Tensor, second_OR: torch.Tensor) -> torch.Tensor:
    """Cosines of the principal angles between two orthonormal bases, descending."""
    cosines: torch.Tensor = torch.linalg.svdvals(first_OR.T @ second_OR)
    return cosines.clamp(max=1.0)


@dataclass(frozen=True)
class CutError:
    """What a cut to ``rank`` costs: ``optimum`` is the relative error that the discarded singular values leave, which no matrix of
    that rank undercuts; ``error`` the measured one of the stored (rounded) factors; ``norm`` = ||b a||_F before."""

    norm: float
    rank: int
    optimum: float
    error: float

    @property
    def kept_energy(self) -> float:
        return 1.0 - self.error**2


def cut_error(term: LowRank, found: Decomposed, stored: LowRank) -> CutError:
    """Measure ``stored`` against ``term``, whose decomposition is ``found``. Exact up to float64 rounding, no dense product."""
    whole = math.sqrt(found.energy)
    if whole == 0.0:
        return CutError(0.0, stored.rank, 0.0, 0.0)
    lost = math.sqrt(float(found.s_R[stored.rank :].square().sum()))
    return CutError(whole, stored.rank, lost / whole, distance(term, stored) / whole)
