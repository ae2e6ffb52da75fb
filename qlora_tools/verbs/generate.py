"""``qlt generate``: an export continues a text, or answers, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qlora_tools.cores import allowed_cores
from qlora_tools.errors import IncompatibleError, MissingError, UsageError
from qlora_tools.export.runtime import DecoderSession, Sampling
from qlora_tools.export.runtime.adapters import find_adapter
from qlora_tools.export.runtime.description import Description, describe
from qlora_tools.export.runtime.text import TextStream
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.manifest import read_manifest

GRAPH = "model.onnx"
#: The one task, as Optimum names tasks, whose exports continue a text.
WRITES = "text-generation"
#: Hears (adapter or ``None``, piece of text) as text comes.
Listener = Callable[[str | None, str], None]


@dataclass(frozen=True)
class Answer:
    """One continuation. ``tokens`` leave out the stop token; ``finish`` is ``stop`` (the model's own end), ``stop text``, ``length`` or ``context``.

    ``first_token_s`` is from the prompt to its first token; ``tokens_per_s`` counts the tokens after that one, ``None`` where there is none.
    """

    adapter: str | None
    text: str
    tokens: tuple[int, ...]
    finish: str
    first_token_s: float
    tokens_per_s: float | None


@dataclass(frozen=True)
class GenerateResult:
    """What was written, by the base or by one adapter after the other, and how."""

    export: Path
    device: str
    prompt: str
    prompt_tokens: int
    sampling: Sampling
    load_s: float
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class _Task:
    """What there is to write: everything that is known before a graph is loaded."""

    ids: tuple[int, ...]
    room: int
    new_tokens: int
    sampling: Sampling
    stops: Sequence[str]
    stop_tokens: frozenset[int]
    decode: Callable[[list[int]], str] = field(compare=False)


def generate(
    *,
    model: str | Path,
    prompt: str,
    adapters: Sequence[str | Path] = (),
    new_tokens: int = 128,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = None,
    dry_run: bool = False,
    listener: Listener | None = None,
) -> GenerateResult:
    """Let the export ``model`` continue ``prompt``; with ``chat``, answer it through the tokenizer's chat template, after ``system`` if given.

    The likeliest token is taken each time, unless one of ``temperature``, ``top_k``, ``top_p`` and ``min_p`` is given, or ``sample``, which starts from
    the model's own settings. ``adapters``: names of the export's adapters, or ``.onnx_adapter`` files; each writes its own answer, without reloading.
    ``stop``: texts at which an answer ends; they are not part of it. ``listener`` hears every piece as it comes. A dry run loads no graph and
    has no answers.

    Raises:
        MissingError: no export, tokenizer or adapter there. UsageError: a setting out of range; a prompt that is empty or longer than the context;
        no chat template. IncompatibleError: an adapter or a tokenizer of another model.
    """
    folder = Path(model)
    described = _described(folder)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    sampling = _sampling(described.search if sample else None, {name: value for name, value in given.items() if value is not None}, seed)
    wanted: Sequence[str | Path | None] = adapters or [None]
    for adapter in adapters:
        find_adapter(folder, adapter)
    tokenizer = open_tokenizer(folder)
    ids = _encoded(tokenizer, prompt, chat, system)
    task = _planned(tokenizer, described, ids, new_tokens, sampling, stop)
    if dry_run:
        return GenerateResult(folder, described.device if device == "auto" else device, prompt, len(ids), sampling, 0.0, ())
    began = time.perf_counter()
    session = DecoderSession(folder, threads=threads or allowed_cores(), device=device)
    load_s = time.perf_counter() - began
    try:
        if max(ids) >= session.vocab_size:
            raise IncompatibleError(
                f"the tokenizer in {folder} gives token {max(ids)}, the model has {session.vocab_size}", hint="export with the model's own tokenizer"
            )
        answers = tuple(_answer(session, task, adapter, listener) for adapter in wanted)
        used = str(session.info()["device"])
    finally:
        session.close()
    return GenerateResult(folder, used, prompt, len(ids), sampling, load_s, answers)


def _described(folder: Path) -> Description:
    if not (folder / GRAPH).is_file():
        if (folder / "config.json").is_file():
            raise UsageError(f"{folder} is a checkpoint, not an export", hint=f"make one with `qlt export {folder} --int8`")
        raise MissingError(f"{folder} is no export: it holds no {GRAPH}", hint="make one with `qlt export`")
    manifest = read_manifest(folder)
    task = manifest.command.get("task") if manifest else None
    if task not in (None, WRITES):
        raise UsageError(f"{folder} is an export for {task}, which writes no text", hint=f"give an export for {WRITES}")
    return describe(folder)


def _sampling(search: Mapping[str, Any] | None, given: Mapping[str, Any], seed: int) -> Sampling:
    """The model's settings (``None``: those that change nothing), and over them what was given."""
    sampled = search is not None or given.keys() - {"repetition_penalty"}
    start = Sampling().with_defaults(search or {}) if sampled else Sampling()
    return replace(start, **given, seed=seed)


def _encoded(tokenizer: Any, prompt: str, chat: bool, system: str | None) -> tuple[int, ...]:
    """Token ids of the prompt as the model expects it."""
    if system is not None and not chat:
        raise UsageError("a system text belongs to a chat", hint="add --chat")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("this tokenizer has no chat template", hint="leave --chat out, and write the prompt as the model was trained to read it")
        messages = [*([{"role": "system", "content": system}] if system is not None else []), {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UsageError("the prompt is empty, and this tokenizer has no token that begins a text", hint="give some text")
    return tuple(int(token) for token in ids)


def _planned(tokenizer: Any, described: Description, ids: tuple[int, ...], new_tokens: int, sampling: Sampling, stops: Sequence[str]) -> _Task:
    context = described.context_length
    if context is not None and len(ids) >= context:
        raise UsageError(f"the prompt has {len(ids)} tokens, the model's context {context}", hint="shorten the prompt")
    if new_tokens < 1:
        raise UsageError(f"{new_tokens} new tokens, expected 1 or more")
    # the last token is written, not read: it needs no position
    room = new_tokens if context is None else min(new_tokens, context - len(ids) + 1)
    end = tokenizer.eos_token_id
    stop_tokens = described.stop_tokens | ({int(end)} if isinstance(end, int) else set())

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    return _Task(ids, room, new_tokens, sampling, stops, stop_tokens, decode)


def _answer(session: DecoderSession, task: _Task, adapter: str | Path | None, listener: Listener | None) -> Answer:
    """Write once, with ``adapter`` on the model."""
    session.use(adapter)
    name = None if adapter is None else str(adapter)
    stream = TextStream(task.decode, task.ids, task.stops)
    tokens: list[int] = []
    pieces: list[str] = []
    times = [time.perf_counter()]
    finish = "length" if task.room == task.new_tokens else "context"

    def tell(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if listener is not None:
                listener(name, piece)

    for token in _tokens(session, task):
        times.append(time.perf_counter())
        if token in task.stop_tokens:
            finish = "stop"
            break
        tokens.append(token)
        tell(stream.push(token))
        if stream.stopped:
            finish = "stop text"
            break
    tell(stream.finish())
    later = times[-1] - times[1]
    return Answer(name, "".join(pieces), tuple(tokens), finish, times[1] - times[0], (len(times) - 2) / later if later > 0 else None)


def _tokens(session: DecoderSession, task: _Task) -> Iterator[int]:
    for tokens_B in session.generate(np.array([task.ids], np.int64), task.room, task.stop_tokens, sampling=task.sampling):
        yield int(tokens_B[0])
