"""The best low-rank approximation where errors are weighed by what reaches a layer and by what its outputs are worth.

A linear layer with weight M reads inputs of second moments ``P = E[x x']``; with gradients g of the log-likelihood at its
output, ``G = E[g g']`` says which output errors cost most. The rank-R product that minimises

    ||Lo' (M - b a) Li||_F^2,     P = Li Li',   G = Lo Lo'

is found by Eckart and Young in other coordinates: the truncated SVD of ``Lo' M Li``, carried back. With P alone this is the closed
form of QERA ("QERA: an Analytical Framework for Quantization Error Reconstruction", Zhang et al., 2024) and of CALDERA's and EoRA's
low-rank step. Which square roots are taken does not matter: two of them differ by a rotation, which leaves the product as it is.

So a :class:`Metric` is a change of coordinates, and everything that is known about plain matrices (``svd.py``, ``certificate.py``)
holds for its images: ``certify(metric.image(m), found, metric.image_of(stored))`` certifies the weighted error.

Roots are Cholesky factors in fp64. Where the moments lack rank (fewer tokens than inputs, inputs that are always 0 or copies
of others) they come from eigenvectors instead, and directions that were never seen are dropped, not divided by something tiny:
the adapter does nothing there. Left out: where moments come from, LoRA scaling, files.

Axes: O rows of the matrix (outputs), I its columns (inputs), R rank, N one side, K what is left of a side in a metric's coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import Truncated, truncated_svd

#: Moments are stored in fp32: below this share of the largest eigenvalue, times the side, an eigenvalue is rounding.
_EPSILON = float(torch.finfo(torch.float32).eps)
#: Distance from the weighted optimum at which the iteration stops. Products are fp64 here, so it can be closer than the plain one's.
TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Root:
    """``root_NK root_NK' = moments``, fp64. Triangular where ``scale_K`` is ``None``; else eigenvectors times their roots ``scale_K``.

    ``alive_N``: indices of the rows that are not zero, where some are.
    """

    root_NK: torch.Tensor
    scale_K: torch.Tensor | None = None
    alive_N: torch.Tensor | None = None

    @property
    def side(self) -> int:
        return self.root_NK.shape[0]

    def undo(self, x_RK: torch.Tensor) -> torch.Tensor:
        """The smallest y [R, N] with ``y root = x``: zero where nothing was seen."""
        if self.scale_K is not None:
            return (x_RK / self.scale_K.square()) @ self.root_NK.T
        if self.alive_N is None:
            whole_RN: torch.Tensor = torch.linalg.solve_triangular(self.root_NK, x_RK, upper=False, left=False)
            return whole_RN
        y_RN = torch.zeros(x_RK.shape[0], self.side, dtype=x_RK.dtype, device=x_RK.device)
        y_RN[:, self.alive_N] = torch.linalg.solve_triangular(self.root_NK[self.alive_N], x_RK, upper=False, left=False)
        return y_RN


def square_root(moments_NN: torch.Tensor) -> Root | None:
    """A square root of second moments [N, N]; ``None`` where they are all zero, since nothing is known then.

    The damping of the Cholesky factor is half a rounding step of the stored moments: less than is known of them.
    """
    wide_NN = _symmetric(moments_NN)
    diagonal_N = wide_NN.diagonal()
    alive_N = (diagonal_N > 0).nonzero().flatten()
    if not alive_N.numel():
        return None
    whole = alive_N.numel() == len(wide_NN)
    part_KK = wide_NN if whole else wide_NN[alive_N][:, alive_N]
    factor_KK, failed = torch.linalg.cholesky_ex(part_KK + torch.eye(len(part_KK), dtype=part_KK.dtype, device=part_KK.device) * _damping(part_KK))
    if int(failed) or float(factor_KK.diagonal().square().min()) <= len(wide_NN) * _EPSILON * float(diagonal_N.max()):
        return eigen_root(wide_NN)
    if whole:
        return Root(factor_KK)
    root_NK = torch.zeros(len(wide_NN), alive_N.numel(), dtype=torch.float64, device=wide_NN.device)
    root_NK[alive_N] = factor_KK
    return Root(root_NK, alive_N=alive_N)


def eigen_root(moments_NN: torch.Tensor) -> Root:
    """The root from eigenvectors, without those whose eigenvalue is at most ``N * eps(fp32)`` of the largest."""
    values_N, vectors_NN = torch.linalg.eigh(_symmetric(moments_NN))
    kept_N = values_N > len(values_N) * _EPSILON * values_N[-1]
    scale_K = values_N[kept_N].sqrt()
    return Root(vectors_NN[:, kept_N] * scale_K, scale_K)


def _symmetric(moments_NN: torch.Tensor) -> torch.Tensor:
    assert moments_NN.ndim == 2 and moments_NN.shape[0] == moments_NN.shape[1], tuple(moments_NN.shape)
    wide_NN = moments_NN.double()
    return (wide_NN + wide_NN.T) / 2


def _damping(moments_NN: torch.Tensor) -> float:
    return 0.5 * _EPSILON * float(moments_NN.diagonal().mean())


@dataclass(frozen=True, eq=False)
class Metric:
    """What an error in a matrix O x I costs: ``inputs`` the root of its columns' moments, ``outputs`` of its rows'; ``None``: all alike."""

    inputs: Root | None = None
    outputs: Root | None = None

    def image(self, matrix_OI: torch.Tensor) -> torch.Tensor:
        """``Lo' M Li`` in fp64: its Frobenius norm is the weighted norm of M."""
        found = matrix_OI.double()
        found = found if self.outputs is None else self.outputs.root_NK.T @ found
        return found if self.inputs is None else found @ self.inputs.root_NK

    def image_of(self, factors: LowRank) -> LowRank:
        """The same of a product of factors, as factors in fp64."""
        a, b = factors.a_RI.double(), factors.b_OR.double()
        return LowRank(a if self.inputs is None else a @ self.inputs.root_NK, b if self.outputs is None else self.outputs.root_NK.T @ b)

    def back(self, factors: LowRank) -> LowRank:
        """The factors whose image is ``factors``, in fp32; every component's two vectors get the same length, the order stays."""
        a, b = factors.a_RI.double(), factors.b_OR.double()
        a = a if self.inputs is None else self.inputs.undo(a)
        b = b if self.outputs is None else self.outputs.undo(b.T).T
        length_a, length_b = torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=0)
        live = (length_a > 0) & (length_b > 0)
        even = torch.where(live, (length_b / length_a.clamp(min=1e-300)).sqrt(), 0.0)
        uneven = torch.where(live, 1 / even.clamp(min=1e-300), 0.0)
        return LowRank((a * even[:, None]).float().contiguous(), (b * uneven).float().contiguous())


@dataclass(frozen=True, eq=False)
class Weighted:
    """``factors``: fp32, balanced, in the order of what they are worth, so that a cut of them is the best of its rank too.
    ``found``: the decomposition of the image, whose spectrum is the weighted one."""

    factors: LowRank
    found: Truncated


def weighted_svd(matrix_OI: torch.Tensor, metric: Metric, rank: int, *, seed: int, exact: bool = False, tolerance: float = TOLERANCE) -> Weighted:
    """The best product of ``rank`` for a finite matrix under ``metric``, divided by nothing: a LoRA scale is the caller's.

    Where the metric leaves fewer than ``rank`` directions, the last components are zero.
    """
    assert 1 <= rank <= min(matrix_OI.shape), (tuple(matrix_OI.shape), rank)
    image = metric.image(matrix_OI)
    found = truncated_svd(image, min(rank, *image.shape), seed=seed, exact=exact, tolerance=tolerance)
    factors = metric.back(found.factors)
    missing = rank - factors.rank
    if missing:
        a, b = torch.nn.functional.pad(factors.a_RI, (0, 0, 0, missing)), torch.nn.functional.pad(factors.b_OR, (0, missing))
        factors = LowRank(a, b)
    return Weighted(factors, found)
