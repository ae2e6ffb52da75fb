"""The two optimizers of the demo: AdamW from torch, and orthogonalized momentum for the matrices of a model trained from scratch.

A minute of two cores is some five hundred steps, and AdamW wastes most of them: at equal time, replacing the
momentum of every matrix by its nearest (semi-)orthogonal matrix brings the held-out loss down much faster.
Method: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the quintic
Newton-Schulz iteration given there. Matrices of one shape are iterated as one batch, which on CPU costs a third
of doing them one after the other. Fine-tuning uses AdamW throughout, as real fine-tuning does.

Axes: N matrices of one shape, O rows, I columns (after a transpose, O <= I).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_QUINTIC = (3.4445, -4.7750, 2.0315)
_BETAS = (0.9, 0.95)


class Muon:
    """Orthogonalized Nesterov momentum over ``matrices`` (2-D, fp32); ``dtype`` is what the iteration computes in."""

    def __init__(
        self, matrices: Sequence[torch.Tensor], *, dtype: torch.dtype = torch.float32, momentum: float = 0.85, weight_decay: float = 0.01, iterations: int = 5
    ) -> None:
        self._matrices = list(matrices)
        self._velocity = [torch.zeros_like(matrix) for matrix in self._matrices]
        self._dtype, self._momentum, self._weight_decay, self._iterations = dtype, momentum, weight_decay, iterations
        self._of_shape: dict[tuple[int, ...], list[int]] = {}
        for index, matrix in enumerate(self._matrices):
            self._of_shape.setdefault(tuple(sorted(matrix.shape)), []).append(index)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the ``grad`` of every matrix; a square matrix moves by ``rate`` in each singular direction."""
        gradients = [matrix.grad if matrix.grad is not None else torch.zeros_like(matrix) for matrix in self._matrices]
        for velocity, gradient in zip(self._velocity, gradients, strict=True):
            velocity.lerp_(gradient, 1 - self._momentum)
        for indices in self._of_shape.values():
            ahead = [torch.lerp(gradients[i], self._velocity[i], self._momentum) for i in indices]
            update_NOI = orthogonalized(torch.stack([_wide(update) for update in ahead]).to(self._dtype), self._iterations).float()
            for index, update_OI in zip(indices, update_NOI, strict=True):
                matrix = self._matrices[index]
                tall = matrix.shape[0] > matrix.shape[1]
                scale = (matrix.shape[0] / matrix.shape[1]) ** 0.5 if tall else 1.0
                matrix.mul_(1 - rate * self._weight_decay).add_(update_OI.mT if tall else update_OI, alpha=-rate * scale)


def orthogonalized(x_NOI: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """``x_NOI`` (O <= I) with its singular values pushed into about [0.7, 1.2]; the singular vectors stay."""
    a, b, c = _QUINTIC
    x_NOI = x_NOI / (x_NOI.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x_NOI.dtype)
    for _ in range(iterations):
        gram_NOO = x_NOI @ x_NOI.mT
        x_NOI = torch.baddbmm(x_NOI, torch.baddbmm(gram_NOO, gram_NOO, gram_NOO, beta=b, alpha=c), x_NOI, beta=a)
    return x_NOI


def optimizer_jobs(
    named: Sequence[tuple[str, torch.Tensor]], *, kind: str, rate: float, matrix_rate: float, dtype: torch.dtype
) -> list[Callable[[float], None]]:
    """Functions of the schedule's factor in [0, 1] that together update the fp32 tensors of ``named`` from their ``grad``.

    They touch different tensors, so they may run side by side. ``kind``: ``"adamw"`` uses ``rate`` for everything;
    ``"muon"`` uses ``matrix_rate`` for the matrices inside the layers and AdamW at ``rate`` for embedding and
    norms. Norms are never decayed.
    """
    inside = [tensor for name, tensor in named if tensor.ndim == 2 and ".layers." in name] if kind == "muon" else []
    chosen = {id(tensor) for tensor in inside}
    rest = [tensor for _, tensor in named if id(tensor) not in chosen]
    adamw = torch.optim.AdamW(
        [
            {"params": [tensor for tensor in rest if tensor.ndim == 2], "weight_decay": 0.01},
            {"params": [tensor for tensor in rest if tensor.ndim != 2], "weight_decay": 0.0},
        ],
        lr=rate,
        betas=_BETAS,
        fused=True,
    )

    def step_adamw(factor: float) -> None:
        for group in adamw.param_groups:
            group["lr"] = rate * factor
        adamw.step()

    halves = [Muon(half, dtype=dtype) for half in (inside[0::2], inside[1::2]) if half]
    return [step_adamw, *(lambda factor, muon=muon: muon.step(matrix_rate * factor) for muon in halves)]


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
