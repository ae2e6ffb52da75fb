"""How far adapters on a base leave it from the tuned model: KL on held-out text, all candidates in one pass.

Windows go through the teacher once and through the student once per candidate; logits live for one batch. The student is the base as the adapter
will find it, decoded from its codec, with the candidates put on by PEFT.

Axes: N windows, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.live.base import load_base
from qlora_tools.progress import Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.floats import judging_dtype

_BATCH_TOKENS = 1024
TOKENS, CONTEXT = 32_768, 256
#: The name of no adapter: the student alone.
BARE = ""


@dataclass(frozen=True)
class Scores:
    """Sums over the tokens of each window that are predicted: KL(tuned || candidate) and the negative log-likelihood of the text, in nats."""

    tokens: tuple[int, ...]
    kl: tuple[float, ...]
    nll: tuple[float, ...]


def judge(
    base: LogicalCheckpoint,
    tuned: LogicalCheckpoint,
    adapters: Mapping[str, Path],
    codec: Codec | None,
    text: str | Path,
    *,
    device: str,
    progress: Progress,
) -> dict[str, Scores]:
    """``base`` in ``codec`` with each of ``adapters``, on the held-out windows of ``text`` (a file, ``self`` or ``builtin``)."""
    from qlora_tools.verbs.calibrate import windows_for

    windows = windows_for(tuned, text, tokens=TOKENS, context=CONTEXT, device=device, progress=progress)
    return judge_windows(base, tuned, adapters, codec, windows.held_out_NL, device=device, progress=progress)


def judge_windows(
    base: LogicalCheckpoint,
    tuned: LogicalCheckpoint,
    adapters: Mapping[str, Path],
    codec: Codec | None,
    windows_NL: torch.Tensor,
    *,
    device: str,
    progress: Progress,
    bare: bool = False,
) -> dict[str, Scores]:
    """The same on given windows, i64; ``bare``: and the base without an adapter, under :data:`BARE`."""
    from peft import PeftModel

    dtype = judging_dtype(device)
    teacher = load_base(tuned, "language", None, dtype=dtype, device=device, progress=progress).model
    student: Any = load_base(base, "language", codec, dtype=dtype, device=device, progress=progress).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, folder in adapters.items():
            if isinstance(student, PeftModel):
                student.load_adapter(str(folder), adapter_name=name, torch_device=device)
            else:
                student = PeftModel.from_pretrained(student, str(folder), adapter_name=name, torch_device=device)
    student.eval()
    return _scores(teacher, student, [*adapters, *([BARE] if bare else [])], windows_NL, device, progress)


@torch.no_grad()
def _scores(teacher: Any, student: Any, names: list[str], windows_NL: torch.Tensor, device: str, progress: Progress) -> dict[str, Scores]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with progress.task("judge", len(windows_NL), "windows") as task:
        for batch_NL in windows_NL.split(max(1, _BATCH_TOKENS // windows_NL.shape[1])):
            ids_NL = batch_NL.to(device)
            wanted_NLV = _log_probabilities(teacher, ids_NL)
            for name in names:
                if name != BARE:
                    student.set_adapter(name)
                with student.disable_adapter() if name == BARE and names != [BARE] else nullcontext():
                    log_q_NLV = _log_probabilities(student, ids_NL)
                kl_N = (wanted_NLV.exp() * (wanted_NLV - log_q_NLV)).sum(dim=(1, 2), dtype=torch.float64)
                nll_N = -log_q_NLV.gather(-1, ids_NL[:, 1:, None]).sum(dim=(1, 2), dtype=torch.float64)
                found[name].extend(zip(kl_N.clamp(min=0.0).tolist(), nll_N.tolist(), strict=True))
            task.advance(len(batch_NL))
    tokens = (windows_NL.shape[1] - 1,) * len(windows_NL)
    return {name: Scores(tokens, tuple(kl for kl, _ in sums), tuple(nll for _, nll in sums)) for name, sums in found.items()}


def _log_probabilities(model: Any, ids_NL: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, [N, L - 1, V] in fp32."""
    logits: torch.Tensor = model(input_ids=ids_NL, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)
