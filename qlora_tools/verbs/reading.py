"""A text as a model's tokenizer reads it, cut into windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_tools.errors import MissingError
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.quality.corpus import Corpus, Method, Window, python_reference, read_corpus, tokenize
from qlora_tools.verbs.engines import positions_of

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


@dataclass(frozen=True)
class Reading:
    """A text cut for a model: what quality is judged on."""

    corpus: Corpus
    method: Method
    windows: Sequence[Window]


def read_text(folder: Path, text: Path | None, *, tokens: int, context: int) -> Reading:
    """``text`` (default: the held-out part of Python's language reference) through the tokenizer in ``folder``.

    Windows are no longer than the model's own context.

    Raises:
        MissingError: no tokenizer there.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise MissingError(f"{folder} holds no tokenizer, so no text can be read", hint="copy the model's tokenizer files into it")
    tokenizer = open_tokenizer(folder)
    corpus = read_corpus(text) if text else python_reference()
    method = Method(context=min(context, positions_of(folder) or context), max_tokens=tokens)
    windows = tokenize(corpus, lambda content: tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], method)
    return Reading(corpus, method, windows)
