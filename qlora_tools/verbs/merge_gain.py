"""How much of what an adapter gained a merged checkpoint keeps, end to end, on a text.

log(ppl_base / ppl_merged) / log(ppl_base / ppl_unmerged): the base as it was merged into, the base with its adapters beside it, and the
stored result, which is read back as anybody would read it. All three compute in fp32 on the CPU and in bf16 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.engine.plan import Source
from qlora_tools.live.base import Base, load_base
from qlora_tools.live.frozen import FrozenConv1D, FrozenConv2d, FrozenLinear
from qlora_tools.progress import Progress
from qlora_tools.quality.intervals import retention_interval
from qlora_tools.quality.perplexity import Perplexity, perplexity
from qlora_tools.quant.floats import judging_dtype
from qlora_tools.verbs.merging import Merged, open_merged
from qlora_tools.verbs.reading import read_text

TOKENS, CONTEXT = 16_384, 256


@dataclass(frozen=True)
class Gain:
    """``kept`` is ``None`` where the adapter gains nothing on this text. ``ci95``: bootstrap over windows. ``with_branch``: the share kept with the branch
    of ``--method residual`` on."""

    text: str
    n_tokens: int
    ppl_base: float
    ppl_unmerged: float
    ppl_merged: float
    kept: float | None
    ci95: tuple[float, float] | None
    with_branch: float | None = None


def gain_kept(
    merged: Merged,
    stored: Path,
    text: str | Path,
    *,
    branch: Path | None = None,
    device: str = "cpu",
    progress: Progress,
) -> Gain:
    """Judge the checkpoint ``stored``, made of ``merged``.

    Raises:
        UsageError: too short a text. MissingError: no tokenizer beside the base.
    """
    reading = read_text(merged.checkpoint.folder, Path(text), tokens=TOKENS, context=CONTEXT)
    dtype = judging_dtype(device)

    def judge(base: Base, title: str) -> Perplexity:
        return perplexity(_logits(base.model, device), reading.windows, progress=progress, title=title)

    codec = merged.checkpoint.codec or merged.simulated
    model = load_base(merged.checkpoint, "language", codec, dtype=dtype, device=device, progress=progress)
    base = judge(model, "eval base")
    place(model, merged.source, merged.source.changed, untied=merged.source.untied)
    unmerged = judge(model, "eval unmerged")
    result = open_checkpoint(stored)
    model = load_base(result, "language", result.codec, dtype=dtype, device=device, progress=progress)
    found = judge(model, "eval merged")
    sidewise = None
    if branch is not None:
        beside = open_merged(stored, [(branch, 1.0)], None, result.codec or codec, progress)  # type: ignore[arg-type]
        place(model, beside.source, beside.source.changed)
        sidewise = judge(model, "eval with branch")
    kept, interval = _kept(base, unmerged, found)
    return Gain(
        text=reading.corpus.name,
        n_tokens=base.n_tokens,
        ppl_base=base.value,
        ppl_unmerged=unmerged.value,
        ppl_merged=found.value,
        kept=kept,
        ci95=interval,
        with_branch=None if sidewise is None else _kept(base, unmerged, sidewise)[0],
    )


def _kept(base: Perplexity, unmerged: Perplexity, found: Perplexity) -> tuple[float | None, tuple[float, float] | None]:
    if not unmerged.value < base.value:
        return None, None
    interval = retention_interval(base.nll, unmerged.nll, found.nll)
    return interval.value, None if interval.low is None or interval.high is None else (interval.low, interval.high)


def _logits(model: Any, device: str) -> Callable[[np.ndarray[Any, Any]], Any]:
    @torch.inference_mode()
    def logits(ids_T: np.ndarray[Any, Any]) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=torch.from_numpy(ids_T)[None].to(device), use_cache=False).logits[0]
        return found.float().cpu()

    return logits


@torch.no_grad()
def place(base: Base, source: Source, names: Collection[str], untied: Collection[str] = (), *, oriented: bool = False) -> None:
    """Put the tensors ``names`` of ``source`` into a loaded model, dense. ``untied``: names that no longer share their owner's values. ``oriented``:
    the source has all weights as [out, in]."""
    family = base.checkpoint.family
    for path, owner in base.tensor_of.items():
        name = f"{path}.weight" if f"{path}.weight" in untied else owner
        module = base.model.get_submodule(path)
        if name in names:
            turned = not oriented and family.stores_inputs_first(name, source.specs[name].shape)
            _put(module, "weight", source.read(name), turn=turned, alone=name in untied)
        if f"{path}.bias" in names:
            _put(module, "bias", source.read(f"{path}.bias"))


def _put(module: nn.Module, leaf: str, value: torch.Tensor, *, turn: bool = False, alone: bool = False) -> None:
    """``value`` as a tensor of ``module``; modules that share it follow unless ``alone``."""
    if leaf == "weight" and isinstance(module, FrozenLinear | FrozenConv1D | FrozenConv2d):
        module.hold_dense(value.T if turn else value)
        return
    parameter: Any = getattr(module, leaf)
    fresh = value.to(parameter.device, parameter.dtype)
    if alone:
        module._parameters[leaf] = nn.Parameter(fresh, requires_grad=False)
    else:
        parameter.data = fresh
