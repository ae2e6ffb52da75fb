"""From records to token ids and the mask of what is trained.

Where a conversation's answers lie is found by prefix difference: the text before an answer is what the chat template
makes of the turns before it with the prompt for the next answer, the text after it what it makes of the turns including
it. Both must be prefixes of the whole conversation. Among the tokens a border is where the tokenizer's offsets put the
end of one token and the start of the next; where they are not that clear (trimmed, or none), where the tokens of the
prefix alone end; and where a token straddles the border, before it: the straddling token is trained. Stock templates carry no marks of their own for
this. A mask that trains nothing is an error that shows the example, never a loss of zero.

Arrays: T tokens of an example. The first token of an example is never trained: nothing precedes it. Left out: masks by
role or by turn, and several texts joined for classification.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.training.examples import Records
from qlora_tools.training.packing import windows

_NAMED = 5
_CHUNK_RECORDS = 512
_SHOWN_CHARS = 600
_PIECE_CHARS = 1 << 20  # of a long text, tokenised at once
_PIECE_END = re.compile(r"\n(?=\S)")

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Example:
    """``ids`` i32[T]; ``trained`` bool[T]: token t is a target; ``line``: where it came from. ``label``: for classification."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    line: int
    label: str | int | None = None


@dataclass(frozen=True)
class EncodeReport:
    """What became of the records. ``*_lines`` name the first few. ``straddled``: borders that fall inside a token."""

    kind: str
    mask: str
    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    truncated: int = 0
    truncated_lines: tuple[int, ...] = ()
    dropped: int = 0
    dropped_lines: tuple[int, ...] = ()
    straddled: int = 0
    notes: tuple[str, ...] = ()

    @property
    def trained_share(self) -> float:
        return self.trained_tokens / max(1, self.tokens)


@dataclass(frozen=True)
class Encoded:
    """Examples in the records' order, and the report on them."""

    examples: tuple[Example, ...]
    report: EncodeReport


@dataclass(frozen=True)
class _Rendered:
    """A record as one text, the character spans to train, and whether the tokenizer's own BOS and EOS go around it."""

    text: str
    spans: tuple[Span, ...]
    framed: bool


def encode(records: Records, tokenizer: Any, *, mask: str = "auto", max_len: int, progress: Progress = SILENT) -> Encoded:
    """Tokenise for language modelling. ``mask``: ``auto`` trains answers where the records have them and everything of plain
    text; ``completion`` insists on answers; ``all`` trains everything. Plain text and completions end in a trained EOS.
    Longer examples are cut at ``max_len`` tokens; one that loses its whole target is dropped.

    Raises:
        UsageError: ``mask`` or ``max_len`` does not fit the records. IncompatibleError: no chat template, one that
        fails or rewrites earlier turns, an example with nothing to train, or none left.
    """
    if max_len < 2:
        raise UsageError(f"examples of {max_len} tokens have nothing to predict", hint="raise --max-len")
    if mask == "completion" and records.kind not in ("completion", "messages"):
        raise UsageError(f"mask 'completion' needs completions or messages, but {records.path} holds {records.kind} records", hint="leave out --mask")
    if records.kind == "messages" and not getattr(tokenizer, "chat_template", None):
        hint = "take an instruction-tuned base, or give {prompt, completion} records"
        raise IncompatibleError(f"{records.path} holds conversations, but the base's tokenizer has no chat template", hint=hint)
    voice = _Voice(tokenizer)
    tally = _Tally(records, mask, max_len)
    with progress.task("tokenise", total=len(records), unit="records") as task:
        if records.kind == "stream":
            _encode_stream(records, voice, tally)
        for start in range(0, len(records) if records.kind != "stream" else 0, _CHUNK_RECORDS):
            numbers = range(start, min(start + _CHUNK_RECORDS, len(records)))
            rendered = [_render(records, number, tokenizer, mask) for number in numbers]
            for number, (ids, trained, straddled) in zip(numbers, voice.tokenise(rendered), strict=True):
                tally.straddled += straddled
                if not trained.any() and records.kind in ("completion", "messages"):
                    raise _nothing_trained(records, number, rendered[number - start])
                tally.keep(ids, trained, records.lines[number])
            task.advance(len(numbers))
    return tally.close(voice.notes(records.kind, tally.examples[:1]))


def encode_labelled(records: Records, tokenizer: Any, *, max_len: int, progress: Progress = SILENT) -> Encoded:
    """Tokenise ``labelled`` records for classification, with the tokenizer's own special tokens; no token is a target.

    Raises:
        IncompatibleError: records without labels.
    """
    if records.kind != "labelled":
        raise IncompatibleError(f"classification needs {{text, label}} records, but {records.path} holds {records.kind} records")
    tally = _Tally(records, "label", max_len)
    with progress.task("tokenise", total=len(records), unit="records") as task:
        for start in range(0, len(records), _CHUNK_RECORDS):
            rows = records.rows[start : start + _CHUNK_RECORDS]
            for number, ids in enumerate(tokenizer([row["text"] for row in rows], verbose=False)["input_ids"], start=start):
                if len(ids) > max_len:
                    tally.cut(records.lines[number])
                    ids = tokenizer(records.rows[number]["text"], truncation=True, max_length=max_len)["input_ids"]
                kept = np.asarray(ids, dtype=np.int32)
                tally.examples.append(Example(kept, np.zeros(len(kept), dtype=np.bool_), records.lines[number], records.rows[number]["label"]))
            task.advance(len(rows))
    return tally.close(())


def preview(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """The example's text in pieces, each with whether it is trained; joined, they are the whole text."""
    edges = [0, *(np.flatnonzero(np.diff(example.trained)) + 1).tolist(), len(example.ids)]
    pieces: list[tuple[str, bool]] = []
    before = ""
    for start, end in pairwise(edges):
        text = tokenizer.decode(example.ids[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if end < len(example.ids):
            text = text.rstrip("\ufffd")  # half of a character: the next piece gets all of it
        fresh = text.removeprefix(before) if text.startswith(before) else tokenizer.decode(example.ids[start:end].tolist())
        if fresh:
            pieces.append((fresh, bool(example.trained[start])))
        before = text
    return pieces


def marked(spans: Sequence[tuple[str, bool]]) -> str:
    """One line of text with its trained parts in double brackets, for messages and screens without colour."""
    return _shown("".join(f"⟦{text}⟧" if trained else text for text, trained in spans))


class _Voice:
    """A tokenizer with what it puts around a text (``lead``, ``trail``), and borders of characters as borders of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        bare, framed = self.ids(["a"])[0], list(tokenizer("a")["input_ids"])
        at = next((start for start in range(len(framed) - len(bare) + 1) if framed[start : start + len(bare)] == bare), None)
        self.lead: list[int] = [] if at is None else framed[:at]
        self.trail: list[int] = [] if at is None else framed[at + len(bare) :]
        if self.eos is not None and self.eos not in self.trail:
            self.trail = [*self.trail, self.eos]

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text with no special tokens added; those written out in it count as themselves."""
        return list(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else []

    def tokenise(self, rendered: Sequence[_Rendered]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_], int]]:
        """(ids, trained, borders inside a token) of each text. All texts go through the tokenizer at once, then the prefixes that are needed."""
        coded = self.tokenizer([one.text for one in rendered], add_special_tokens=False, verbose=False)
        wholes: list[list[int]] = coded["input_ids"]
        places = [self._clean_borders(one, coded, number, len(wholes[number])) for number, one in enumerate(rendered)]
        open_edges = [[edge for edge, place in known.items() if place is None] for known in places]
        prefixes = iter(self.ids([one.text[:edge] for one, edges in zip(rendered, open_edges, strict=True) for edge in edges]))
        for one, whole, known, edges in zip(rendered, wholes, places, open_edges, strict=True):
            straddled = []
            for edge in edges:
                prefix = next(prefixes)
                known[edge] = (len(prefix), len(prefix))
                if not _is_prefix(prefix, whole):
                    straddled.append(edge)
            if straddled:
                known.update(self._by_offsets(one.text, whole, straddled))
            found = {edge: place for edge, place in known.items() if place is not None}
            trained = np.zeros(len(whole), dtype=np.bool_)
            for begin, end in one.spans:
                trained[found[begin][0] : found[end][1]] = True
            yield (*self._frame(whole, trained, one.framed), len(straddled))

    def _clean_borders(self, one: _Rendered, coded: Any, number: int, length: int) -> dict[int, Span | None]:
        """For each border of a text its place among the tokens, or ``None`` where the offsets do not put exactly one token's end and the next one's start there."""
        places: dict[int, Span | None] = {edge: None for span in one.spans for edge in span}
        fast = getattr(self.tokenizer, "is_fast", False)
        for edge in places:
            if edge in (0, len(one.text)):
                places[edge] = (0, 0) if edge == 0 else (length, length)
            elif fast and (token := coded.char_to_token(number, edge)):
                before, after = coded.token_to_chars(number, token - 1), coded.token_to_chars(number, token)
                if before is not None and before.start < before.end == edge == after.start:
                    places[edge] = (token, token)
        return places

    def _by_offsets(self, text: str, whole: list[int], edges: list[int]) -> dict[int, Span]:
        """For each border: (first token that ends after it, first token that starts at or after it)."""
        if not getattr(self.tokenizer, "is_fast", False):
            message = (
                f"a token joins the end of a prompt with its answer near {text[max(0, edges[0] - 20) : edges[0] + 20]!r}, and this tokenizer tells no offsets"
            )
            raise IncompatibleError(message, hint="end prompts in a line break, or begin answers with a space")
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        assert list(coded["input_ids"]) == whole, "one text, two tokenisations"
        offsets = coded["offset_mapping"]
        found = {}
        for edge in edges:
            begin = next((token for token, (_, end) in enumerate(offsets) if end > edge), len(offsets))
            found[edge] = (begin, next((token for token, (start, _) in enumerate(offsets) if start >= edge and token >= begin), len(offsets)))
        return found

    def _frame(self, whole: list[int], trained: NDArray[np.bool_], framed: bool) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        lead = self.lead if framed and whole[: len(self.lead)] != self.lead else []
        trail = self.trail if framed and not (whole and whole[-1] == self.eos) else []
        ids = np.asarray([*lead, *whole, *trail], dtype=np.int32)
        mask = np.concatenate([np.zeros(len(lead), dtype=np.bool_), trained, np.ones(len(trail), dtype=np.bool_)])
        mask[:1] = False
        return ids, mask

    def notes(self, kind: str, examples: Sequence[Example]) -> tuple[str, ...]:
        if self.eos is None and kind in ("text", "completion"):
            return ("the tokenizer has no end-of-sequence token: the model will not learn where to stop",)
        if kind == "messages" and examples:
            special = {int(token) for token in getattr(self.tokenizer, "all_special_ids", [])} | set(getattr(self.tokenizer, "added_tokens_decoder", {}))
            if not special & set(examples[0].ids[examples[0].trained].tolist()):
                return ("the chat template ends answers without a special token: the model will not learn where to stop",)
        return ()


class _Tally:
    """Examples as they come, and the counts of the report."""

    def __init__(self, records: Records, mask: str, max_len: int) -> None:
        self.records, self.mask, self.max_len = records, mask, max_len
        self.examples: list[Example] = []
        self.straddled = 0
        self._cut: list[int] = []
        self._dropped: list[int] = []

    def keep(self, ids: NDArray[np.int32], trained: NDArray[np.bool_], line: int) -> None:
        whole = len(ids)
        ids, trained = ids[: self.max_len], trained[: self.max_len]
        if not trained.any():
            self._dropped.append(line)
            return
        if whole > self.max_len:
            self.cut(line)
        self.examples.append(Example(ids, trained, line))

    def cut(self, line: int) -> None:
        self._cut.append(line)

    def close(self, notes: tuple[str, ...]) -> Encoded:
        if not self.examples:
            message = f"{self.records.path}: of {len(self.records)} records none has a target within {self.max_len} tokens (first: {self.records.where(0)})"
            raise IncompatibleError(message, hint="raise --max-len")
        report = EncodeReport(
            kind=self.records.kind,
            mask=self.mask,
            examples=len(self.examples),
            tokens=sum(len(example.ids) for example in self.examples),
            trained_tokens=sum(int(example.trained.sum()) for example in self.examples),
            longest=max(len(example.ids) for example in self.examples),
            truncated=len(self._cut),
            truncated_lines=tuple(self._cut[:_NAMED]),
            dropped=len(self._dropped),
            dropped_lines=tuple(self._dropped[:_NAMED]),
            straddled=self.straddled,
            notes=notes,
        )
        return Encoded(tuple(self.examples), report)


def _encode_stream(records: Records, voice: _Voice, tally: _Tally) -> None:
    """A long text as windows. It is cut for the tokenizer only at line breaks before a word, where no token of a byte-level vocabulary crosses."""
    for row, line in zip(records.rows, records.lines, strict=True):
        ids = np.concatenate([np.asarray(piece, dtype=np.int32) for text in _pieces(row["text"]) for piece in voice.ids([text])])
        for window in windows(ids, tally.max_len, voice.lead):
            trained = np.ones(len(window), dtype=np.bool_)
            trained[: max(1, len(voice.lead))] = False
            tally.keep(window, trained, line)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        found = _PIECE_END.search(text, start + _PIECE_CHARS)
        end = found.end() if found else len(text)
        yield text[start:end]
        start = end


def _render(records: Records, number: int, tokenizer: Any, mask: str) -> _Rendered:
    row = records.rows[number]
    if records.kind == "messages":
        text, spans = _conversation(row, tokenizer, records.where(number), mask)
        return _Rendered(text, spans, framed=False)
    if records.kind == "completion":
        text = row["prompt"] + row["completion"]
        return _Rendered(text, ((0 if mask == "all" else len(row["prompt"]), len(text)),), framed=True)
    return _Rendered(row["text"], ((0, len(row["text"])),), framed=True)


def _conversation(row: dict[str, Any], tokenizer: Any, where: str, mask: str) -> tuple[str, tuple[Span, ...]]:
    turns = row["messages"]
    whole = _apply(tokenizer, row, len(turns), False, where)
    if mask == "all":
        return whole, ((0, len(whole)),)
    spans: list[Span] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _apply(tokenizer, row, index, True, where)
        through = whole if index == len(turns) - 1 else _apply(tokenizer, row, index + 1, False, where)
        for prefix, of in ((before, through), (through, whole)):
            if not of.startswith(prefix):
                raise _rewritten(where, index, prefix, of)
        spans.append((len(before), len(through)))
    return whole, tuple(spans)


def _apply(tokenizer: Any, row: dict[str, Any], turns: int, prompt: bool, where: str) -> str:
    """The first ``turns`` turns through the chat template, as text."""
    from jinja2 import TemplateError

    extra = {"tools": row["tools"]} if row.get("tools") else {}
    try:
        return str(tokenizer.apply_chat_template(row["messages"][:turns], tokenize=False, add_generation_prompt=prompt, **extra))
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        cause = f"{type(error).__name__}: {error}" if not isinstance(error, TemplateError) else str(error)
        roles = ", ".join(turn["role"] for turn in row["messages"])
        raise IncompatibleError(f"{where}: the base's chat template refuses this conversation ({roles}): {cause}") from error


def _rewritten(where: str, index: int, prefix: str, whole: str) -> IncompatibleError:
    same = next((at for at, (left, right) in enumerate(zip(prefix, whole, strict=False)) if left != right), min(len(prefix), len(whole)))
    message = (
        f"{where}: the base's chat template rewrites what precedes or follows turn {index + 1}, so its answer cannot be told from the rest: "
        f"after {prefix[max(0, same - 40) : same]!r} there is {prefix[same : same + 40]!r} with the later turns left out, {whole[same : same + 40]!r} with them"
    )
    return IncompatibleError(f"{message}\n{_shown(whole)}", hint="give each answer a record of its own, with the turns before it, or pass --mask all")


def _nothing_trained(records: Records, number: int, rendered: _Rendered) -> IncompatibleError:
    spans: list[tuple[str, bool]] = []
    at = 0
    for begin, end in rendered.spans:
        spans += [(rendered.text[at:begin], False), (rendered.text[begin:end], True)]
        at = end
    spans.append((rendered.text[at:], False))
    message = f"{records.where(number)}: nothing of this example would be trained\n{marked(spans)}"
    return IncompatibleError(message, hint="give it an assistant turn or a completion, or take the record out")


def _is_prefix(ids: list[int], whole: list[int]) -> bool:
    return whole[: len(ids)] == ids


def _shown(text: str) -> str:
    half = _SHOWN_CHARS // 2
    return text if len(text) <= _SHOWN_CHARS else f"{text[:half]} ... {text[-half:]}"
