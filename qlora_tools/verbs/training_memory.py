"""The memory estimate of a run, from headers and data: the same adapter, loss and largest batch as the run's, on tensors without content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.floats import native_dtype
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.estimate import Estimate, Subject, empty_base, estimator
from qlora_tools.training.fused import fuse
from qlora_tools.training.lora import inject
from qlora_tools.training.loss import LanguageLoss, label_loss
from qlora_tools.training.merge_aware import Rounding, quantize_in_forward, round_trip
from qlora_tools.verbs.quantize import base_codec
from qlora_tools.verbs.training_data import Data

TASK_TYPES = {"language": "CAUSAL_LM", "classification": "SEQ_CLS", "image": None}


def codec_of(config: TrainConfig) -> Codec | None:
    """How the base is held; ``None``: dense."""
    return None if config.merge_aware else quantizer_of(config)


def quantizer_of(config: TrainConfig) -> Codec | None:
    """The format that the config names."""
    return base_codec(config.base_format, block_size=config.block_size, double_quant=config.double_quant)


def settle_forward(model: Any, config: TrainConfig, rounding: Rounding | None = None) -> None:
    """How the adapter's layers compute: fused, or with ``merge_aware`` through the quantizer (or a stand-in for it)."""
    if not config.merge_aware:
        fuse(model)
        return
    codec = quantizer_of(config)
    assert codec is not None, config.base_format
    quantize_in_forward(model, rounding or round_trip(codec))


def compute_dtype(config: TrainConfig, device: str) -> torch.dtype:
    """bf16, or fp32 where it is asked for or where the processor multiplies bf16 by emulation."""
    if config.compute != "auto":
        return torch.bfloat16 if config.compute == "bf16" else torch.float32
    return torch.bfloat16 if device.startswith("cuda") else native_dtype()


def heads_of(model: nn.Module, checkpoint: LogicalCheckpoint, task: str) -> Iterable[str]:
    """The task's own head, which is trained whole: linears with the family's role of a head. Language models keep theirs."""
    if task == "language":
        return ()
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and checkpoint.family.role(path) == "head"]


def adapter_of(
    checkpoint: LogicalCheckpoint, task: str, ranks: Mapping[str, int], dtype: torch.dtype, teacher: LogicalCheckpoint | None
) -> Callable[[nn.Module, TrainConfig], Subject]:
    """What makes an empty base the subject of a step, as the run does."""

    def adapt(model: nn.Module, chosen: TrainConfig) -> Subject:
        heads = heads_of(model, checkpoint, task)
        adapted = inject(model, ranks, chosen, TASK_TYPES[task], heads=heads, originals=lambda path: torch.empty(0), dtype=dtype)
        settle_forward(adapted, chosen, rounding=lambda path, dense_OI: dense_OI)
        if task != "language":
            return Subject(adapted, label_loss)
        if teacher is None:
            return Subject(adapted, LanguageLoss(model))
        guide = empty_base(teacher, "language", teacher.codec, dtype)
        loss = LanguageLoss(model, teacher=guide, teacher_weight=chosen.teacher_weight, temperature=chosen.temperature)
        return Subject(adapted, loss, (guide,))

    return adapt


def estimate_run(
    checkpoint: LogicalCheckpoint, made: Data, config: TrainConfig, ranks: Mapping[str, int], device: str, teacher: LogicalCheckpoint | None
) -> Estimate:
    """Peak memory of the run that these would start."""
    dtype = compute_dtype(config, device)
    adapt = adapter_of(checkpoint, made.task, ranks, dtype, teacher)
    batch = made.rows.batch([made.rows.longest()] * config.batch)
    return estimator(checkpoint, made.task, batch, config, adapt=adapt, codec_of=codec_of, dtype=dtype, device=device, labels=made.labels).estimate()
