"""Distillation of an adapter: A and B move until base and adapter predict what the tuned model predicts. No labels.

The loss is the sum of KL(teacher || student) over positions. Both models run on the same micro-batch; their hidden states enter the two heads a few
hundred positions at a time, so neither the teacher's logits nor the student's ever exist whole. Where the student's head is a frozen linear, as it
nearly always is, divergence and gradient come out of one visit to each chunk. The run itself (order of the text, schedule, masters, checkpoints) is
the training loop's; :func:`distill` adds what distillation promises: the start is measured first, and what comes back is never worse on held-out
text, in the very rounding that will be stored.

Axes: N windows or positions, L tokens of a window, D hidden width, V vocabulary, T temperature.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from qlora_tools.errors import NonFiniteError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.training import events
from qlora_tools.training.distill_config import RefineConfig
from qlora_tools.training.loop import Run, adopt, evaluate, restore, train
from qlora_tools.training.loss import IGNORED, Head, chunks_of
from qlora_tools.training.rows import Batch, Indices
from qlora_tools.training.state import checkpoints, load_state

__all__ = ["Distilled", "DivergenceLoss", "RefineConfig", "WindowRows", "distill"]


class WindowRows:
    """Windows of one text i64 [N, L] as the loop's rows: every position predicts the next token."""

    def __init__(self, windows_NL: torch.Tensor) -> None:
        assert windows_NL.ndim == 2, windows_NL.shape
        assert len(windows_NL), "no windows"
        self._windows_NL = windows_NL

    def __len__(self) -> int:
        return len(self._windows_NL)

    @property
    def tokens_per_epoch(self) -> int:
        return self._windows_NL.numel()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self._windows_NL.numpy().tobytes()).hexdigest()

    def longest(self) -> int:
        return 0

    def batch(self, indices: Indices) -> Batch:
        ids_BL = self._windows_NL[torch.as_tensor(indices)]
        targets_BL = torch.cat([ids_BL[:, 1:], torch.full_like(ids_BL[:, :1], IGNORED)], dim=1)
        return Batch({"input_ids": ids_BL}, targets_BL, targets_BL.numel() - len(targets_BL), ids_BL.numel())


class DivergenceLoss:
    """Sum over positions of T^2 KL(teacher || student) at temperature T; see the module's docstring."""

    def __init__(self, causal: Any, teacher: Any, *, temperature: float = 1.0) -> None:
        self._head, self._teacher, self._guide, self._temperature = Head(causal), teacher, Head(teacher), temperature

    def __call__(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        chosen = batch.targets != IGNORED
        with torch.no_grad():
            guide = self._guide.rows(self._teacher, batch, chosen)
        rows = self._head.rows(model, batch, chosen)
        if self._head.plain:
            return _FrozenHeadDivergence.apply(rows, self._head, guide, self._guide, self._temperature), None
        total = rows.sum(dtype=torch.float32) * 0.0
        for part in chunks_of(len(rows), self._head.width(rows)):
            if rows.requires_grad:
                total = total + torch.utils.checkpoint.checkpoint(self._of_chunk, rows[part], guide[part], use_reentrant=False, preserve_rng_state=False)
            else:
                total = total + self._of_chunk(rows[part], guide[part])
        return total, None

    def _of_chunk(self, rows: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted_NV = functional.log_softmax(self._guide(guide).float() / self._temperature, dim=-1)
        found_NV = functional.log_softmax(self._head(rows).float() / self._temperature, dim=-1)
        return functional.kl_div(found_NV, wanted_NV, reduction="sum", log_target=True) * self._temperature**2


class _FrozenHeadDivergence(torch.autograd.Function):
    """The divergence at ``hidden W^T + bias``, whose gradient by ``hidden`` is T (student's shares - teacher's shares) W."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head: Head, guide: torch.Tensor, guide_head: Head, temperature: float) -> torch.Tensor:
        weight_VD: Any = head.module.weight
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        needed = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND) if needed else None
        for part in chunks_of(len(hidden_ND), len(weight_VD)):
            wanted_NV = functional.log_softmax(guide_head(guide[part]).float() / temperature, dim=-1)
            found_NV = functional.log_softmax(head(hidden_ND[part]).float() / temperature, dim=-1)
            shares_NV = wanted_NV.exp()
            total += torch.linalg.vecdot(shares_NV, wanted_NV.sub_(found_NV)).sum()
            if grad_ND is not None:
                grad_ND[part] = (found_NV.exp_().sub_(shares_NV)).to(weight_VD.dtype) @ weight_VD
        if grad_ND is not None:
            ctx.temperature = temperature
            ctx.save_for_backward(grad_ND)
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND.float() * (grad * ctx.temperature)).to(grad_ND.dtype), None, None, None, None


@dataclass(frozen=True)
class Distilled:
    """What came of it. KL in nats per position on held-out text. ``values``: the masters to store; ``kept_start``: nothing was better.

    ``stopped``: ``done``, ``early`` or ``interrupted``; after an interruption ``values`` are the start's and ``end_kl`` the best so far.
    """

    values: Mapping[str, torch.Tensor]
    start_kl: float
    end_kl: float
    best_step: int
    kept_start: bool
    stopped: str


def distill(
    run: Run,
    *,
    resume_from: Path | None = None,
    stored: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, value: value,
    progress: Progress = SILENT,
) -> Distilled:
    """Train ``run``, whose loss is a divergence, from the values that its model has, and take the best of its evaluations and this start.

    ``resume_from``: a checkpoint of the run to go on from; the start is measured first all the same. ``stored``: (name, master) -> the value as it
    will be read back from a file; the last measurement is of these.

    Raises:
        NonFiniteError: the divergence is no longer a number.
    """
    assert run.held_out is not None, "distillation is judged on held-out text"
    start = _copied(run.masters.values)
    start_kl, _ = evaluate(run, run.held_out)
    if not math.isfinite(start_kl):
        raise NonFiniteError(f"the divergence from the teacher is {start_kl} at the start", hint="check the adapter and the two models")
    run.progressed.best_loss, run.progressed.best_step = start_kl, 0
    if resume_from is not None:
        restore(run, resume_from)
    else:
        run.listen(events.Evaluation(0, start_kl, True))
    best = _Best(run)
    stopped = train(run, progress)
    best_kl, best_step = run.progressed.best_loss or start_kl, run.progressed.best_step or 0
    if stopped == "interrupted" or best_step == 0:
        return Distilled(start, start_kl, best_kl, best_step, best_step == 0, stopped)
    found = {name: stored(name, value) for name, value in best.values(best_step).items()}
    adopt(run.masters, {f"master/{name}": value for name, value in found.items()})
    end_kl, _ = evaluate(run, run.held_out)
    if not end_kl < start_kl:
        return Distilled(start, start_kl, start_kl, 0, True, stopped)
    return Distilled(found, start_kl, end_kl, best_step, False, stopped)


class _Best:
    """The masters of a run's best evaluation: from its folder, or kept in memory where it has none."""

    def __init__(self, run: Run) -> None:
        self._run, self._kept, listen = run, {}, run.listen  # type: ignore[var-annotated]

        def keep(event: events.Event) -> None:
            if isinstance(event, events.Evaluation) and event.best and run.folder is None:
                self._kept = _copied(run.masters.values)
            listen(event)

        run.listen = keep

    def values(self, step: int) -> dict[str, torch.Tensor]:
        """Those of the evaluation after ``step``."""
        if step == self._run.progressed.step:
            return _copied(self._run.masters.values)
        if self._run.folder is None:
            return self._kept
        (path,) = [path for path in checkpoints(self._run.folder) if path.name == f"step-{step:06}"]
        tensors, _, _ = load_state(path)
        return {name.removeprefix("master/"): tensor for name, tensor in tensors.items() if name.startswith("master/")}


def _copied(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}
