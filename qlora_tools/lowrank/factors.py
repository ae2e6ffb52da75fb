"""A low-rank matrix kept as two factors, and the algebra that never multiplies them out.

Owns the record :class:`LowRank`, the balanced split of an SVD into factors, and sums, cuts and recompression of
factored matrices. Leaves out how an SVD is found (``svd.py``) and every file format.

The split is balanced: both factors carry ``sqrt(s)``. The relative error of bf16 rounding does not depend on the
split, but a balanced one keeps small singular directions out of fp16's subnormal range.

Axes: O rows of the matrix (outputs), I its columns (inputs), R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class LowRank:
    """``b_OR @ a_RI``, an O x I matrix of rank at most R. ``singular_values`` (R, float64, descending) are those of the
    product where they are known, else ``None``; the factors are then in no particular order."""

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    singular_values: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.a_RI.ndim == self.b_OR.ndim == 2 and self.a_RI.shape[0] == self.b_OR.shape[1], (self.a_RI.shape, self.b_OR.shape)

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b_OR.shape[0], self.a_RI.shape[1]

    def dense(self, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The product in fp32 (fp64 for fp64 factors), or only its ``rows`` [first, last)."""
        wide = torch.float64 if self.a_RI.dtype == torch.float64 else torch.float32
        b_OR = self.b_OR if rows is None else self.b_OR[rows[0] : rows[1]]
        return b_OR.to(wide) @ self.a_RI.to(wide)

    def cut(self, rank: int) -> LowRank:
        """The first ``rank`` components: the best approximation of that rank when the factors come from an SVD."""
        assert 0 <= rank <= self.rank
        values = None if self.singular_values is None else self.singular_values[:rank]
        return LowRank(self.a_RI[:rank].contiguous(), self.b_OR[:, :rank].contiguous(), values)

    def to(self, dtype: torch.dtype) -> LowRank:
        """Both factors rounded to ``dtype``."""
        return LowRank(self.a_RI.to(dtype), self.b_OR.to(dtype), self.singular_values)

    def cpu(self) -> LowRank:
        """The same in the host's memory."""
        return LowRank(self.a_RI.cpu(), self.b_OR.cpu(), None if self.singular_values is None else self.singular_values.cpu())


def balanced(u_OR: torch.Tensor, sv_RI: torch.Tensor) -> LowRank:
    """Factors ``u sqrt(s)`` and ``sv / sqrt(s)`` from left vectors and *scaled* right vectors ``sv = diag(s) v^T``.

    ``s`` is taken as the row norms of ``sv_RI``, so that the product is exactly ``u @ sv`` even where a singular value
    is too small for its vector to be accurate. Zero rows stay zero. Signs are canonical: the entry of largest
    magnitude in each column of ``b`` is positive, so that the same matrix gives the same factors on any route.
    """
    values_R = torch.linalg.vector_norm(sv_RI, dim=1)
    root_R = values_R.sqrt()
    safe_R = torch.where(root_R > 0, root_R, torch.ones_like(root_R))
    largest_R = u_OR.gather(0, u_OR.abs().argmax(dim=0, keepdim=True))[0] if u_OR.numel() else torch.ones_like(root_R)
    sign_R = torch.where(largest_R < 0, -1.0, 1.0).to(u_OR.dtype)
    return LowRank((sv_RI * (sign_R / safe_R)[:, None]).contiguous(), (u_OR * (sign_R * root_R)).contiguous(), values_R.double())


def weighted_sum(terms: Sequence[tuple[LowRank, float]]) -> LowRank:
    """``sum(weight * term)`` by concatenation: exact, the ranks add up. fp32 factors."""
    assert terms and len({term.shape for term, _ in terms}) == 1, [term.shape for term, _ in terms]
    a_RI = torch.cat([term.a_RI.float() for term, _ in terms])
    b_OR = torch.cat([term.b_OR.float() * weight for term, weight in terms], dim=1)
    return LowRank(a_RI, b_OR)


def compress(term: LowRank, rank: int | None = None) -> LowRank:
    """The best approximation of at most ``rank`` (default: the rank it has now), balanced and sorted, without the dense matrix.

    ``QR(b) = Q_b R_b``, ``QR(a^T) = Q_a R_a``; the SVD of the small core ``R_b R_a^T`` is the SVD of the product. In
    float64 throughout, O((O + I) R^2). Returns fp32 factors.
    """
    q_b, r_b = torch.linalg.qr(term.b_OR.double())
    q_a, r_a = torch.linalg.qr(term.a_RI.double().T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    keep = min(s.numel(), term.rank if rank is None else rank)
    result = balanced(q_b @ u[:, :keep], s[:keep, None] * (vh[:keep] @ q_a.T))
    return LowRank(result.a_RI.float(), result.b_OR.float(), result.singular_values)
