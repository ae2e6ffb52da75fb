"""Text that a model writes itself, where no text of its domain is at hand: to calibrate with, and to distil from.

Windows are sampled token by token, many at once, over the model's own cache of keys and values. One uniform number per token, drawn on the
CPU from the seed, picks it from the cumulated distribution; so a window depends on its number, the seed and the model, and on how many are
written at once only through the rounding of matrix products. Sampling does not stop at an end of text: what follows is the model's text, too.

Axes: N windows, L tokens of a window, S starts, P tokens of a start, B windows written at once, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_tools.errors import NonFiniteError, UsageError
from qlora_tools.live.text import TextWindows, split_windows
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.progress import SILENT, Progress

#: Keys and values of the windows written at once, and their distributions in fp64, take no more than this.
CACHE_BYTES = 256 << 20
MOST_AT_ONCE = 128
_DISTRIBUTION_BYTES = 128 << 20
_FP64_BYTES = 8


@torch.no_grad()
def self_windows(
    model: Any, *, start_ids: torch.Tensor, windows: int, length: int, seed: int, temperature: float = 1.0, progress: Progress = SILENT
) -> torch.Tensor:
    """i64 [N, L] on the CPU: ``windows`` texts of ``length`` tokens by ``model``, a causal language model of transformers in eval mode.

    ``start_ids``: i64 [S], or [S, P] with P < L: what windows begin with, one of them each, in a shuffled order that repeats.

    Raises:
        UsageError: no start, or starts that fill the window. NonFiniteError: the model's logits are not numbers.
    """
    starts_SP = start_ids[:, None] if start_ids.ndim == 1 else start_ids
    if not starts_SP.numel() or starts_SP.shape[1] >= length:
        raise UsageError(f"starts of {list(starts_SP.shape)} tokens for windows of {length}", hint="give shorter starts, or longer windows")
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-windows // len(starts_SP))
    chosen_N = torch.cat([torch.randperm(len(starts_SP), generator=generator) for _ in range(rounds)])[:windows]
    shares_NL = torch.rand(windows, length, generator=generator, dtype=torch.float64)
    written_NL = torch.empty(windows, length, dtype=torch.int64)
    written_NL[:, : starts_SP.shape[1]] = starts_SP[chosen_N]
    at_once = windows_at_once(model, length)
    with progress.task("write text", windows * length, "tokens") as task:
        for first in range(0, windows, at_once):
            part = slice(first, first + at_once)
            _write(model, written_NL[part], starts_SP.shape[1], shares_NL[part], temperature)
            task.advance(written_NL[part].numel())
    return written_NL


def written_by(model: Any, folder: Path, *, windows: int, length: int, seed: int, temperature: float = 1.0, progress: Progress = SILENT) -> TextWindows:
    """What ``model``, whose tokenizer lies in ``folder``, writes by itself, parted into windows that teach and windows that judge."""
    starts = start_ids(model, open_tokenizer(folder))
    written_NL = self_windows(model, start_ids=starts, windows=windows, length=length, seed=seed, temperature=temperature, progress=progress)
    return split_windows(written_NL, "self")


def start_ids(model: Any, tokenizer: Any) -> torch.Tensor:
    """i64 [S]: what a model begins its own texts with: the token that its tokenizer puts before every text, else any ordinary one.

    A beginning of text that training never saw there would make strange texts; drawn tokens make varied ones.
    """
    encoded, special = tokenizer("a")["input_ids"], set(tokenizer.all_special_ids)
    if tokenizer.bos_token_id is not None and encoded[:1] == [tokenizer.bos_token_id]:
        return torch.tensor([tokenizer.bos_token_id])
    width = min(len(tokenizer), model.config.get_text_config().vocab_size)
    return torch.tensor([number for number in range(width) if number not in special] or [0])


def windows_at_once(model: Any, length: int) -> int:
    """How many windows of ``length`` tokens are written together within :data:`CACHE_BYTES`."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    hidden = getattr(config, "hidden_size", None) or 1
    width = (getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or hidden // heads)
    per_window = 2 * (getattr(config, "num_hidden_layers", None) or 1) * width * length * model.dtype.itemsize
    return int(max(1, min(MOST_AT_ONCE, CACHE_BYTES // per_window, _DISTRIBUTION_BYTES // (_FP64_BYTES * config.vocab_size))))


def _write(model: Any, ids_BL: torch.Tensor, known: int, shares_BL: torch.Tensor, temperature: float) -> None:
    """Fill ``ids_BL`` from column ``known`` on, in place."""
    device = model.get_input_embeddings().weight.device
    cache, fed = None, 0
    for column in range(known, ids_BL.shape[1]):
        seen = model(input_ids=ids_BL[:, fed:column].to(device), past_key_values=cache, use_cache=True)
        cache, fed = seen.past_key_values, column
        ids_BL[:, column] = draw(seen.logits[:, -1], shares_BL[:, column].to(device), temperature).cpu()


def draw(logits_BV: torch.Tensor, shares_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """Token ids i64 [B]: the first at which the cumulated softmax exceeds ``shares_B``, fp64 in [0, 1).

    Raises:
        NonFiniteError: NaN or infinity among the logits' probabilities.
    """
    cumulated_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).double().cumsum(-1)
    whole_B1 = cumulated_BV[:, -1:]
    if not bool(torch.isfinite(whole_B1).all()):
        raise NonFiniteError("the model predicts NaN or infinity while it writes text", hint="check the model's weights, or compute in fp32")
    return torch.searchsorted(cumulated_BV, shares_B[:, None] * whole_B1, right=True).clamp_(max=logits_BV.shape[-1] - 1)[:, 0]
