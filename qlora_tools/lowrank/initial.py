"""Where a LoRA starts: the first values of A and B, from a seed, from the weight, or from what quantization lost of it.

``gaussian`` and ``uniform`` give a random A to go with B = 0. The others start inside the weight W:

* :func:`pissa`: the leading singular part of W (Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors
  Adaptation of Large Language Models", 2024);
* :func:`olora`: the leading columns of Q and rows of R in W = Q R (Buyukakyuz, "OLoRA: Orthonormal Low-Rank Adaptation of Large
  Language Models", 2024);
* :func:`loftq`: the leading singular part of W - Q(W), which quantization lost (Li et al., "LoftQ: LoRA-Fine-Tuning-Aware
  Quantization for Large Language Models", 2023);
* :func:`qera`: of W - Q(W), what counts most for the layer's outputs on calibration text (Zhang et al., "QERA: an Analytical
  Framework for Quantization Error Reconstruction", 2024).

PiSSA and OLoRA train ``W - scale B0 A0 + scale B A``: whoever uses them subtracts ``scale B0 A0`` from the frozen weight, and the
function at the start is that of W. LoftQ and QERA subtract nothing: ``Q(W) + scale B A`` starts closer to W than Q(W) is. Only the
first step of LoftQ's alternation is here: every further one quantizes another matrix, so that the adapter would fit no
base but its own. Left out: models, files, and who subtracts (``training/``).

Axes: O outputs, I inputs (a convolution's kernels flattened into it), R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import seed_of, truncated_svd
from qlora_tools.lowrank.weighted import Metric, square_root, weighted_svd

#: Relative-error distance from the best approximation that is near enough for a starting point.
TOLERANCE = 1e-3


def uniform(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A [R, I...] as PEFT's default has it: uniform in +-1/sqrt(I), fp32, on the CPU, the same for any number of threads."""
    bound = 1.0 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def gaussian(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A [R, I...] as PEFT's ``gaussian`` has it: normal with standard deviation 1/R, fp32, on the CPU."""
    return torch.empty(shape).normal_(0.0, 1.0 / shape[0], generator=torch.Generator().manual_seed(seed))


def pissa(weight_OI: torch.Tensor, rank: int, scale: float, name: str = "") -> LowRank:
    """Balanced fp32 factors whose product times ``scale`` is the best rank-R approximation of the weight, up to :data:`TOLERANCE`.

    ``name`` seeds the randomized SVD.
    """
    return _scaled_down(truncated_svd(weight_OI.float(), rank, seed=seed_of(name), tolerance=TOLERANCE).factors, scale)


def olora(weight_OI: torch.Tensor, rank: int) -> LowRank:
    """``b = Q[:, :R]`` and ``a = R[:R]`` of the QR decomposition, fp32; the scale is applied on top, as PEFT does.

    Column j of Q depends on the first j columns of W alone, so only R columns are decomposed. Signs are LAPACK's own.
    """
    assert 1 <= rank <= min(weight_OI.shape), (tuple(weight_OI.shape), rank)
    wide_OI = weight_OI.double()
    q_OR = torch.linalg.qr(wide_OI[:, :rank]).Q
    a_RI = q_OR.T @ wide_OI
    a_RI[:, :rank].triu_()
    return LowRank(a_RI.float().contiguous(), q_OR.float().contiguous())


def loftq(weight_OI: torch.Tensor, quantize: Callable[[torch.Tensor], torch.Tensor], rank: int, scale: float, name: str = "") -> LowRank:
    """Balanced fp32 factors with ``scale B A`` the best rank-R approximation of ``W - quantize(W)``, up to :data:`TOLERANCE`.

    ``quantize`` gives the weight as the frozen base computes with it. Where nothing is lost, b is zero and a random as in
    :func:`uniform`.
    """
    lost_OI = weight_OI.float() - quantize(weight_OI).float()
    if not lost_OI.any():
        return _learnable(lost_OI, rank, name)
    return _scaled_down(truncated_svd(lost_OI, rank, seed=seed_of(name), tolerance=TOLERANCE).factors, scale)


def qera(
    weight_OI: torch.Tensor,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    moments_II: torch.Tensor,
    rank: int,
    scale: float,
    name: str = "",
) -> LowRank:
    """Balanced fp32 factors with ``scale B A`` the rank-R matrix that leaves least of ``(W - quantize(W)) x`` over inputs of these second moments.

    Where nothing is lost or nothing was seen, as :func:`loftq`; a component for which nothing is left starts at b = 0 with a random a.
    """
    lost_OI = weight_OI.float() - quantize(weight_OI).float()
    root = square_root(moments_II.to(weight_OI.device))
    if root is None:
        return loftq(weight_OI, quantize, rank, scale, name)
    if not lost_OI.any():
        return _learnable(lost_OI, rank, name)
    found = _scaled_down(weighted_svd(lost_OI, Metric(root), rank, seed=seed_of(name), tolerance=TOLERANCE).factors, scale)
    idle_R = ~found.a_RI.any(dim=1)
    return LowRank(torch.where(idle_R[:, None], _learnable(lost_OI, rank, name).a_RI, found.a_RI), found.b_OR)


def _learnable(like_OI: torch.Tensor, rank: int, name: str) -> LowRank:
    """b = 0 and a random a on the device of ``like_OI``: two zero factors would never learn."""
    a_RI = uniform((rank, like_OI.shape[1]), seed_of(name)).to(like_OI.device)
    return LowRank(a_RI, torch.zeros(like_OI.shape[0], rank, device=like_OI.device))


def _scaled_down(factors: LowRank, scale: float) -> LowRank:
    """The factors of ``product / scale``, balanced as before."""
    root = math.sqrt(abs(scale))
    return LowRank(factors.a_RI / root, factors.b_OR * math.copysign(1 / root, scale))
