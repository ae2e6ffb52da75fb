"""``qlt refine --by-block``: the refinement of models of which only a block at a time fits in memory.

Owns where text, weights and hidden states come from and what memory that takes; the walk is ``training/distill_blocks.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.adapters.adapter import Adapter
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.base import build_empty
from qlora_tools.live.parking import BUDGET_BYTES, Parking
from qlora_tools.live.text import TextWindows
from qlora_tools.live.weights import Weights, reaches_outside, stops_of
from qlora_tools.progress import Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.training.allocator import resident_bytes
from qlora_tools.training.block_journal import BlockJournal
from qlora_tools.training.distill_blocks import LOGITS_BYTES, BlocksDistilled, distill_blocks
from qlora_tools.training.distill_config import RefineConfig
from qlora_tools.training.student_blocks import Student

_ACTIVATIONS = 48  # values kept per position and unit of hidden width while a block learns, roughly
_FP32_BYTES = 4


def refine_blocks(
    adapter: Adapter,
    base: LogicalCheckpoint,
    teacher: LogicalCheckpoint,
    codec: Codec | None,
    text: TextWindows,
    config: RefineConfig,
    *,
    folder: Path,
    dtype: torch.dtype,
    device: str,
    tidy: Callable[[], Any],
    progress: Progress,
) -> tuple[BlocksDistilled, Mapping[str, torch.Tensor]]:
    """What came of it, and the learnt tensors by their key in the adapter's file (none where the start was kept). ``folder``: the run's, for what
    finished blocks learnt, and for hidden states that memory has no room for.

    Raises:
        UnsupportedError: DoRA, convolutions, or a base that transformers renames while loading. And what :func:`distill_blocks` raises.
    """
    student = Student(base, adapter, codec, dtype, device, progress)
    guide = Weights(teacher, "language", dtype, device, progress)
    try:
        made = distill_blocks(guide, student, text, config, Parking(folder), journal=BlockJournal(folder), tidy=tidy, progress=progress)
    except RuntimeError as error:
        if not reaches_outside(error):
            raise
        raise UnsupportedError(f"{base.folder.name} reaches into its blocks from outside", hint="leave out --by-block") from error
    learnt: dict[str, torch.Tensor] = {}
    if not made.kept_start:
        for path, factors in made.factors.items():
            learnt |= {part.key: value.to("cpu", part.spec.torch_dtype) for part, value in zip(student.parts(path), factors, strict=True)}
    return made, learnt


def estimate_blocks_bytes(base: LogicalCheckpoint, config: RefineConfig, dtype: torch.dtype, device: str) -> int:
    """Peak memory, from headers and as roughly as activations can be told from them: this program, the largest block twice (as read, as kept) while it
    learns, or both heads, and the hidden states of both models, of which the CPU's are parked beyond a budget."""
    model = build_empty(base, "language", dtype=dtype)
    text = model.config.get_text_config()
    width = int(text.hidden_size)
    sizes = [sum(value.numel() for value in model.get_submodule(path).parameters()) for path in stops_of(model)[0]]
    learning = 2 * max(sizes, default=0) * dtype.itemsize + config.batch * config.length * width * _ACTIVATIONS * _FP32_BYTES
    logits = max(LOGITS_BYTES, config.length * int(text.vocab_size) * _FP32_BYTES)
    heads = 2 * int(text.vocab_size) * width * dtype.itemsize + 3 * logits
    hidden = 3 * (config.steps * config.batch + config.held_out) * config.length * width * dtype.itemsize  # one model's old ones lie beside both's new
    program, parked = (0, hidden) if device.startswith("cuda") else (resident_bytes(), min(hidden, BUDGET_BYTES))
    return int(program + max(learning, heads) + parked)
