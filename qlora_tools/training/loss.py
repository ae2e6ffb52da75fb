"""Losses as sums over targets, without ever holding the logits of a whole batch.

A step divides by the number of targets of all its micro-batches, so losses here are sums. For language models the hidden
states are taken where they enter the head, rows without a target are dropped, and the head runs on a few hundred rows at
a time: cross-entropy and its gradient by the hidden states come out of one visit to each chunk (the head is frozen, so
nothing else is needed), and [tokens, vocabulary] never exists. That the split computes what the model computes is checked
on real hidden states when it is made; a model that does more behind its head than is known here keeps its whole logits.

Axes: N targets, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from qlora_tools.training.rows import Batch

#: Elements of one chunk of logits: 32 MB in fp32.
CHUNK_ELEMENTS = 1 << 22
IGNORED = -100


class Loss(Protocol):
    """``loss(model, batch)`` -> (sum over targets, differentiable; a detached sum of correct predictions, or ``None``)."""

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class Head:
    """From a batch to logits [N, V] in two parts: what enters the model's head, and the head with what stands behind it.

    ``splits`` is False where the two parts do not give the model's own logits; the first part is then the whole model.
    """

    def __init__(self, causal: Any) -> None:
        self.module: nn.Module = causal.get_output_embeddings()
        config = causal.config.get_text_config()
        self._cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self._divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        self._factor = float(getattr(config, "logit_scale", None) or 1.0)
        self.splits = self.module is not None and _split_agrees(causal, self)

    @property
    def plain(self) -> bool:
        """A frozen linear without anything behind it, whose gradient is known in closed form."""
        if not self.splits or type(self.module) is not nn.Linear or self._cap:
            return False
        return self._divisor == self._factor == 1.0 and not any(parameter.requires_grad for parameter in self.module.parameters())

    def rows(self, model: Any, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
        """Hidden states [N, D] of the ``chosen`` [B, T] positions (without a split: their logits [N, V])."""
        if not self.splits:
            return model(**batch.inputs, use_cache=False).logits[chosen]  # type: ignore[no-any-return]
        with _captured(self.module) as seen:
            model(**batch.inputs, use_cache=False)
        return seen[0][chosen]

    def width(self, rows: torch.Tensor) -> int:
        """V of what ``rows`` become."""
        return int(self.module.weight.shape[0] if self.splits else rows.shape[-1])  # type: ignore[union-attr, index, operator]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.through(rows) if self.splits else rows

    def through(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states, with the roundings of the model."""
        logits = self.module(hidden)
        if self._divisor != 1.0:
            logits = logits / self._divisor
        if self._factor != 1.0:
            logits = logits * self._factor
        return torch.tanh(logits / self._cap) * self._cap if self._cap else logits


class LanguageLoss:
    """Next-token cross-entropy; with a ``teacher``, ``teacher_weight`` of the loss is T^2 KL(teacher || student) at temperature T."""

    def __init__(self, causal: Any, *, teacher: Any = None, teacher_weight: float = 0.5, temperature: float = 1.0) -> None:
        self._head = Head(causal)
        self._teacher, self._teacher_head = teacher, Head(teacher) if teacher is not None else None
        self._weight, self._temperature = teacher_weight, temperature

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        chosen = batch.targets != IGNORED
        targets_N = batch.targets[chosen]
        rows = self._head.rows(model, batch, chosen)
        if self._teacher_head is not None:
            with torch.no_grad():
                guide = self._teacher_head.rows(self._teacher, batch, chosen)
            return self._chunked(rows, targets_N, guide), None
        if self._head.plain and rows.requires_grad:
            return _FrozenHeadCrossEntropy.apply(rows, self._head.module.weight, self._head.module.bias, targets_N), None
        return self._chunked(rows, targets_N, None), None

    def _chunked(self, rows: torch.Tensor, targets_N: torch.Tensor, guide: torch.Tensor | None) -> torch.Tensor:
        """Chunk by chunk, each recomputed in the backward pass."""
        parts = chunks_of(len(targets_N), self._head.width(rows))
        total = rows.new_zeros((), dtype=torch.float32) if parts else rows.sum(dtype=torch.float32)  # an empty sum has a gradient, too
        for part in parts:
            inputs = (rows[part], targets_N[part], None if guide is None else guide[part])
            if rows.requires_grad:
                total = total + torch.utils.checkpoint.checkpoint(self._of_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                total = total + self._of_chunk(*inputs)
        return total

    def _of_chunk(self, rows: torch.Tensor, targets_N: torch.Tensor, guide: torch.Tensor | None) -> torch.Tensor:
        logits_NV = self._head(rows).float()
        if guide is None:
            return functional.cross_entropy(logits_NV, targets_N, reduction="sum")
        assert self._teacher_head is not None
        with torch.no_grad():
            wanted_NV = functional.log_softmax(self._teacher_head(guide).float() / self._temperature, dim=-1)
        found_NV = functional.log_softmax(logits_NV / self._temperature, dim=-1)
        divergence = functional.kl_div(found_NV, wanted_NV, reduction="sum", log_target=True) * self._temperature**2
        surprise = functional.cross_entropy(logits_NV, targets_N, reduction="sum")
        return (1 - self._weight) * surprise + self._weight * divergence


def label_loss(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross-entropy of class labels [B], with the number of correct ones."""
    logits = model(**batch.inputs).logits.float()
    return functional.cross_entropy(logits, batch.targets, reduction="sum"), (logits.argmax(-1) == batch.targets).sum()


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of ``hidden W^T + bias``; the gradient by ``hidden`` is made while each chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, targets_N: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_ND = torch.empty_like(hidden_ND)
        for part in chunks_of(len(targets_N), len(weight_VD)):
            logits_NV = functional.linear(hidden_ND[part], weight_VD, bias_V)
            rows, targets = torch.arange(len(logits_NV), device=logits_NV.device), targets_N[part]
            log_shares_NV = functional.log_softmax(logits_NV, dim=1, dtype=torch.float32)
            total -= log_shares_NV[rows, targets].sum()
            excess_NV = log_shares_NV.exp_()  # softmax less one at the target
            excess_NV[rows, targets] -= 1.0
            grad_ND[part] = excess_NV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * grad if grad_ND.dtype == grad.dtype else (grad_ND.float() * grad).to(grad_ND.dtype)), None, None, None


def chunks_of(count: int, width: int) -> list[slice]:
    """Slices of ``count`` rows whose logits over ``width`` entries fit :data:`CHUNK_ELEMENTS`."""
    step = max(16, CHUNK_ELEMENTS // max(1, width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


@contextmanager
def _captured(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Inside the block the head only notes its input and answers with one column of zeros."""
    seen: list[torch.Tensor] = []

    def note(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden.new_zeros((*hidden.shape[:-1], 1))

    before = head.__dict__.get("forward")
    head.forward = note  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.forward = before  # type: ignore[method-assign]


@torch.no_grad()
def _split_agrees(causal: Any, head: Head) -> bool:
    """Whether hidden states through :class:`Head` give the model's own logits."""
    embedding = causal.get_input_embeddings().weight
    if embedding.device.type == "meta":
        return True
    training = causal.training
    causal.eval()
    try:
        ids = torch.arange(8, device=embedding.device)[None] % len(embedding)
        expected = causal(input_ids=ids, use_cache=False).logits
        with _captured(head.module) as seen:
            causal(input_ids=ids, use_cache=False)
        return len(seen) == 1 and expected.shape[:-1] == seen[0].shape[:-1] and bool(torch.equal(head.through(seen[0]), expected))
    except (RuntimeError, IndexError):  # what stands behind this head cannot take one column: the shapes do not fit
        return False
    finally:
        causal.train(training)
