"""The memory of a training run before it starts, part by part, and what would need less.

The run's own step is traced without weights (``footprint.py``): the base in its stored form, the adapter as PEFT injects it, the fused layers,
the loss in chunks, gradient checkpointing, the masters and the optimizer. So the figure follows whatever the code does, for any kind of
model, with no formula per architecture to keep up to date. Only what no dispatcher sees is added: the process as it stands after
a rehearsal of the codec's kernels (CPU), and a measured share for the allocator and the kernels' own buffers.

On the CPU the total is comparable with the peak of the resident set (``VmHWM``), on CUDA with the allocator's peak. On the CPU it
holds for a heap that is looked after as ``allocator.py`` does; what glibc keeps in its holes nevertheless is a measured share.

Left out: memory that is needed only while the base is loaded (one dense tensor at a time), evaluation, and sampling.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.live.base import build_empty, freezes
from qlora_tools.live.footprint import LiveBytes, empty_tensors, without_content
from qlora_tools.live.frozen import StoredWeight, freeze_layer
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.floats import TILE_ELEMENTS
from qlora_tools.specs import TensorSpec, dtype_of
from qlora_tools.training.allocator import available_bytes, resident_bytes
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.loss import IGNORED, Loss
from qlora_tools.training.optimizers import Masters, make_optimizer
from qlora_tools.training.rows import Batch

WEIGHTS, ADAPTER, MASTERS, GRADIENTS, OPTIMIZER = "base weights", "adapter", "adapter in fp32", "summed gradients", "optimizer"
ACTIVATIONS, LOGITS, DECODED, PROCESS, SLACK = "activations", "logits and loss", "decoded weight", "process", "allocator and kernels"
_ORDER = (PROCESS, WEIGHTS, ADAPTER, MASTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS, DECODED, SLACK)
#: What the allocator and the kernels' own buffers took beyond live tensors: share of everything that comes and goes, and a constant.
_SLACK_SHARE = {"cpu": 0.35, "cuda": 0.03}
_SLACK_BYTES = {"cpu": 24 << 20, "cuda": 32 << 20}
#: Copies of the largest factor of a product that the CPU's kernels hold: one for the forward pass and one for the backward.
_FACTOR_COPIES = {"cpu": 2, "cuda": 0}
#: A run that is estimated above this share of what is free gets gradient checkpointing.
_FILL = 0.85
#: How long a user who ran out of memory waits for the next idea.
_PATIENCE_SECONDS = 20.0
#: bitsandbytes keeps moments of smaller tensors in fp32, and one fp32 maximum for each block of 256 values of the others.
_LEAST_8BIT, _BLOCK_8BIT = 4096, 256


@dataclass(frozen=True, eq=False)
class Subject:
    """What a step runs, on ``meta``: the model with its adapter in place, the loss made for it, and models that the loss runs besides (a teacher)."""

    model: nn.Module
    loss: Loss
    companions: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """Peak memory in bytes by part. ``device``: ``cpu`` (resident set) or ``cuda`` (the allocator's view)."""

    device: str
    parts: tuple[tuple[str, int], ...]
    checkpointing: bool
    estimator: InitVar[Estimator | None] = None

    def __post_init__(self, estimator: Estimator | None) -> None:
        object.__setattr__(self, "_estimator", estimator)  # no field: records are written as JSON, and this one holds a batch

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size in self.parts)

    def rows(self) -> list[tuple[str, int]]:
        """(part, bytes) of every part that takes any."""
        return [(name, size) for name, size in self.parts if size]

    def alternatives(self, progress: Progress = SILENT) -> list[tuple[str, int]]:
        """(change, total bytes with it) of what needs less than this, least first. Each is traced like the run itself.

        Large models take seconds for each: after :data:`_PATIENCE_SECONDS` no further one is begun.
        """
        estimator: Estimator | None = self._estimator  # type: ignore[attr-defined]
        return estimator.less_than(self, progress) if estimator is not None else []


@dataclass(frozen=True)
class Estimator:
    """Estimates one run under variations of its config. ``batch``: the largest micro-batch, as the rows give it."""

    build: Callable[[TrainConfig], Subject]
    batch: Batch
    config: TrainConfig
    device: str

    def estimate(self) -> Estimate:
        """With gradient checkpointing as the config says; ``auto``: on where the run would not fit without."""
        if self.config.checkpointing != "auto":
            return self.of(self.config.checkpointing == "on")
        held = dict(self._plain.parts)[PROCESS]
        return self.of(self.choose_checkpointing(held + available_bytes(self.device)))

    def choose_checkpointing(self, limit_bytes: int) -> bool:
        """Whether the run needs gradient checkpointing to stay below most of ``limit_bytes``, what the process may grow to in all."""
        return self._plain.total_bytes > _FILL * limit_bytes

    def of(self, checkpointing: bool) -> Estimate:
        """With or without gradient checkpointing."""
        return self._plain if not checkpointing else self._traced(self.config, self.batch, True)

    @cached_property
    def _plain(self) -> Estimate:
        return self._traced(self.config, self.batch, False)

    def _traced(self, config: TrainConfig, batch: Batch, checkpointing: bool) -> Estimate:
        subject = self.build(config)
        checkpointing = checkpointing and can_checkpoint(subject.model)
        live = trace_step(subject, batch, config, device=traced_on(self.device), checkpointing=checkpointing)
        return Estimate(self.device, _parts(live, self.device, self.process_bytes), checkpointing, self)

    @cached_property
    def process_bytes(self) -> int:
        """What the process holds besides the run, on the CPU. Looked up after the first trace, whose own imports stay."""
        return 0 if self.device.startswith("cuda") else resident_bytes()

    def less_than(self, found: Estimate, progress: Progress = SILENT) -> list[tuple[str, int]]:
        """See :meth:`Estimate.alternatives`."""
        config, batch, checkpointing = self.config, self.batch, found.checkpointing
        tried: list[tuple[str, TrainConfig, Batch, bool]] = []
        if not checkpointing:
            tried.append(("--checkpointing on", config, batch, True))
        if len(batch.targets) > 1:
            half = (len(batch.targets) + 1) // 2
            words = f"--batch {half} --accum {config.accum * 2}" if len(batch.targets) % 2 == 0 else f"--batch {half}"
            tried.append((words, replace(config, batch=half), first_rows(batch, half), checkpointing))
        shorter = first_positions(batch)
        if shorter is not None:
            tried.append((f"--max-len {shorter.targets.shape[1] if shorter.targets.ndim > 1 else _length(shorter)}", config, shorter, checkpointing))
        if config.base_format != "nf4":
            tried.append(("--nf4", replace(config, base_format="nf4"), batch, checkpointing))
        if self.device.startswith("cuda") and config.optim == "adamw":
            tried.append(("--optim adamw8bit", replace(config, optim="adamw8bit"), batch, checkpointing))
        sizes: list[tuple[str, int]] = []
        began = time.monotonic()
        with progress.task("what would need less", len(tried), "estimates") as task:
            for words, other, rows, checked in tried:
                if time.monotonic() - began < _PATIENCE_SECONDS:
                    sizes.append((words, self._traced(other, rows, checked).total_bytes))
                task.advance(1, words)
        return sorted((pair for pair in sizes if pair[1] < found.total_bytes), key=lambda pair: pair[1])


def traced_on(device: str) -> str:
    """Where tensors without content are put for a figure of ``device``: small real ones need a device that is there. Sizes are the same."""
    return device if not device.startswith("cuda") or torch.cuda.is_available() else "cpu"


def estimator(
    checkpoint: LogicalCheckpoint,
    task: str,
    batch: Batch,
    config: TrainConfig,
    *,
    adapt: Callable[[nn.Module, TrainConfig], Subject],
    codec_of: Callable[[TrainConfig], Codec | None],
    dtype: torch.dtype,
    device: str,
    labels: tuple[str, ...] = (),
) -> Estimator:
    """The estimator of a run on ``checkpoint``.

    ``adapt``: puts the adapter on an empty base, as the run does, and makes the loss, all on ``meta``; a base format that it cannot
    adapt may raise. ``batch`` is on the CPU, real.
    Call it when everything is imported that the run will import: what the process holds now counts as its own.
    """
    rehearse(codec_of(config), dtype)

    def build(chosen: TrainConfig) -> Subject:
        final = replace(chosen, start_rank=None)  # a rank that grows costs most at its end
        return adapt(empty_base(checkpoint, task, codec_of(final), dtype, labels), final)

    return Estimator(build, batch, config, device)


def empty_base(checkpoint: LogicalCheckpoint, task: str, codec: Codec | None, dtype: torch.dtype, labels: tuple[str, ...] = ()) -> nn.Module:
    """The frozen base as ``load_base`` makes it, on ``meta``: linears in the codec's parts, the rest in ``dtype``."""
    model: nn.Module = build_empty(checkpoint, task, labels, dtype)
    for path, module in list(model.named_modules()):
        if freezes(checkpoint, path, module):
            model.set_submodule(path, freeze_layer(module, _empty_weight(path, module, codec, dtype), _empty_bias(module, dtype)))
    for module in model.modules():  # what a class keeps in fp32 by itself is loaded in `dtype` too
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in module._non_persistent_buffers_set and not isinstance(module, StoredWeight):
                module._buffers[name] = buffer.to("meta", dtype)
    model.tie_weights()  # type: ignore[operator]
    return model.requires_grad_(False)


def can_checkpoint(model: nn.Module) -> bool:
    """Whether transformers knows where to cut this model for gradient checkpointing."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def trace_step(subject: Subject, batch: Batch, config: TrainConfig, *, device: str = "cpu", checkpointing: bool = False) -> LiveBytes:
    """Live bytes by label over a whole training step after the first, when the optimizer's moments are there.

    The tensors of ``subject`` are replaced by fake ones, so it is of no further use.
    """
    model = subject.model
    if checkpointing:
        assert can_checkpoint(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    live = LiveBytes(ACTIVATIONS)
    batch = batch.to(device)
    with without_content(), _labelled(subject, live):
        for part in (model, *subject.companions):
            empty_tensors(part, device)
            offsets = [offset for module in part.modules() if isinstance(offset := getattr(module, "offset", None), LowRank)]
            for tensor in [*part.parameters(), *part.buffers(), *(factor for offset in offsets for factor in (offset.a_RI, offset.b_OR))]:
                live.note(tensor.detach(), ADAPTER if tensor.requires_grad else WEIGHTS)
        with live:
            masters, optimizer = _with_optimizer(model, config, live)
            model.train()
            total, _ = subject.loss(model, batch)
            with live.under(ACTIVATIONS):
                (total / max(1, batch.count)).backward()
                masters.gather()
    del optimizer  # its moments had to live until here
    return live


def _with_optimizer(model: nn.Module, config: TrainConfig, live: LiveBytes) -> tuple[Masters, Any]:
    """Masters, gradients and moments; torch's optimizer makes a step, so that what it needs in passing is seen too."""
    with live.under(MASTERS):
        masters = Masters({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    for value in masters.values.values():
        if value.grad is not None:
            live.note(value.grad, GRADIENTS)
    with live.under(OPTIMIZER):
        if config.optim == "adamw":
            held: Any = make_optimizer(masters, config)
            held.step()
        else:
            held = [torch.empty(size, dtype=torch.uint8, device=value.device) for value in masters.values.values() for size in _moments(value, config.optim)]
    masters.clear()
    return masters, held


def _moments(value: torch.Tensor, optim: str) -> tuple[int, int]:
    """Bytes of the two moments of one parameter in an optimizer of bitsandbytes."""
    count = value.numel()
    size = count + 4 * -(-count // _BLOCK_8BIT) if "8bit" in optim and count >= _LEAST_8BIT else 4 * count
    return size, size


@contextmanager
def _labelled(subject: Subject, live: LiveBytes) -> Iterator[None]:
    """Inside the block decoded weights get their label, and what is made between the model's end and the backward pass that of the loss."""

    def decode(stored: StoredWeight) -> torch.Tensor:
        dense = StoredWeight.dense(stored)
        if stored.codec is None:
            return dense
        if stored.codec.name != "nf4":  # tile by tile, through two fp32 tiles
            with live.under(DECODED):
                torch.empty(2 * min(dense.numel(), TILE_ELEMENTS), dtype=torch.float32, device=dense.device)
        return live.note(dense, DECODED)

    def enter(module: nn.Module, inputs: Any) -> None:
        live.label = ACTIVATIONS

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        live.label = LOGITS

    for module in (module for part in (subject.model, *subject.companions) for module in part.modules()):
        if isinstance(module, StoredWeight):
            module.dense = partial(decode, module)  # type: ignore[method-assign]
    handles = [subject.model.register_forward_pre_hook(enter), subject.model.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(live: LiveBytes, device: str, process_bytes: int) -> tuple[tuple[str, int], ...]:
    """The peak by part. Slack is a share of what comes and goes within a step."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    sizes: Counter[str] = Counter(live.at_peak)
    passing = sum(sizes[label] for label in (ACTIVATIONS, LOGITS, DECODED))
    sizes[PROCESS] = process_bytes
    sizes[SLACK] = int(_SLACK_SHARE[kind] * passing) + _SLACK_BYTES[kind] + _FACTOR_COPIES[kind] * live.largest_factor
    return tuple((name, sizes[name]) for name in _ORDER)


def rehearse(codec: Codec | None, dtype: torch.dtype) -> None:
    """Load on a small matrix what the run loads: the codec's kernels, the matrix multiplication's, autograd. Its memory is then in sight."""
    weight = torch.zeros(64, 64, dtype=dtype)
    if codec is not None:
        spec = TensorSpec("rehearsal.weight", dtype_of(dtype).name, (64, 64))
        weight = StoredWeight(codec, spec, codec.encode(spec, weight)).dense()
    inputs = torch.zeros(64, 64, dtype=dtype, requires_grad=True)
    nn.functional.linear(inputs, weight).sum().backward()


def first_rows(batch: Batch, count: int) -> Batch:
    """The first ``count`` rows of a batch."""
    return _cut(batch, lambda value: value[:count])


def first_positions(batch: Batch) -> Batch | None:
    """The first half of the positions of a batch of token ids; ``None`` for other inputs or a single position."""
    ids = batch.inputs.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.shape[1] < 2:
        return None
    length = ids.shape[1]
    return _cut(batch, lambda value: value[:, : length // 2] if value.ndim == 2 and value.shape[1] == length else value)


def _cut(batch: Batch, part: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    targets = part(batch.targets)
    count = int((targets != IGNORED).sum())
    return Batch({name: part(value) for name, value in batch.inputs.items()}, targets, count, batch.tokens * targets.numel() // max(1, batch.targets.numel()))


def _length(batch: Batch) -> int:
    return int(batch.inputs["input_ids"].shape[1])


def _empty_weight(path: str, module: Any, codec: Codec | None, dtype: torch.dtype) -> StoredWeight:
    shape = tuple(module.weight.T.shape if type(module).__name__ == "Conv1D" else module.weight.shape)
    spec = TensorSpec(f"{path}.weight", dtype_of(dtype).name, shape)
    if codec is None or (codec.name == "int8" and len(shape) != 2):
        return StoredWeight(None, spec, {spec.name: torch.empty(shape, dtype=dtype, device="meta")})
    return StoredWeight(codec, spec, {part.name: torch.empty(part.shape, dtype=part.torch_dtype, device="meta") for part in codec.part_specs(spec)})


def _empty_bias(module: Any, dtype: torch.dtype) -> torch.Tensor | None:
    return None if module.bias is None else torch.empty(module.bias.shape, dtype=dtype, device="meta")
