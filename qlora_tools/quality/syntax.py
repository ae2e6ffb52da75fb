"""The share of a model's continuations that are Python: parsed, never run.

A model continues a prompt greedily. The rule, so that the figure means one thing:

* The continuation ends where the function ends, before the first line after the prompt that is back at column 0; or at the
  model's end of text; or, failing both, at the token limit. Indentation is read from Python's own tokens, so that text at
  column 0 inside brackets or a long string ends nothing.
* One that ended is *complete*: prompt and continuation together must be accepted by ``ast.parse``.
* One that met the limit is *cut*: its last line, if unfinished, is dropped, and the rest must be a right beginning: accepted as
  it is, or refused by CPython's parser for no other reason than that the input stops (an ``if`` without its body, a ``try``
  without its ``except``, an open bracket). So the limit never makes an error, and an error before it is never forgiven.
* Either way the model must have written at least one whole statement: a body that is empty, all comments, or one string or
  bracket left open to the limit is a failure. ``pass`` is a body: this judges grammar, not sense.

Intervals: a share gets Wilson's score interval. Two models are compared on the same prompts: the difference of shares with the
paired bootstrap of ``intervals.py``, and the verdict from the exact McNemar test (a binomial test on the prompts where
only one of the two succeeded).

Left out: where prompts come from (``prompts.py``) and which runtime answers; anything with ``prefill`` and ``decode`` will do.
"""

from __future__ import annotations

import ast
import codeop
import io
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.intervals import Interval, mean_interval
from qlora_tools.quality.prompts import Prompt
from qlora_tools.resampling import CONFIDENCE

OUTCOMES = ("parses", "open", "broken", "empty")
_ALLOW_INCOMPLETE = int(codeop.PyCF_ALLOW_INCOMPLETE_INPUT) | ast.PyCF_ONLY_AST  # type: ignore[attr-defined]
_SILENT_TOKENS = frozenset({tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER})


class Writer(Protocol):
    """A loaded decoder: logits [1, V] after a prompt [1, T], and after one more token [1]."""

    def prefill(self, ids_BT: NDArray[np.int64]) -> Any: ...
    def decode(self, tokens_B: NDArray[np.int64]) -> Any: ...


class Words(Protocol):
    """A tokenizer as this task needs it; ``text`` decodes ids without cleaning up spaces and without special tokens."""

    stop: frozenset[int]

    def ids(self, prompt: str) -> list[int]: ...
    def text(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Generation:
    """One continuation and its verdict.

    ``judged``: the part of ``text`` that was judged. ``ended``: ``dedent``, ``stop`` or ``limit``. ``outcome``: ``parses``, ``open``
    (cut by the limit, right so far), ``broken`` (``error`` says why) or ``empty``.
    """

    prompt: str
    text: str
    judged: str
    ended: str
    outcome: str
    error: str | None
    tokens: int

    @property
    def success(self) -> bool:
        return self.outcome in ("parses", "open")


@dataclass(frozen=True)
class SyntaxShare:
    """All generations of one model. ``share``: successes, with Wilson's 95 % interval."""

    generations: tuple[Generation, ...]
    share: Interval
    counts: dict[str, int]


@dataclass(frozen=True)
class SyntaxComparison:
    """``a`` minus ``b`` on the same prompts. ``verdict``: ``a``, ``b`` or ``tie`` (exact McNemar ``p_value`` of 0.05 or more)."""

    a: str
    b: str
    difference: Interval
    only_a: int
    only_b: int
    p_value: float
    verdict: str


def judge(prompt: str, text: str, ended: str) -> tuple[str, str, str | None]:
    """``(judged, outcome, error)`` of a continuation ``text`` that ended by ``dedent``, ``stop`` or ``limit``; see the module docstring."""
    judged = text if ended != "limit" else text[: text.rfind("\n") + 1]
    source = prompt + judged + ("" if judged.endswith("\n") else "\n")
    if judged and "\0" not in source:
        error = _refusal(source, whole=ended != "limit")
    else:
        error = None if not judged else "a null character"
    if not _has_statement(source, prompt):
        return judged, "broken" if error else "empty", error
    if error is not None:
        return judged, "broken", error
    return judged, "open" if ended == "limit" else "parses", None


def end_of_function(prompt: str, text: str) -> int | None:
    """Characters of ``text`` before the first logical line that is back at column 0; ``None`` while the function goes on."""
    source = prompt + text
    depth, entered, begins_line = 0, False, True
    for kind, _, (row, _), _ in _tokens(source):
        depth += (kind == tokenize.INDENT) - (kind == tokenize.DEDENT)
        entered = entered or depth > 0
        if kind in _SILENT_TOKENS:
            begins_line = begins_line or kind == tokenize.NEWLINE
            continue
        if begins_line and entered and depth == 0 and row > prompt.count("\n") + 1:
            return sum(len(line) + 1 for line in source.split("\n")[: row - 1]) - len(prompt)
        begins_line = False
    return None


def generate(writer: Writer, words: Words, prompt: Prompt, new_tokens: int) -> Generation:
    """Continue ``prompt`` by the most likely token until the function ends, the model stops or ``new_tokens`` are written.

    Raises:
        UsageError: the tokenizer makes nothing of the prompt.
    """
    prompt_ids = words.ids(prompt.text)
    if not prompt_ids:
        raise UsageError(f"{prompt.name}: the tokenizer gives no tokens for this prompt")
    lead, text, ended = words.text(prompt_ids), "", "limit"
    written: list[int] = []
    logits_BV = writer.prefill(np.asarray([prompt_ids], np.int64))
    while len(written) < new_tokens:
        token = int(logits_BV.argmax(-1)[0])
        if token in words.stop:
            ended = "stop"
            break
        written.append(token)
        whole = words.text([*prompt_ids, *written])
        text = whole[len(lead) :] if whole.startswith(lead) else words.text(written)
        end = end_of_function(prompt.text, text)
        if end is not None:
            text, ended = text[:end], "dedent"
            break
        if len(written) < new_tokens:
            logits_BV = writer.decode(np.asarray([token], np.int64))
    judged, outcome, error = judge(prompt.text, text, ended)
    return Generation(prompt.name, text, judged, ended, outcome, error, len(written))


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that no continuation could save.

    Raises:
        UsageError: a prompt is not the beginning of a Python program.
    """
    for prompt in prompts:
        cut = prompt.text[: prompt.text.rfind("\n") + 1]
        if cut and (error := _refusal(cut, whole=False)):
            raise UsageError(f"{prompt.name}: no continuation of this prompt is Python: {error}")


def syntax_share(
    writer: Writer, words: Words, prompts: Sequence[Prompt], *, new_tokens: int = 128, progress: Progress = SILENT, title: str = "python-syntax"
) -> SyntaxShare:
    """Continue every prompt and count what parses.

    Raises:
        UsageError: no prompts, or one that is not the beginning of a Python program.
    """
    if not prompts:
        raise UsageError("no prompts to continue")
    check_prompts(prompts)
    generations = []
    with progress.task(title, len(prompts), "prompts") as task:
        for prompt in prompts:
            generations.append(generate(writer, words, prompt, new_tokens))
            task.advance()
    counted = Counter(generation.outcome for generation in generations)
    successes = sum(generation.success for generation in generations)
    return SyntaxShare(tuple(generations), wilson(successes, len(generations)), {outcome: counted[outcome] for outcome in OUTCOMES})


def wilson(successes: int, trials: int) -> Interval:
    """A share with Wilson's score interval at 95 % (Wilson 1927; no continuity correction)."""
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(successes / trials, float(found.low), float(found.high))


def compare_syntax(name_a: str, a: SyntaxShare, name_b: str, b: SyntaxShare) -> SyntaxComparison:
    """Which of two models writes Python more often.

    Raises:
        IncompatibleError: they continued different prompts.
    """
    if [generation.prompt for generation in a.generations] != [generation.prompt for generation in b.generations]:
        raise IncompatibleError(f"{name_a} and {name_b} were not given the same prompts", hint="judge both in one run")
    from scipy.stats import binomtest

    pairs = [(x.success, y.success) for x, y in zip(a.generations, b.generations, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    difference = mean_interval([float(x) - float(y) for x, y in pairs], [1] * len(pairs))
    verdict = "tie" if p_value >= 1 - CONFIDENCE else "a" if only_a > only_b else "b"
    return SyntaxComparison(name_a, name_b, difference, only_a, only_b, p_value, verdict)


def _refusal(source: str, *, whole: bool) -> str | None:
    """Why CPython's parser refuses ``source``, or ``None``. With ``whole=False`` stopping too early is no reason."""
    parse: Callable[[], object] = (
        (lambda: ast.parse(source)) if whole else (lambda: compile(source, "<continuation>", "exec", flags=_ALLOW_INCOMPLETE, dont_inherit=True))
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `x is 1` draws a SyntaxWarning, which is no error even under -W error
            parse()
    except SyntaxError as error:
        if not whole and "incomplete input" in str(error.msg):
            return None
        return f"line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:  # null bytes, lone surrogates, nesting too deep for the parser
        return f"{type(error).__name__}: {error}"
    return None


def _has_statement(source: str, prompt: str) -> bool:
    """True when a logical line that holds a token of the continuation came to its end."""
    row, column = prompt.count("\n") + 1, len(prompt) - (prompt.rfind("\n") + 1)
    written = False
    for kind, text, _, end in _tokens(source):
        if kind == tokenize.NEWLINE and written:
            return True
        if kind == tokenize.ERRORTOKEN and text.isspace():
            continue
        written = written or (kind not in _SILENT_TOKENS and end > (row, column))
    return False


def _tokens(source: str) -> Iterator[tuple[int, str, tuple[int, int], tuple[int, int]]]:
    """``(kind, text, start, end)`` of Python's tokens up to where the text stops being any; positions are (row from 1, column)."""
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            yield token.type, token.string, token.start, token.end
    except (tokenize.TokenError, SyntaxError, ValueError, RecursionError):
        return
