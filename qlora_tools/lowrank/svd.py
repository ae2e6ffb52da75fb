"""The leading part of a matrix's SVD, at a small multiple of the cost of multiplying by it.

:func:`truncated_svd` grows a randomized block Krylov basis (Musco & Musco, "Randomized Block Krylov Methods for Stronger
and Faster Approximate Singular Value Decomposition", 2015) on the shorter side, with full reorthogonalisation, until a
residual bound says that the error is within ``tolerance`` of the best possible. On a flat spectrum this needs about
half the passes over the matrix that plain subspace iteration needs, and every pass is one thin matrix product.
Matrices that are small against the rank, and those that do not settle, take the exact route: eigenvectors of the
Gram matrix, accumulated in float64.

The residual bound: for a kept Ritz pair (t_i^2, u_i) of ``G = D D^T`` with residual ``r_i = G u_i - t_i^2 u_i``, the
true eigenvalue exceeds t_i^2 by at most ``2|r_i|^2 / (g_i + sqrt(g_i^2 + 4|r_i|^2))`` (quadratic residual bound, Li & Li,
"A note on eigenvalues of perturbed Hermitian matrices", 2005), where g_i is the gap between t_i^2 and the rest of the
spectrum. The rest is taken from the largest Ritz value that is *not* kept, so the sum is an estimate, not a proof; in
tests against full SVDs it lies 2 to 10 times above the true gap. The residual norms fall out of the iteration.

Works on CPU and CUDA. Products are fp32: callers keep TF32 and reduced-precision matmul off.

Axes: M shorter side, N longer side, L block, K basis, R rank, O/I rows/columns as given.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from qlora_tools.lowrank.factors import LowRank, balanced

#: Relative-error distance from the optimum at which the iteration stops. The estimate overstates, so results lie closer.
TOLERANCE = 1e-4
_MAX_BLOCKS = 24
#: A shorter side up to this is worth an exact Gram decomposition when the iteration does not settle.
_EXACT_SIDE = 3072
#: Columns per float64 tile when the Gram matrix is accumulated: 1024 x 1024 x 8 bytes is 8 MB.
_TILE = 1024


@dataclass(frozen=True, eq=False)
class Truncated:
    """What :func:`truncated_svd` found.

    ``factors``: fp32, balanced, sorted. ``energy``: ||D||_F^2. ``gap``: bound estimate on the energy that the best
    rank-R matrix keeps beyond what ``factors`` keep (0 when ``exact``). ``spectrum``: all singular values, float64,
    when ``exact``; otherwise the leading R. ``passes``: thin products with D (0 when exact).
    """

    factors: LowRank
    energy: float
    gap: float
    spectrum: torch.Tensor
    exact: bool
    passes: int


def seed_of(name: str) -> int:
    """The random seed for a tensor: from its name, so that results do not depend on the order or grouping of work."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def squared_norm(matrix_OI: torch.Tensor) -> float:
    """||D||_F^2: fp32 within a run of at most 256 values (a row where 256 does not divide), float64 across. NaN or infinite when any entry is."""
    if matrix_OI.numel() == 0:
        return 0.0
    width = 256 if matrix_OI.is_contiguous() and matrix_OI.numel() % 256 == 0 else matrix_OI.shape[-1] if matrix_OI.ndim else 1
    norms = torch.linalg.vector_norm(matrix_OI.reshape(-1, width), dim=1)
    return float(norms.double().square().sum())


def truncated_svd(delta_OI: torch.Tensor, rank: int, *, seed: int, exact: bool = False, tolerance: float = TOLERANCE) -> Truncated:
    """The leading ``rank`` singular triples of a finite fp32 or fp64 matrix.

    ``exact`` asks for the whole spectrum. Otherwise the relative Frobenius error of the result exceeds the optimum's by
    less than about ``tolerance``; ``Truncated.gap`` tells what is left.
    """
    assert delta_OI.ndim == 2 and 1 <= rank <= min(delta_OI.shape), (tuple(delta_OI.shape), rank)
    energy = squared_norm(delta_OI)
    tall = delta_OI.shape[0] > delta_OI.shape[1]
    d_MN = delta_OI.T if tall else delta_OI
    block = rank + max(16, rank // 4)
    found = None
    if not exact and energy > 0.0 and 4 * block <= d_MN.shape[0]:
        found = _krylov(d_MN, rank, block, energy, seed, tolerance)
    if found is None:
        q_MR, spectrum = _gram(d_MN, rank)
        gap, passes, is_exact = 0.0, 0, True
    else:
        q_MR, spectrum, gap, passes = found
        is_exact = False
    u_OR, sv_RI = _orient(delta_OI, q_MR, tall)
    return Truncated(balanced(u_OR, sv_RI), energy, gap, spectrum, is_exact, passes)


def _orient(delta_OI: torch.Tensor, q_MR: torch.Tensor, tall: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Left vectors and scaled right vectors of D from orthonormal vectors of its shorter side."""
    if not tall:
        return q_MR, q_MR.T @ delta_OI
    image_OR = delta_OI @ q_MR
    values_R = torch.linalg.vector_norm(image_OR, dim=0)
    safe_R = torch.where(values_R > 0, values_R, torch.ones_like(values_R))
    return image_OR / safe_R, values_R[:, None] * q_MR.T


def _krylov(d_MN: torch.Tensor, rank: int, block: int, energy: float, seed: int, tolerance: float) -> tuple[torch.Tensor, torch.Tensor, float, int] | None:
    """Leading left vectors (M x R), singular values (R), gap, passes; ``None`` when the exact route is the better one."""
    side = d_MN.shape[0]
    omega_NL = torch.randn(d_MN.shape[1], block, generator=torch.Generator().manual_seed(seed), dtype=d_MN.dtype).to(d_MN.device)
    q_MK = torch.linalg.qr(d_MN @ omega_NL).Q
    t_KN = q_MK.T @ d_MN
    last_LN, passes = t_KN, 2
    gram_KK = torch.zeros(0, 0, dtype=torch.float64)
    while True:
        gram_KK = _extended(gram_KK, last_LN @ t_KN.T)
        next_ML, step_LL = _next_block(q_MK, d_MN @ last_LN.T)
        passes += 1
        theta_K, w_KK = torch.linalg.eigh(gram_KK)
        theta_K, w_KK = theta_K.flip(0).clamp(min=0.0), w_KK.flip(1)
        gap = _gap(theta_K, w_KK[-block:, :rank], step_LL.cpu().double(), rank)
        if _settled(theta_K, rank, gap, energy, tolerance):
            break
        too_large = 2 * (q_MK.shape[1] + block) > side if side <= _EXACT_SIDE else q_MK.shape[1] >= _MAX_BLOCKS * block
        if too_large:
            if side <= _EXACT_SIDE:
                return None
            break
        q_MK = torch.cat([q_MK, next_ML], dim=1)
        last_LN = next_ML.T @ d_MN
        t_KN = torch.cat([t_KN, last_LN])
        passes += 1
    if q_MK.shape[1] <= 4 * block:  # cheap here, and a fast-falling spectrum (which settles early) needs it: fp32 loses values below 3e-4 of the first
        t64_KN = t_KN.double()
        theta_K, w_KK = (part.flip(-1).cpu() for part in torch.linalg.eigh(t64_KN @ t64_KN.T))
    q_MR = q_MK @ w_KK[:, :rank].to(q_MK)
    return q_MR, theta_K[:rank].clamp(min=0.0).sqrt(), gap, passes


def _extended(gram_KK: torch.Tensor, rows_LK: torch.Tensor) -> torch.Tensor:
    """``T T^T`` with the newest block's rows (and, mirrored, columns) added; float64 on the CPU, where its eigenvectors are found."""
    rows = rows_LK.cpu().double()
    block, known = rows.shape[0], gram_KK.shape[0]
    grown = torch.empty(known + block, known + block, dtype=torch.float64)
    grown[:known, :known] = gram_KK
    grown[known:, :] = rows
    grown[:, known:] = rows.T
    corner = rows[:, known:]
    grown[known:, known:] = (corner + corner.T) / 2
    return grown


def _next_block(q_MK: torch.Tensor, z_ML: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal basis of what ``z`` adds to ``q``, and the coefficients that ``z``'s new part has in it."""
    for _ in range(2):
        z_ML = z_ML - q_MK @ (q_MK.T @ z_ML)
    new_ML, step_LL = torch.linalg.qr(z_ML)
    new_ML = torch.linalg.qr(new_ML - q_MK @ (q_MK.T @ new_ML)).Q
    return new_ML, step_LL


def _gap(theta_K: torch.Tensor, w_LR: torch.Tensor, step_LL: torch.Tensor, rank: int) -> float:
    """The residual bound of the module's docstring, summed over the kept pairs. ``w_LR``: their coordinates in the newest block."""
    residual_R = torch.linalg.vector_norm(step_LL @ w_LR, dim=0)
    apart_R = (theta_K[:rank] - theta_K[rank]).clamp(min=0.0)
    root_R = (apart_R.square() + 4 * residual_R.square()).sqrt()
    return float((2 * residual_R.square() / (apart_R + root_R).clamp(min=1e-300)).sum())


def _settled(theta_K: torch.Tensor, rank: int, gap: float, energy: float, tolerance: float) -> bool:
    left = max(0.0, 1.0 - float(theta_K[:rank].sum()) / energy)
    return math.sqrt(left) - math.sqrt(max(0.0, left - gap / energy)) < tolerance


def _gram(d_MN: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading left vectors (M x R, the matrix's dtype) and the whole spectrum (M, float64), from ``D D^T`` in float64."""
    gram_MM = torch.zeros(d_MN.shape[0], d_MN.shape[0], dtype=torch.float64, device=d_MN.device)
    for first in range(0, d_MN.shape[1], _TILE):
        tile = d_MN[:, first : first + _TILE].double()
        gram_MM.addmm_(tile, tile.T)
    theta_M, w_MM = torch.linalg.eigh(gram_MM)
    return w_MM.flip(1)[:, :rank].to(d_MN.dtype).contiguous(), theta_M.flip(0).clamp(min=0.0).sqrt().cpu()
