"""Python prompts: functions cut off before their body, from files that lie on every machine or from the user's own.

A prompt is a function's header and docstring, dedented to column 0, and ends with the docstring's closing quotes (no line
break: byte-pair tokenizers join a line break with the indentation that follows it, so a prompt that ends in one asks for a
token the model has hardly ever seen there). Which functions are taken follows from the sha256 of the prompts alone,
so the choice does not depend on the order of files and a longer list begins with the shorter one.

The standard library changes between Python versions, so a figure holds for one version: the set's name says which, and its
``sha256`` settles whether two sets are equal. Models have often been trained on this library; as a yardstick between
variants of one model that is harmless, as a figure of skill it is flattering.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import dedent

from qlora_tools.errors import CorruptError, MissingError, UsageError

_SHORTEST_CHARS, _LONGEST_CHARS = 60, 800
_SKIPPED = frozenset({"antigravity.py", "this.py"})  # modules that do something when imported and hold no plain functions


@dataclass(frozen=True)
class Prompt:
    """``text`` to continue; ``name`` says where it is from (``textwrap.py:dedent``, ``mine.jsonl:3``)."""

    name: str
    text: str


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order in which they are taken, with the name they are reported under."""

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def sha256(self) -> str:
        """Of the texts, in order."""
        return hashlib.sha256("\0".join(prompt.text for prompt in self.prompts).encode()).hexdigest()


@lru_cache(maxsize=1)
def library_prompts() -> PromptSet:
    """All usable functions in the top-level modules of the running Python's standard library.

    Raises:
        MissingError: the library lies in no folder (a zipped Python).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(folder.glob("*.py")) if path.name not in _SKIPPED and not path.name.startswith("_sysconfigdata")]
    prompts = [prompt for path in files for prompt in function_prompts(_decoded(path), path.name)]
    if not prompts:
        raise MissingError(f"{folder} holds no Python source", hint="give prompts with --text FILE.jsonl or FILE.py")
    return PromptSet(f"functions of the Python {platform.python_version()} standard library", _chosen(prompts))


def read_prompts(path: Path) -> PromptSet:
    """Prompts of a ``.jsonl`` file, one ``{"prompt": text}`` a line, taken in that order; or the functions of a ``.py`` file.

    Raises:
        UsageError: neither kind of file, or nothing in it to continue. CorruptError: a line is not such an object, or the text
        is not UTF-8 or not Python.
    """
    if path.suffix == ".py":
        try:
            prompts = _chosen(function_prompts(_decoded(path), path.name, strict=True))
        except SyntaxError as error:
            raise CorruptError(f"{path}:{error.lineno}: not Python: {error.msg}") from error
        if not prompts:
            raise UsageError(f"{path} holds no function with a docstring and a body", hint="give another file, or prompts as jsonl")
        return PromptSet(path.name, prompts)
    if path.suffix not in (".jsonl", ".ndjson"):
        raise UsageError(f"{path} is neither .py nor .jsonl", hint='write prompts as lines of {"prompt": "def ..."}')
    prompts = tuple(_line_prompts(path))
    if not prompts:
        raise UsageError(f"{path} holds no prompts")
    return PromptSet(path.name, prompts)


def function_prompts(source: str, name: str, *, strict: bool = False) -> list[Prompt]:
    """The prompts in one file's text, in its order. Text that is no Python gives none, or raises SyntaxError if ``strict``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if strict:
            raise
        return []
    lines = source.splitlines(keepends=True)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1 and ast.get_docstring(node, clean=False):
            last = node.body[0]
            assert last.end_lineno is not None
            text = dedent("".join(lines[node.lineno - 1 : last.end_lineno])).rstrip()
            if _SHORTEST_CHARS <= len(text) <= _LONGEST_CHARS and text.endswith(('"', "'")) and _stands_alone(text):
                found.append(Prompt(f"{name}:{node.name}", text))
    return found


def _stands_alone(text: str) -> bool:
    """True when the cut text parses by itself and begins at column 0: not where a docstring's lines lie left of the code."""
    try:
        return len(ast.parse(text + "\n").body) == 1
    except (SyntaxError, ValueError):
        return False


def _chosen(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    """Without repetitions, in the order of their hashes."""
    unique: dict[str, Prompt] = {}
    for prompt in prompts:
        unique.setdefault(prompt.text, prompt)
    return tuple(sorted(unique.values(), key=lambda prompt: hashlib.sha256(prompt.text.encode()).digest()))


def _decoded(path: Path) -> str:
    """A Python file's text under the encoding that it declares."""
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding).replace("\r\n", "\n")
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise CorruptError(f"{path} is not text in the encoding it declares: {error}") from error


def _line_prompts(path: Path) -> Iterator[Prompt]:
    try:
        lines: Sequence[str] = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path} is not UTF-8: byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise CorruptError(f"{path}:{number}: not JSON: {error}") from error
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise CorruptError(f'{path}:{number}: expected an object with text under "prompt"')
        yield Prompt(f"{path.name}:{number}", text)
