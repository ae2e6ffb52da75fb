"""What it takes to write text with a model in memory, found by tracing it without content: a prompt, then one more token behind everything.

The cache is transformers' own, which grows by a copy at every token: what comes and goes with that is in the figure. Left out, as everywhere
in :mod:`qlora_tools.live.footprint`: the kernels' own buffers, and what a device's context takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_tools.live.footprint import LiveBytes, empty_tensors, without_content

_LABEL = "generation"


@dataclass(frozen=True)
class GenerationBytes:
    """``cache``: keys and values of all positions at the end. ``reading``, ``writing``: the highest points of the prompt and of the last token, in all."""

    weights: int
    cache: int
    reading: int
    writing: int


def trace_generation(model: Any, *, batch: int, prompt: int, new: int, device: str) -> GenerationBytes:
    """Live bytes of writing ``new`` tokens behind ``prompt`` ones, for ``batch`` sequences at once.

    The model's tensors are replaced by fake ones, so it is of no further use.
    """
    from transformers import DynamicCache

    live = LiveBytes(_LABEL)
    with torch.no_grad(), without_content():
        empty_tensors(model, device)
        for tensor in [*model.parameters(), *model.buffers()]:
            live.note(tensor.detach())
        weights = live.total
        cache: Any = DynamicCache(config=model.config)
        peaks = []
        with live:
            for length in (prompt, new - 1, 1):
                live.peak = live.total
                if length:
                    ids = torch.ones((batch, length), dtype=torch.int64, device=device)
                    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                peaks.append(live.peak)
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)
    return GenerationBytes(weights, held, peaks[0], peaks[2])
