"""Texts that are put through a model, as windows of tokens, and which of them are held out.

Calibration and distillation learn from plain text in windows of one length, without padding and without labels. Every
``HELD_OUT_EVERY``-th window is never learnt from: what was learnt is judged on those. Left out: perplexity's own windows
(``quality/corpus.py``) and training examples with masks (``training/``).

Axes: N windows, L tokens of a window.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.errors import UsageError
from qlora_tools.live.tokenizer import read_utf8

#: One window in so many judges; the others teach.
HELD_OUT_EVERY = 5
_FEWEST_WINDOWS = 2


@dataclass(frozen=True, eq=False)
class TextWindows:
    """``learn_NL`` and ``held_out_NL``: i64 token ids. ``name`` and ``sha256`` say what text they are of, for manifests."""

    learn_NL: torch.Tensor
    held_out_NL: torch.Tensor
    name: str
    sha256: str

    @property
    def length(self) -> int:
        return self.learn_NL.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens that teach."""
        return self.learn_NL.numel()


def read_windows(path: Path, tokenizer: Any, *, length: int, count: int | None = None) -> TextWindows:
    """Disjoint windows of ``length`` tokens of a text file, ``count`` of them evenly spaced over it (``None``: all).

    Raises:
        UsageError: too short a text. And what :func:`read_utf8` raises.
    """
    ids = tokenizer(read_utf8(path), add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // length
    if whole < _FEWEST_WINDOWS:
        raise UsageError(
            f"{path} has {len(ids)} tokens, fewer than {_FEWEST_WINDOWS} windows of {length}", hint="give a longer text, or fewer tokens per window"
        )
    windows_NL = torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)
    if count is not None and count < whole:
        windows_NL = evenly(windows_NL, max(count, _FEWEST_WINDOWS))
    return split_windows(windows_NL, path.name)


def evenly(windows_NL: torch.Tensor, most: int) -> torch.Tensor:
    """At most ``most`` of the windows, evenly spaced, the first and the last among them."""
    return windows_NL[torch.linspace(0, len(windows_NL) - 1, min(most, len(windows_NL))).round().long()]


def split_windows(windows_NL: torch.Tensor, name: str) -> TextWindows:
    """Windows i64 [N, L], N at least 2, parted into those that teach and those that judge."""
    held_out = torch.arange(len(windows_NL)) % HELD_OUT_EVERY == min(HELD_OUT_EVERY, len(windows_NL)) - 1
    digest = hashlib.sha256(windows_NL.numpy().tobytes()).hexdigest()
    return TextWindows(windows_NL[~held_out], windows_NL[held_out], name, digest)
