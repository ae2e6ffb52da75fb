"""Encoded data as numbered rows, and batches of them as the tensors that a model takes.

Every kind of data is a :class:`Rows`; the loop knows nothing else of it. A language batch carries targets that are
shifted already: ``targets[b, t]`` is the token that position t must predict, and never one of another example.

Decoders need no attention mask here. Padding lies to the right, where a causal model does not look, and examples packed
into one row are told apart by ``position_ids`` that start again at 0 (``packing.check_isolation`` tests the model for
it). Without a mask SDPA takes its causal path. Encoders look both ways and get ``attention_mask`` where rows are padded.

Axes: B rows of a batch, T positions. Left out: a loader with workers; a batch is made in far less time than a step takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.training import packing
from qlora_tools.training.examples import Records
from qlora_tools.training.masks import Example
from qlora_tools.training.order import order

IGNORED = -100
Indices = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """``inputs`` for the model; ``targets`` i64[B, T] (``IGNORED`` where nothing is predicted) or i64[B] class numbers.

    ``count``: targets that count. ``tokens``: real tokens, without padding (images: images).
    """

    inputs: Mapping[str, torch.Tensor]
    targets: torch.Tensor
    count: int
    tokens: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        return replace(self, inputs={name: value.to(device) for name, value in self.inputs.items()}, targets=self.targets.to(device))


class Rows(Protocol):
    """Data of one task, by row number."""

    def __len__(self) -> int: ...

    @property
    def tokens_per_epoch(self) -> int:
        """Real tokens of all rows."""

    @property
    def sha256(self) -> str:
        """Of the content that shapes training."""

    def batch(self, indices: Indices) -> Batch:
        """These rows, in this order."""

    def longest(self) -> int:
        """The number of a row with the most tokens, for measuring memory."""


class LanguageRows:
    """Rows for language modelling: one example each, or with ``pack`` as many as fit into ``max_len`` tokens."""

    def __init__(self, examples: Sequence[Example], *, max_len: int, pack: bool = False, pad_id: int = 0) -> None:
        assert examples, "no examples"
        assert max(len(example.ids) for example in examples) <= max_len, "an example longer than a row"
        self.examples, self.max_len, self.pad_id = tuple(examples), max_len, pad_id
        lengths = [len(example.ids) for example in examples]
        self.bins = packing.pack(lengths, max_len) if pack else [(number,) for number in range(len(examples))]
        self.lengths: NDArray[np.int64] = np.array([sum(lengths[number] for number in chosen) for chosen in self.bins], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.bins)

    @property
    def tokens_per_epoch(self) -> int:
        return int(self.lengths.sum())

    @property
    def fill(self) -> float:
        """Share of ``len(self) * max_len`` positions that hold a token."""
        return self.tokens_per_epoch / (len(self) * self.max_len)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.bins).encode())
        for example in self.examples:
            _digest_ids(digest, example.ids)
            digest.update(np.packbits(example.trained).tobytes())
        return digest.hexdigest()

    def longest(self) -> int:
        return int(self.lengths.argmax())

    def batch(self, indices: Indices) -> Batch:
        chosen = [self.bins[int(index)] for index in indices]
        tokens = int(sum(self.lengths[int(index)] for index in indices))
        width = max(int(self.lengths[int(index)]) for index in indices)
        ids_BT = np.full((len(chosen), width), self.pad_id, dtype=np.int64)
        targets_BT = np.full((len(chosen), width), IGNORED, dtype=np.int64)
        places_BT = np.empty((len(chosen), width), dtype=np.int64)
        for row, numbers in enumerate(chosen):
            at = 0
            for number in numbers:
                example = self.examples[number]
                end = at + len(example.ids)
                ids_BT[row, at:end] = example.ids
                targets_BT[row, at : end - 1] = np.where(example.trained[1:], example.ids[1:], IGNORED)
                at = end
            packed = [len(self.examples[number].ids) for number in numbers]
            places_BT[row] = packing.positions(packed, width) if len(packed) > 1 else np.arange(width)
        inputs = {"input_ids": torch.from_numpy(ids_BT), "position_ids": torch.from_numpy(places_BT)}
        return Batch(inputs, torch.from_numpy(targets_BT), int((targets_BT != IGNORED).sum()), tokens)


class LabelledRows:
    """Rows for text classification. Class numbers follow the base's ``id2label`` where it is given, else the sorted labels."""

    def __init__(self, examples: Sequence[Example], *, pad_id: int = 0, id2label: Mapping[int, str] | None = None) -> None:
        assert examples, "no examples"
        self.examples, self.pad_id = tuple(examples), pad_id
        self.names, self.classes = class_numbers([example.label for example in examples], id2label)
        self.lengths: NDArray[np.int64] = np.array([len(example.ids) for example in examples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens_per_epoch(self) -> int:
        return int(self.lengths.sum())

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.names).encode() + self.classes.astype("<i8").tobytes())
        for example in self.examples:
            _digest_ids(digest, example.ids)
        return digest.hexdigest()

    def longest(self) -> int:
        return int(self.lengths.argmax())

    def batch(self, indices: Indices) -> Batch:
        chosen = [self.examples[int(index)].ids for index in indices]
        width = max(len(ids) for ids in chosen)
        ids_BT = np.full((len(chosen), width), self.pad_id, dtype=np.int64)
        real_BT = np.zeros((len(chosen), width), dtype=np.int64)
        for row, ids in enumerate(chosen):
            ids_BT[row, : len(ids)], real_BT[row, : len(ids)] = ids, 1
        inputs = {"input_ids": torch.from_numpy(ids_BT)}
        if not real_BT.all():
            inputs["attention_mask"] = torch.from_numpy(real_BT)
        targets_B = self.classes[np.asarray(indices, dtype=np.int64)]
        return Batch(inputs, torch.from_numpy(targets_B), len(chosen), int(real_BT.sum()))


def class_numbers(labels: Sequence[str | int | None], id2label: Mapping[int, str] | None = None) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """(names by class number, class numbers i64[n]). Labels are names, or numbers where all of them are.

    With ``id2label`` a name is looked up, exactly or else without regard to case; a number is the class itself, unless
    the names are numbers too. The ``LABEL_0``, ``LABEL_1`` that transformers fills in are no names and count as absent
    beside labels that have some.

    Raises:
        UsageError: fewer than two classes. IncompatibleError: labels that ``id2label`` does not have, or more than it has.
    """
    numeric = all(isinstance(label, int) for label in labels)
    names = tuple(str(id2label[number]) for number in sorted(id2label)) if id2label else ()
    placeholders = all(name == f"LABEL_{place}" for place, name in enumerate(names))
    if names and not (placeholders and not numeric):
        return names, _look_up(labels, names, numeric)
    distinct = sorted({int(label) for label in labels if isinstance(label, int)}) if numeric else sorted({str(label) for label in labels})
    if len(distinct) < 2:
        raise UsageError(f"the data holds one class only, {distinct[0]!r}", hint="classification needs two or more")
    if names and len(distinct) > len(names):
        raise IncompatibleError(f"the base's head knows {len(names)} classes, but the data holds {len(distinct)}", hint="train a new head")
    place_of = {str(label): place for place, label in enumerate(distinct)}
    return tuple(place_of), np.array([place_of[str(label)] for label in labels], dtype=np.int64)


def _look_up(labels: Sequence[str | int | None], names: tuple[str, ...], numeric: bool) -> NDArray[np.int64]:
    by_label: dict[str, int] = {name.casefold(): place for place, name in enumerate(names)} | {name: place for place, name in enumerate(names)}
    if numeric and not all(name.isdecimal() for name in names):
        by_label = {str(place): place for place in range(len(names))}
    found = [by_label.get(str(label), by_label.get(str(label).casefold())) for label in labels]
    strange = sorted({str(label) for label, place in zip(labels, found, strict=True) if place is None})
    if strange:
        message = f"the base's head knows the classes {', '.join(names[:20])}, but the data holds {', '.join(strange[:10])}"
        raise IncompatibleError(message, hint="name the labels as the base does, or train a new head")
    return np.array(found, dtype=np.int64)


class _Divisible(Protocol):
    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Any: ...


_D = TypeVar("_D", bound=_Divisible)


def split(records: _D, share: float, seed: int) -> tuple[_D, _D]:
    """(to train on, held out): ``share`` of the records, at least one, chosen by ``seed``; both keep the records' order.

    Of a text file the end is held out, from a line break on: its parts are not independent, so none is drawn from its middle.

    Raises:
        UsageError: nothing would be left on one side.
    """
    if isinstance(records, Records) and records.kind == "stream":
        return _split_stream(records, share)  # type: ignore[return-value]
    n = len(records)
    held = max(1, round(share * n))
    if not 0 < share < 1 or held >= n:
        raise UsageError(f"a share of {share:g} of {n} records leaves nothing to train on or to hold out", hint="give more data, or a validation file")
    chosen = order(n, seed, epoch=-1)
    return records.take(sorted(chosen[held:].tolist())), records.take(sorted(chosen[:held].tolist()))


def _split_stream(records: Records, share: float) -> tuple[Records, Records]:
    text = records.rows[0]["text"]
    edge = text.rfind("\n", 0, round(len(text) * (1 - share))) + 1
    if not 0 < share < 1 or not text[:edge].strip() or not text[edge:].strip():
        raise UsageError(f"a share of {share:g} of {records.path.name} leaves nothing to train on or to hold out", hint="give more text, or a validation file")
    line = text.count("\n", 0, edge) + 1
    return replace(records, rows=({"text": text[:edge]},)), replace(records, rows=({"text": text[edge:]},), lines=(line,))


def pad_id_of(tokenizer: Any) -> int:
    """A token id to fill with: the padding token, else the end, else 0. It is never a target, whichever it is."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0


def _digest_ids(digest: Any, ids: NDArray[np.int32]) -> None:
    digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
