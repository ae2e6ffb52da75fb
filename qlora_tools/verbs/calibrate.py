"""``qlt calibrate``: what a model's layers read, as a file of second moments; and the same for the verbs that take ``--calib``."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import INPUT, Statistics, header_bytes
from qlora_tools.errors import IncompatibleError, MissingError, OutputExistsError, QltError, UsageError
from qlora_tools.live.text import HELD_OUT_EVERY, TextWindows, read_windows
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.names import slug
from qlora_tools.process_memory import read_memory
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.floats import judging_dtype
from qlora_tools.training.allocator import Heap
from qlora_tools.verbs.opening import folder_name, open_model, resolve_device

# What runs models (transformers) is imported where it is used: verbs that only may calibrate need not wait for it.

#: Words that stand for a text: what the model writes itself, and the one that comes with the package.
SELF, BUILTIN = "self", "builtin"
TOKENS, CONTEXT = 32_768, 512
_DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class HeardInput:
    """One distinct input: the weight it is stored with, its size, how many weights read it. ``effective_rank``: (trace)^2 / ||R||_F^2, the number of
    directions that share its energy; ``dead``: inputs that were zero throughout; ``spread``: largest / smallest mean square of the living ones."""

    weight: str
    size: int
    readers: int
    effective_rank: float
    dead: int
    spread: float


@dataclass(frozen=True)
class CalibrateResult:
    """What was (or would be) written. ``bytes`` of the file, in a dry run at most; ``peak_rss_bytes`` of the whole process."""

    output: Path
    dry_run: bool
    text: str
    windows: int
    context: int
    tokens: int
    held_out_tokens: int
    fisher: bool
    bytes: int
    peak_rss_bytes: int | None
    inputs: tuple[HeardInput, ...]
    seconds: float

    @property
    def weights(self) -> int:
        """Linears whose input is known."""
        return sum(heard.readers for heard in self.inputs)

    @property
    def rank_deficient(self) -> int:
        """Inputs that are wider than the tokens that taught: their moments are singular."""
        return sum(heard.size > self.tokens for heard in self.inputs)


def calibrate(
    *,
    model: str | Path,
    data: str | Path = BUILTIN,
    tokens: int = TOKENS,
    context: int = CONTEXT,
    fisher: bool = False,
    dtype: str = "auto",
    seed: int = 0,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> CalibrateResult:
    """Run a text through ``model`` and keep the second moments of what its linears read (``fisher``: and of the gradients at their outputs).

    ``data``: a text file, ``"self"`` (the model writes its own) or ``"builtin"`` (the text in this package). ``tokens``: about how many, one window of
    ``context`` in five of them held out. ``dtype``: what the model computes in, ``fp32``, ``bf16`` or ``auto`` (fp32 on the CPU); sums are fp64 always.

    Raises:
        OutputExistsError: the output is there. UsageError, MissingError: no text, or too short a one. UnsupportedError: no such model in transformers.
    """
    from qlora_tools.calibrate.collect import collect

    if dtype not in _DTYPES:
        raise UsageError(f"no dtype is called {dtype!r}", hint=f"choose one of {', '.join(_DTYPES)}")
    began = time.perf_counter()
    source = open_model(model, progress)
    text = str(data) if str(data) in (SELF, BUILTIN) else Path(data).stem
    dest = output or Path("statistics") / f"{slug(f'{folder_name(source.folder)}-{text}')}.safetensors"
    _check_file(dest, force)
    device = resolve_device(device)
    if dry_run:
        length = _length(source, context, progress)
        count = max(2, tokens // length)
        held_out = count // HELD_OUT_EVERY or 1
        planned = (text, count, length, (count - held_out) * length, held_out * length, fisher, _largest_file(source, fisher))
        return CalibrateResult(dest, True, *planned, None, (), time.perf_counter() - began)
    windows = windows_for(source, data, tokens=tokens, context=context, seed=seed, device=device, progress=progress)
    heard: dict[str, HeardInput] = {}

    def observe(kind: str, weight: str, moments: Any) -> None:
        if kind == INPUT:
            heard[weight] = _describe(weight, moments)

    with collect(
        source, windows, dest, fisher=fisher, seed=seed, device=device, dtype=_DTYPES[dtype], observe=observe, tidy=Heap(device).give_back, progress=progress
    ) as statistics:
        origin = statistics.origin
        readers = Counter(origin.shared.values())
        inputs = tuple(replace(one, readers=1 + readers[one.weight]) for one in heard.values())
        count = len(windows.learn_NL) + len(windows.held_out_NL)
        counted = (text, count, windows.length, origin.tokens, origin.held_out_tokens, fisher, dest.stat().st_size)
    return CalibrateResult(dest, False, *counted, read_memory().peak_bytes, inputs, time.perf_counter() - began)


def _describe(weight: str, moments: Any) -> HeardInput:
    squares_I = moments.diagonal()
    living = squares_I[squares_I > 0]
    spread = float(living.max() / living.min()) if len(living) else 1.0
    return HeardInput(weight, moments.size, 1, moments.effective_rank(), len(squares_I) - len(living), spread)


def _check_file(dest: Path, force: bool) -> None:
    """Refuse an output that is there, unless it is a file of statistics that may be replaced."""
    if not os.path.lexists(dest):
        return
    if not force:
        raise OutputExistsError(f"{dest} is already there", hint="choose another file with -o, or replace it with --force")
    try:
        Statistics(dest).close()
    except QltError as error:
        raise OutputExistsError(
            f"{dest} holds no statistics, so --force does not replace it", hint="remove it yourself, or choose another file with -o"
        ) from error


def _largest_file(source: LogicalCheckpoint, fisher: bool) -> int:
    """Bytes that the file has at most: every linear, and the head, with an input of its own."""
    total = header_bytes(len(source.stored.specs))
    heads = set(source.ties.values())
    for name, spec in source.specs.items():
        linear = source.family.is_linear(name, spec.shape)
        if linear or (len(spec.shape) == 2 and (name in heads or source.family.role(name.rpartition(".")[0]) == "head")):
            outputs, inputs = spec.shape[::-1] if source.family.stores_inputs_first(name, spec.shape) else spec.shape
            total += 4 * (2 * inputs**2 + inputs + (outputs**2 if fisher and linear else 0))
    return total


@contextmanager
def statistics_for(
    checkpoint: LogicalCheckpoint,
    calib: Path | str,
    *,
    tokens: int = TOKENS,
    context: int = CONTEXT,
    fisher: bool = False,
    seed: int = 0,
    device: str = "cpu",
    beside: Path | None = None,
    also: Iterable[LogicalCheckpoint] = (),
    windows: TextWindows | None = None,
    progress: Progress = SILENT,
) -> Iterator[Statistics]:
    """Statistics of ``checkpoint``, open inside the block: those of the file ``calib``, or taken now from the text ``calib`` (``"self"``: from what the
    model writes, ``"builtin"``: from the package's own text).

    ``beside``: a path of the run's output; statistics made here lie next to it while they are needed (default: the system's place for temporary
    files). ``also``: models whose statistics serve as well (the 16-bit original of a quantized one). ``windows``: the text, where the caller has read it already.

    Raises:
        IncompatibleError: a file of statistics of another model, or without gradients where ``fisher`` asks for them. And what reading raises.
    """
    if is_statistics(calib):
        with Statistics(Path(calib)) as statistics:
            statistics.check(checkpoint, *also)
            if fisher and not statistics.has_gradients:
                raise IncompatibleError(f"{calib} holds no output gradients", hint="take the statistics with `qlt calibrate --fisher`")
            yield statistics
        return
    from qlora_tools.calibrate.collect import collect

    windows = windows or windows_for(checkpoint, calib, tokens=tokens, context=context, seed=seed, device=device, progress=progress)
    folder = None if beside is None else beside.resolve().parent
    with (
        tempfile.TemporaryDirectory(prefix=".qlt-statistics-", dir=folder if folder and folder.is_dir() else None) as scratch,
        collect(
            checkpoint,
            windows,
            Path(scratch, "statistics.safetensors"),
            fisher=fisher,
            seed=seed,
            device=device,
            tidy=Heap(device).give_back,
            progress=progress,
        ) as statistics,
    ):
        yield statistics


def is_statistics(calib: Path | str) -> bool:
    """Whether ``calib`` names a file of statistics rather than a text."""
    return str(calib).endswith(".safetensors")


def windows_for(
    checkpoint: LogicalCheckpoint, text: Path | str, *, tokens: int, context: int, seed: int = 0, device: str = "cpu", progress: Progress = SILENT
) -> TextWindows:
    """About ``tokens`` tokens in windows of ``context`` (at most what the model's positions allow) of the text file ``text``, ``self`` or ``builtin``.

    Raises:
        UsageError: too few tokens for two windows. MissingError: no tokenizer, or no such file.
    """
    length = _length(checkpoint, context, progress)
    count = max(2, tokens // length)
    tokenizer = open_tokenizer(checkpoint.folder)
    if str(text) == SELF:
        return _self_written(checkpoint, count, length, seed, device, progress)
    if str(text) == BUILTIN:
        with resources.as_file(resources.files("qlora_tools.calibrate") / "builtin.txt") as path:
            return read_windows(path, tokenizer, length=length, count=count)
    if not Path(text).is_file():
        raise MissingError(f"{text}: no such text file", hint=f"give a text file, or the word {SELF!r} or {BUILTIN!r}")
    return read_windows(Path(text), tokenizer, length=length, count=count)


def _length(checkpoint: LogicalCheckpoint, context: int, progress: Progress) -> int:
    if context < 2:
        raise UsageError(f"--context {context}: windows need at least 2 tokens", hint="leave it out")
    limits = [checkpoint.config.get(name) for name in ("max_position_embeddings", "n_positions")]
    limit = min((limit for limit in limits if isinstance(limit, int) and limit > 1), default=context)
    if limit < context:
        progress.note(f"windows of {limit} tokens, the model's context")
    return min(context, limit)


def _self_written(checkpoint: LogicalCheckpoint, count: int, length: int, seed: int, device: str, progress: Progress) -> TextWindows:
    from qlora_tools.live.base import load_base
    from qlora_tools.live.self_text import written_by

    dtype = judging_dtype(device)
    model = load_base(checkpoint, "language", checkpoint.codec, dtype=dtype, device=device, progress=progress).model
    return written_by(model, checkpoint.folder, windows=count, length=length, seed=seed, progress=progress)
