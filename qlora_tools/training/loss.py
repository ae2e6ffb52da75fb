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
CHUNK_ELEMENTS = 1 << 23
IGNORED = -100


class Loss(Protocol):
    """``loss(model, batch)`` -> (sum over targets, differentiable; a detached sum of correct predictions, or ``None``)."""

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class Head:
    """Hidden states [N, D] -> logits [N, V], as the model's own head and what stands behind it compute them."""

    def __init__(self, causal: Any) -> None:
        self.module: nn.Module = causal.get_output_embeddings()
        config = causal.config.get_text_config()
        self._cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self._factor = 1.0 / float(getattr(config, "logits_scaling", None) or 1.0) * float(getattr(config, "logit_scale", None) or 1.0)

    @property
    def width(self) -> int:
        return int(self.module.weight.shape[0])  # type: ignore[union-attr, index]

    @property
    def plain(self) -> bool:
        """A frozen linear without anything behind it, whose gradient is known in closed form."""
        frozen = not any(parameter.requires_grad for parameter in self.module.parameters())
        return frozen and type(self.module) is nn.Linear and not self._cap and self._factor == 1.0

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        logits = self.module(hidden_ND) * self._factor if self._factor != 1.0 else self.module(hidden_ND)
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits


class LanguageLoss:
    """Next-token cross-entropy; with a ``teacher``, ``teacher_weight`` of the loss is T^2 KL(teacher || student) at temperature T."""

    def __init__(self, causal: Any, *, teacher: Any = None, teacher_weight: float = 0.5, temperature: float = 1.0) -> None:
        self._head = Head(causal)
        self._splits = _split_agrees(causal, self._head)
        self._teacher, self._weight, self._temperature = teacher, teacher_weight if teacher is not None else 0.0, temperature
        self._teacher_head = Head(teacher) if teacher is not None else None

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        chosen = batch.targets != IGNORED
        targets_N = batch.targets[chosen]
        if not self._splits:
            return _summed_cross_entropy(model(**batch.inputs, use_cache=False).logits[chosen], targets_N), None
        hidden_ND = _hidden(model, self._head, batch)[chosen]
        if self._teacher is not None:
            assert self._teacher_head is not None
            with torch.no_grad():
                guide_ND = _hidden(self._teacher, self._teacher_head, batch)[chosen]
            return self._chunked(hidden_ND, targets_N, guide_ND), None
        if self._head.plain and hidden_ND.requires_grad:
            return _FrozenHeadCrossEntropy.apply(hidden_ND, self._head.module.weight, self._head.module.bias, targets_N), None
        return self._chunked(hidden_ND, targets_N, None), None

    def _chunked(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, guide_ND: torch.Tensor | None) -> torch.Tensor:
        """Chunk by chunk, each recomputed in the backward pass."""
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for part in _chunks(len(targets_N), self._head.width):
            guide = None if guide_ND is None else guide_ND[part]
            if hidden_ND.requires_grad:
                total = total + torch.utils.checkpoint.checkpoint(self._of_chunk, hidden_ND[part], targets_N[part], guide, use_reentrant=False)
            else:
                total = total + self._of_chunk(hidden_ND[part], targets_N[part], guide)
        return total

    def _of_chunk(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, guide_ND: torch.Tensor | None) -> torch.Tensor:
        logits_NV = self._head(hidden_ND).float()
        if guide_ND is None:
            return _summed_cross_entropy(logits_NV, targets_N)
        assert self._teacher_head is not None
        with torch.no_grad():
            wanted = functional.log_softmax(self._teacher_head(guide_ND).float() / self._temperature, dim=-1)
        found = functional.log_softmax(logits_NV / self._temperature, dim=-1)
        divergence = functional.kl_div(found, wanted, reduction="sum", log_target=True) * self._temperature**2
        return (1 - self._weight) * _summed_cross_entropy(logits_NV, targets_N) + self._weight * divergence


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
        for part in _chunks(len(targets_N), len(weight_VD)):
            logits_NV = functional.linear(hidden_ND[part], weight_VD, bias_V).float()
            rows, targets = torch.arange(len(logits_NV), device=logits_NV.device), targets_N[part]
            normalizer_N = torch.logsumexp(logits_NV, dim=1)
            total += (normalizer_N - logits_NV[rows, targets]).sum()
            excess_NV = logits_NV.sub_(normalizer_N[:, None]).exp_()  # softmax less one at the target
            excess_NV[rows, targets] -= 1.0
            grad_ND[part] = excess_NV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad.to(grad_ND.dtype), None, None, None


def _summed_cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")


def _chunks(count: int, width: int) -> list[slice]:
    step = max(16, CHUNK_ELEMENTS // max(1, width))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _hidden(model: Any, head: Head, batch: Batch) -> torch.Tensor:
    """What enters the head, [B, T, D]; the head itself does not run."""
    with _captured(head.module) as seen:
        model(**batch.inputs, use_cache=False)
    return seen[0]


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
    if embedding.device.type == "meta" or head.module is None:
        return head.module is not None
    training = causal.training
    causal.eval()
    try:
        ids = torch.arange(8, device=embedding.device)[None] % len(embedding)
        expected = causal(input_ids=ids, use_cache=False).logits
        with _captured(head.module) as seen:
            causal(input_ids=ids, use_cache=False)
        return len(seen) == 1 and expected.shape[:-1] == seen[0].shape[:-1] and bool(torch.equal(head(seen[0]), expected))
    finally:
        causal.train(training)
