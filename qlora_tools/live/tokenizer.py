"""A model's tokenizer and the text files it reads. The module itself is light; opening a tokenizer brings transformers, and torch with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tools.errors import CorruptError, MissingError


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights; none of its own code is run.

    Raises:
        MissingError: there is none. CorruptError: tokenizer.json is not as the library behind it reads it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, RecursionError) as error:
        raise MissingError(
            f"{folder} holds no tokenizer that transformers can load: {str(error)[:200]}", hint="copy the tokenizer's files beside the weights"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # tokenizers has no class of its own
            raise
        raise CorruptError(f"{folder / 'tokenizer.json'} is no tokenizer: {str(error)[:200]}", hint="copy it again from where the model is from") from error


def read_utf8(path: Path) -> str:
    """A UTF-8 text file, line ends normalised to ``\\n``.

    Raises:
        MissingError, CorruptError: no such file; not UTF-8.
    """
    if not path.is_file():
        raise MissingError(f"{path}: no such text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path} is not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from error
