"""Texts to judge on, and how they are cut into windows of tokens.

A perplexity without its method is not a number, so :class:`Method` travels with every result: window
length, stride, whether a BOS token leads, and how many tokens were scored. The default text is Python's own
language reference (``pydoc_data.topics``): real prose that lies on every machine. Several of its topics
repeat each other's paragraphs, so the held-out part is cut between groups of topics that share text and never
through one. Tokenizing is the caller's: it hands in a callable.

Axes: T positions of a window.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import MissingError, UsageError
from qlora_tools.live.tokenizer import read_utf8

Ids = NDArray[np.int64]
PARTS = ("train", "heldout", "all")
_HELD_OUT_SHARE = 0.125
_SHARED_PARAGRAPH_CHARS = 80


@dataclass(frozen=True)
class Corpus:
    """A text with the name it is reported under."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Method:
    """How a text becomes scored tokens.

    Windows hold ``context`` tokens and start ``stride`` tokens apart; ``stride == context`` makes them
    disjoint. A window scores only the tokens no earlier window scored, so every token counts once; the very
    first token of a text has no prefix and is scored only behind a BOS. A last piece shorter than
    ``context`` is left out, so that all windows weigh alike. ``bos`` is put before each window, beyond
    ``context``. ``max_tokens`` bounds the scored tokens, in whole windows.
    """

    context: int = 256
    stride: int | None = None
    bos: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.context < 2:
            raise UsageError(f"a window of {self.context} tokens has nothing to score", hint="take 2 tokens or more")
        if self.stride is not None and not 1 <= self.stride <= self.context:
            raise UsageError(f"stride {self.stride} is outside 1..{self.context}, the window's length")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}, expected 1 or more")

    @property
    def step(self) -> int:
        return self.stride or self.context

    @property
    def name(self) -> str:
        kind = "disjoint" if self.step == self.context else f"sliding by {self.step}"
        return f"{kind} windows of {self.context} tokens" + ("" if self.bos is None else " behind a BOS")

    def record(self) -> dict[str, object]:
        """What a report must store beside a perplexity."""
        return {"name": self.name, "context": self.context, "stride": self.step, "bos": self.bos}


@dataclass(frozen=True)
class Window:
    """``ids`` i64[T] to run; the tokens at positions ``first_scored``.. are predicted from what precedes them."""

    ids: Ids
    first_scored: int

    @property
    def n_scored(self) -> int:
        return len(self.ids) - self.first_scored

    @property
    def targets(self) -> Ids:
        """The scored tokens; the logits that predict them are rows ``first_scored - 1 : -1`` of the window's."""
        return self.ids[self.first_scored :]


def windows(ids: Sequence[int] | Ids, method: Method) -> list[Window]:
    """Cut a token sequence i64[T] by ``method``.

    Raises:
        UsageError: the text is shorter than one window.
    """
    tokens = np.asarray(ids, dtype=np.int64).reshape(-1)
    found: list[Window] = []
    scored = 0
    for window in _cut(tokens, method):
        if found and method.max_tokens is not None and scored + window.n_scored > method.max_tokens:
            break
        scored += window.n_scored
        found.append(window)
    if not found:
        raise UsageError(f"the text has {len(tokens)} tokens, fewer than one window of {method.context}", hint="give a longer text or a smaller context")
    return found


def _cut(tokens: Ids, method: Method) -> Iterator[Window]:
    lead = np.array([] if method.bos is None else [method.bos], dtype=np.int64)
    for start in range(0, len(tokens) - method.context + 1, method.step):
        piece = tokens[start : start + method.context]
        fresh = 0 if start == 0 or method.step == method.context else method.context - method.step
        first = max(fresh + len(lead), 1)
        yield Window(np.concatenate([lead, piece]), first)


def tokenize(corpus: Corpus, encode: Callable[[str], Sequence[int]], method: Method) -> list[Window]:
    """Windows of a text through a tokenizer given as a callable (without special tokens: ``method.bos`` adds the BOS)."""
    return windows(encode(corpus.text), method)


def read_corpus(path: Path) -> Corpus:
    """A UTF-8 text file, line ends normalised to ``\\n``.

    Raises:
        MissingError, CorruptError: no such file; not UTF-8.
    """
    return Corpus(path.name, read_utf8(path))


def python_reference(part: str = "heldout") -> Corpus:
    """The language reference inside this Python: ``heldout`` (about an eighth), ``train`` (the rest) or ``all``.

    The text follows the Python version; its sha256 is in every report, so two runs can be told apart.

    Raises:
        UsageError: no such part. MissingError: see :func:`reference_topics`.
    """
    if part not in PARTS:
        raise UsageError(f"part {part!r} of the language reference: expected one of {', '.join(PARTS)}")
    topics = reference_topics()
    held_out = _held_out_of_installed()
    chosen = [text for topic, text in sorted(topics.items()) if part == "all" or (topic in held_out) == (part == "heldout")]
    return Corpus(f"python-reference-{part}", "\n\n".join(text.strip() for text in chosen) + "\n")


def reference_topics() -> Mapping[str, str]:
    """Topic -> text of the language reference inside this Python.

    Raises:
        MissingError: this Python comes without it.
    """
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError as error:
        raise MissingError("this Python has no language reference (module pydoc_data.topics)", hint="give a text of your own, or use a full Python") from error
    topics: Mapping[str, str] = module.topics
    return topics


@lru_cache(maxsize=1)
def _held_out_of_installed() -> frozenset[str]:
    return held_out_topics(reference_topics())


def held_out_topics(topics: Mapping[str, str]) -> frozenset[str]:
    """The topics to judge on. Groups in the order of their hash fill the held-out share; one above it is skipped."""
    groups = _groups_sharing_text(topics)
    budget = _HELD_OUT_SHARE * sum(map(len, topics.values()))
    held_out: set[str] = set()
    size = 0
    for group in sorted(groups, key=lambda names: hashlib.sha256(names[0].encode()).hexdigest()):
        weight = sum(len(topics[name]) for name in group)
        if size + weight <= budget:
            held_out.update(group)
            size += weight
    return frozenset(held_out)


def _groups_sharing_text(topics: Mapping[str, str]) -> list[list[str]]:
    """Topics joined whenever they hold the same paragraph; each group sorted."""
    leader = {name: name for name in topics}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first_with: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in (" ".join(piece.split()) for piece in topics[name].split("\n\n")):
            if len(paragraph) >= _SHARED_PARAGRAPH_CHARS:
                a, b = sorted((find(name), find(first_with.setdefault(paragraph, name))))
                leader[b] = a
    groups: dict[str, list[str]] = {}
    for name in sorted(topics):
        groups.setdefault(find(name), []).append(name)
    return list(groups.values())
