"""One small training loop, for training from scratch and for fine-tuning; bounded by steps, not by the clock.

The network computes in bf16 where the processor multiplies bf16 natively, otherwise in fp32; the weights that
the optimizer moves are fp32 either way. The same seed, thread count and processor give the same weights.
Left out on purpose: gradient accumulation, resuming, several devices. A run is a minute long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from qlora_tools.demo.optimizer import optimizer_step
from qlora_tools.errors import NonFiniteError, UsageError
from qlora_tools.progress import SILENT, Progress

_MAX_GRAD_NORM = 1.0
_SMOOTHING = 0.95
_EVAL_WINDOWS = 8  # windows per forward pass


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


def compute_dtype() -> torch.dtype:
    """bf16 where this processor has instructions for it (AMX, AVX512-BF16, Arm bf16), else fp32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16"))
    return torch.bfloat16 if native else torch.float32


def train(model: Any, ids: Sequence[int], schedule: Schedule, *, seed: int, title: str, progress: Progress = SILENT, dtype: torch.dtype | None = None) -> float:
    """Train the causal language model ``model`` in place on the token stream ``ids``; leaves it in fp32.

    Returns the smoothed training loss at the end, in nats per token.

    Raises:
        UsageError: fewer tokens than one window. NonFiniteError: the loss stopped being a number.
    """
    dtype = dtype or compute_dtype()
    tokens = torch.as_tensor(ids, dtype=torch.long)
    if tokens.numel() < schedule.context + 1:
        raise UsageError(f"{tokens.numel()} tokens of training text, one window needs {schedule.context + 1}")
    named = [(name, parameter.detach().float().clone()) for name, parameter in model.named_parameters()]
    weights = [tensor for _, tensor in named]
    model.to(dtype).train()
    parameters = list(model.parameters())
    _load(parameters, weights)
    step = optimizer_step(named, kind=schedule.kind, rate=schedule.rate, matrix_rate=schedule.matrix_rate, dtype=dtype)
    batches = _batches(tokens, schedule, torch.Generator().manual_seed(seed))
    smooth = math.log(model.config.vocab_size)
    with progress.task(title, schedule.steps, "steps") as task:
        for index, batch in zip(range(schedule.steps), batches, strict=False):
            loss = next_token_loss(model, batch)
            if not math.isfinite(loss.item()):
                raise NonFiniteError(f"{title}: the loss is {loss.item()} at step {index + 1}", hint="lower the learning rate")
            loss.backward()
            for weight, parameter in zip(weights, parameters, strict=True):
                weight.grad = parameter.grad.float()
                parameter.grad = None
            torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)
            step(schedule.factor(index))
            _load(parameters, weights)
            smooth += (1 - min(_SMOOTHING, (index + 1) / (index + 10))) * (loss.item() - smooth)
            task.advance(1, f"perplexity {math.exp(smooth):.0f}")
    model.float().eval()
    _load(list(model.parameters()), weights)
    return smooth


def next_token_loss(model: Any, windows_NT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of tokens 2..T of each window, given those before; the softmax is fp32."""
    logits = model(input_ids=windows_NT, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), windows_NT[:, 1:].reshape(-1))


@torch.no_grad()
def perplexity(model: Any, ids: Sequence[int], *, context: int, windows: int) -> float:
    """exp of the mean loss over the first ``windows`` windows of ``context`` tokens, side by side, in the model's own dtype."""
    tokens = torch.as_tensor(ids, dtype=torch.long)
    count = min(windows, tokens.numel() // context)
    if count < 1:
        raise UsageError(f"{tokens.numel()} tokens of held-out text, one window needs {context}")
    model.eval()
    total = 0.0
    for chunk in tokens[: count * context].view(count, context).split(_EVAL_WINDOWS):
        total += next_token_loss(model, chunk).item() * len(chunk)
    return math.exp(total / count)


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
