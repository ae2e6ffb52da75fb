"""Statistics of a model over batches of inputs, as a file. Axes: N windows, L tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_tools.calibrate.moments import Moments
from qlora_tools.calibrate.walk import Batch, Walk
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import HELD_OUT, INPUT, MEAN, Origin, Statistics, StatisticsWriter
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.parking import Parking
from qlora_tools.live.text import TextWindows
from qlora_tools.live.weights import Weights, reaches_outside
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.floats import judging_dtype

#: Tokens that go through a block at once.
BATCH_TOKENS = 2048
#: Where labels are drawn, a batch's logits take no more than this, unless a single window's do.
_LOGITS_BYTES = 64 << 20
#: Told of everything that is written: kind, weight, moments.
Observe = Callable[[str, str, Moments], None]


def collect(
    checkpoint: LogicalCheckpoint,
    windows: TextWindows,
    path: Path,
    *,
    fisher: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    observe: Observe = lambda kind, weight, moments: None,
    tidy: Callable[[], Any] = lambda: None,
    progress: Progress = SILENT,
) -> Statistics:
    """Run ``windows`` through the model and write its statistics to ``path``, with those of the output gradients where ``fisher`` asks for them.

    ``seed``: of the labels drawn for these. ``observe`` is called with (kind, weight, moments) of everything that is written,
    ``tidy`` after each block. ``dtype``: what the model computes in; default float32 on the CPU, bfloat16 elsewhere.

    Raises:
        UnsupportedError: transformers has no class for the model. NonFiniteError: NaN on the way.
    """
    vocab = checkpoint.config.get("vocab_size")
    most = min(BATCH_TOKENS, _LOGITS_BYTES // (4 * vocab)) if fisher and isinstance(vocab, int) and vocab > 0 else BATCH_TOKENS
    batches = [*_batches(windows.learn_NL, most, held_out=False), *_batches(windows.held_out_NL, BATCH_TOKENS, held_out=True)]
    return collect_batches(
        checkpoint,
        batches,
        path,
        _task(checkpoint),
        text=(windows.name, windows.sha256),
        fisher=fisher,
        seed=seed,
        device=device,
        dtype=dtype,
        observe=observe,
        tidy=tidy,
        progress=progress,
    )


def _task(checkpoint: LogicalCheckpoint) -> str:
    """The class that runs texts: the language model's, whose head need not be there; for a classifier its own, which needs no other head.

    Raises:
        UnsupportedError: a model of images.
    """
    architecture = str((checkpoint.config.get("architectures") or [""])[0])
    if "Image" in architecture:
        raise UnsupportedError(f"{checkpoint.folder} is a {architecture}, which reads no text", hint="use collect_batches with pixel values")
    return "classification" if architecture.endswith("ForSequenceClassification") else "language"


def _batches(windows_NL: torch.Tensor, most_tokens: int, *, held_out: bool) -> Iterator[Batch]:
    for part_NL in windows_NL.split(max(1, most_tokens // max(1, windows_NL.shape[1]))):
        if len(part_NL):
            yield Batch({"input_ids": part_NL}, held_out=held_out)


def collect_batches(
    checkpoint: LogicalCheckpoint,
    batches: Sequence[Batch],
    path: Path,
    task: str,
    *,
    text: tuple[str, str],
    fisher: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    observe: Observe = lambda kind, weight, moments: None,
    tidy: Callable[[], Any] = lambda: None,
    progress: Progress = SILENT,
) -> Statistics:
    """As :func:`collect`, for any inputs and task. ``text``: name and sha256 of what the inputs are of."""
    dtype = dtype or judging_dtype(device)

    def walk(*, whole: bool) -> Statistics:
        weights = Weights(checkpoint, task, dtype, device, progress, whole=whole)
        file = _File(path, weights, text, observe)
        try:
            route = Walk(weights, batches, file.hand, Parking(path.resolve().parent), fisher_seed=seed if fisher else None, tidy=tidy, progress=progress)
            route.run()
            file.close(route.shared)
        finally:
            file.writer.abort()
        return Statistics(path)

    try:
        return walk(whole=False)
    except RuntimeError as error:
        if not reaches_outside(error):
            raise
        progress.note(f"{checkpoint.folder.name} reaches into its blocks from outside, so the whole model is loaded")
        return walk(whole=True)


class _File:
    """The file of one walk: moments as they come, and what they are of."""

    def __init__(self, path: Path, weights: Weights, text: tuple[str, str], observe: Observe) -> None:
        self.writer = StatisticsWriter(path, len(weights.checkpoint.stored.specs))
        self._weights, self._text, self._observe = weights, text, observe
        self._tokens = {INPUT: 0, HELD_OUT: 0}

    def hand(self, kind: str, weight: str, moments: Moments) -> None:
        """Write one tensor, and its mean where it is of what teaches."""
        self._observe(kind, weight, moments)
        self.writer.add(f"{kind}.{weight}", moments.rows())
        if kind == INPUT:
            self.writer.add(f"{MEAN}.{weight}", [moments.mean()])
        if kind in self._tokens:
            self._tokens[kind] = max(self._tokens[kind], moments.tokens)

    def close(self, shared: Mapping[str, str]) -> None:
        """``shared``: as :attr:`Walk.shared`."""
        checkpoint, sha256 = self._weights.checkpoint, self._weights.sha256
        self.writer.close(
            Origin(
                model=checkpoint.folder.name,
                headers_sha256=checkpoint.stored.headers_sha256(),
                weights={name: sha256[name] for name in shared if name in sha256},
                shared={name: owner for name, owner in shared.items() if name != owner},
                text=self._text[0],
                text_sha256=self._text[1],
                tokens=self._tokens[INPUT],
                held_out_tokens=self._tokens[HELD_OUT],
            )
        )
