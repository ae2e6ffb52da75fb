"""The time of a training step before the run: its arithmetic counted on tensors without content, at the speed of a small sample on this machine.

Counted are matrix products and convolutions by their operations, stored weights by what their decoding takes, and everything between by the bytes of
the tensors that are made, in memory that is fresh. What a busy machine does to a run is not foreseen: the figure tells minutes from hours, not ten
minutes from twenty. Compared once, in CPU seconds of one thread beside other work: 0.85 of the real step (11 M model in bf16 and NF4, 8 x 256 tokens); with
memory that is already warm it was 0.4 to 0.9, see ``benchmarks/LOG.md``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.live.footprint import LiveBytes, empty_tensors, without_content
from qlora_tools.live.frozen import StoredWeight
from qlora_tools.quant.codec import Codec
from qlora_tools.specs import TensorSpec, dtype_of
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.estimate import Subject, empty_base
from qlora_tools.training.order import batches
from qlora_tools.training.rows import Batch
from qlora_tools.verbs.training_data import Data
from qlora_tools.verbs.training_memory import adapter_of, codec_of, compute_dtype

_SIDE = 1024  # of the sample matrix
#: Of the sample tensor: more than glibc keeps in its heap, so that the kernel clears every page, as it does for most of what a step makes.
_FRESH_BYTES = 64 << 20
_SAMPLE_SECONDS = 0.05


def seconds_per_step(
    checkpoint: LogicalCheckpoint, made: Data, config: TrainConfig, ranks: Mapping[str, int], device: str, teacher: LogicalCheckpoint | None
) -> float:
    """About how long one optimizer step of one process would take."""
    dtype, codec = compute_dtype(config, device), codec_of(config)
    batch = made.rows.batch(next(batches(len(made.rows), config.batch, config.seed)))
    model = empty_base(checkpoint, made.task, codec, dtype, made.labels)
    stored = sum(module.spec.numel for module in model.modules() if isinstance(module, StoredWeight) and module.codec is not None)
    flops, size = step_work(adapter_of(checkpoint, made.task, ranks, dtype, teacher)(model, config), batch, device)
    products = flops * _seconds_per_flop(dtype, device, rows=max(1, min(2048, batch.targets.numel())))
    between = size * _seconds_per_byte(dtype, device)
    decoding = 2 * stored * (_seconds_per_weight(codec, dtype, device) if codec is not None else 0.0)  # forward and backward
    again = 4 / 3 if config.checkpointing == "on" else 1.0
    return config.accum * again * (products + decoding + between)


class _Made(LiveBytes):
    """Also: the bytes of all tensors that were ever made."""

    made = 0

    def note(self, tensor: torch.Tensor, label: str | None = None) -> torch.Tensor:
        before = self.total
        super().note(tensor, label)
        self.made += max(0, self.total - before)
        return tensor


def step_work(subject: Subject, batch: Batch, device: str) -> tuple[int, int]:
    """(floating-point operations of the products, bytes of the tensors made) in a forward and backward pass. ``subject`` is of no further use."""
    batch = batch.to(device)
    with without_content():
        for part in (subject.model, *subject.companions):
            empty_tensors(part, device)
        subject.model.train()
        with _Made("step") as made, FlopCounterMode(display=False) as counter:
            total, _ = subject.loss(subject.model, batch)
            total.backward()
    return int(counter.get_total_flops()), made.made


def _seconds_per_byte(dtype: torch.dtype, device: str) -> float:
    values = torch.ones(_FRESH_BYTES // dtype.itemsize, dtype=dtype, device=device)
    return _seconds(lambda: values * 2, device) / values.nbytes


def _seconds_per_flop(dtype: torch.dtype, device: str, rows: int) -> float:
    x, weight = torch.ones(rows, _SIDE, dtype=dtype, device=device), torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    return _seconds(lambda: x @ weight, device) / (2 * rows * _SIDE * _SIDE)


def _seconds_per_weight(codec: Codec, dtype: torch.dtype, device: str) -> float:
    weight = torch.linspace(-1, 1, _SIDE * _SIDE, device=device).view(_SIDE, _SIDE).to(dtype)
    spec = TensorSpec("sample.weight", dtype_of(dtype).name, (_SIDE, _SIDE))
    return _seconds(StoredWeight(codec, spec, codec.encode(spec, weight)).to(device).dense, device) / weight.numel()


def _seconds(work: Callable[[], torch.Tensor], device: str) -> float:
    """Mean time of ``work`` once it is warm."""
    work()
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < _SAMPLE_SECONDS:
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        count += 1
    return passed / count
