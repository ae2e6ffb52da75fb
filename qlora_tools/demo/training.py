"""One small training loop, for training from scratch and for fine-tuning; bounded by steps, not by the clock.

The network computes in bf16 where the processor multiplies bf16 natively, otherwise in fp32; the weights that
the optimizer moves are fp32 either way. A batch is always cut into the same two shards, each computed by one
thread: no operation waits for another core, which on a busy machine costs far more than it gains, and the
weights depend on the seed and the kind of processor but not on the number of threads. Left out on purpose: gradient accumulation, resuming, several devices. A run is a minute long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, TypeVar

import torch
from torch.nn import functional

from qlora_tools.demo.optimizer import optimizer_jobs
from qlora_tools.engine.run import single_threaded_blas
from qlora_tools.errors import NonFiniteError, UsageError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.floats import native_dtype

_MAX_GRAD_NORM = 1.0
_SMOOTHING = 0.95
_EVAL_WINDOWS = 4  # windows per forward pass
_SHARDS = 2  # part of the result (sums are taken in this order), so a constant and not the number of cores

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: ``steps`` of ``batch`` windows of ``context`` tokens; linear warm-up, then linear decay to zero.

    ``kind`` and the two rates are those of :func:`qlora_tools.demo.optimizer.optimizer_step`.
    """

    steps: int
    batch: int
    context: int
    rate: float
    kind: str = "adamw"
    matrix_rate: float = 0.0
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.context < 2:
            raise UsageError(f"steps {self.steps}, batch {self.batch}, context {self.context}: expected at least 1, 1 and 2")
        if self.kind not in ("adamw", "muon"):
            raise UsageError(f"optimizer {self.kind!r} is not known; expected adamw or muon")

    @property
    def tokens(self) -> int:
        """Tokens seen in training, repeats counted."""
        return self.steps * self.batch * self.context

    def factor(self, step: int) -> float:
        """The rate of ``step`` (from 0) as a part of the peak."""
        ramp = max(1, round(self.warmup * self.steps))
        return min((step + 1) / ramp, (self.steps - step) / max(1, self.steps - ramp), 1.0)


def train(model: Any, ids: Sequence[int], schedule: Schedule, *, seed: int, title: str, progress: Progress = SILENT, dtype: torch.dtype | None = None) -> float:
    """Train the causal language model ``model`` in place on the token stream ``ids``; leaves it in fp32.

    Returns the smoothed training loss at the end, in nats per token.

    Raises:
        UsageError: fewer tokens than one window. NonFiniteError: the loss stopped being a number.
    """
    dtype = dtype or native_dtype()
    tokens = torch.as_tensor(ids, dtype=torch.long)
    if tokens.numel() < schedule.context + 1:
        raise UsageError(f"{tokens.numel()} tokens of training text, one window needs {schedule.context + 1}")
    named = [(name, parameter.detach().float().clone()) for name, parameter in model.named_parameters()]
    weights = [tensor for _, tensor in named]
    model.to(dtype).train()
    parameters = list(model.parameters())
    _load(parameters, weights)
    jobs = optimizer_jobs(named, kind=schedule.kind, rate=schedule.rate, matrix_rate=schedule.matrix_rate, dtype=dtype)
    batches = _batches(tokens, schedule, torch.Generator().manual_seed(seed))
    smooth = math.log(model.config.vocab_size)

    def shard_gradients(shard_NT: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = next_token_loss(model, shard_NT) * (len(shard_NT) / schedule.batch)
        return loss.item(), torch.autograd.grad(loss, parameters)  # not backward(): two threads would add into the same .grad

    with progress.task(title, schedule.steps, "steps") as task, _side_by_side() as run:
        for index, batch in zip(range(schedule.steps), batches, strict=False):
            losses, gradients = zip(*run(shard_gradients, batch.tensor_split(min(_SHARDS, len(batch)))), strict=True)
            loss = sum(losses)
            if not math.isfinite(loss):
                raise NonFiniteError(f"{title}: the loss is {loss} at step {index + 1}", hint="lower the learning rate")
            for weight, *parts in zip(weights, *gradients, strict=True):
                weight.grad = sum(part.float() for part in parts)
            torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)
            run(methodcaller("__call__", schedule.factor(index)), jobs)
            _load(parameters, weights)
            smooth += (1 - min(_SMOOTHING, (index + 1) / (index + 10))) * (loss - smooth)
            task.advance(1, f"perplexity {math.exp(smooth):.0f}")
    model.float().eval()
    _load(list(model.parameters()), weights)
    return smooth


def next_token_loss(model: Any, windows_NT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of tokens 2..T of each window, given those before; the softmax is fp32."""
    logits = model(input_ids=windows_NT, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), windows_NT[:, 1:].reshape(-1))


def perplexity(model: Any, ids: Sequence[int], *, context: int, windows: int) -> float:
    """exp of the mean loss over the first ``windows`` windows of ``context`` tokens, side by side, in the model's own dtype."""
    tokens = torch.as_tensor(ids, dtype=torch.long)
    count = min(windows, tokens.numel() // context)
    if count < 1:
        raise UsageError(f"{tokens.numel()} tokens of held-out text, one window needs {context}")
    model.eval()

    def total_loss(chunk_NT: torch.Tensor) -> float:
        with torch.no_grad():  # holds for the calling thread only
            return next_token_loss(model, chunk_NT).item() * len(chunk_NT)

    with _side_by_side() as run:
        return math.exp(sum(run(total_loss, tokens[: count * context].view(count, context).split(_EVAL_WINDOWS))) / count)


@contextmanager
def _side_by_side() -> Iterator[Callable[[Callable[[_T], _R], Iterable[_T]], list[_R]]]:
    """A ``map`` over two threads, each with single-threaded operations inside."""
    with single_threaded_blas(), ThreadPoolExecutor(_SHARDS, thread_name_prefix="qlt", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield lambda function, items: list(pool.map(function, items))


def _batches(tokens: torch.Tensor, schedule: Schedule, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of windows without end: each pass cuts the stream at another offset and deals the windows in a new order."""
    dealt: list[torch.Tensor] = []
    while True:
        spare = tokens.numel() - schedule.context
        offset = int(torch.randint(min(schedule.context, spare) + 1, (1,), generator=generator))
        windows = tokens[offset:].unfold(0, schedule.context, schedule.context)
        for index in torch.randperm(len(windows), generator=generator).tolist():
            dealt.append(windows[index])
            if len(dealt) == schedule.batch:
                yield torch.stack(dealt)
                dealt = []


def _load(parameters: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
