"""How many examples share a row: bins for short ones, windows for a long text, and whether a model keeps them apart.

Examples in one row must not see each other. What does it in transformers is ``position_ids`` that start again at 0 with
each example, *no* attention mask and *no* cache: the model then builds a block-diagonal causal mask itself, sliding
windows included, for eager and SDPA attention alike. With a cache it silently does not, and a few architectures never
do; so :func:`check_isolation` asks the model at hand instead of trusting a list. Left out: a 4-D mask of our own, which
drops sliding windows and wants another dtype for each attention implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_tools.errors import UnsupportedError, UsageError

_PROBE_TOKENS = 6
_TOLERATED_SHARE = 0.1  # of the change that joining two examples without isolation makes; bf16 rounding stays near 0.01


def pack(lengths: Sequence[int] | NDArray[np.integer[Any]], max_len: int) -> list[tuple[int, ...]]:
    """Put items into bins of ``max_len`` by best fit, longest first; each bin names its items in ascending order.

    Best fit decreasing needs at most 11/9 of the least number of bins plus one (Johnson 1974), as first fit does. Bins
    are kept by the room left in them, and the smallest sufficient room is found as a bit of one integer, so 100,000
    items take a fraction of a second. Equal lengths gives equal bins; bins come in the order of their first items.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert sizes.ndim == 1 and max_len > 0, (sizes.shape, max_len)
    assert not len(sizes) or (sizes.min() > 0 and sizes.max() <= max_len), "an item that fits no bin"
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_len + 1)]
    rooms = 0  # bit r is set while a bin with room r is open
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[chosen].append(item)
        else:
            room, chosen = max_len, len(bins)
            bins.append([item])
        left = room - size
        if left:
            with_room[left].append(chosen)
            rooms |= 1 << left
    return sorted(tuple(sorted(items)) for items in bins)


def windows(ids: NDArray[np.int32], max_len: int, lead: Sequence[int] = ()) -> list[NDArray[np.int32]]:
    """Cut a long text i32[T] into windows of up to ``max_len`` tokens; every token of the text is in exactly one of them.

    ``lead`` (a BOS, for tokenizers that add one) starts each window and counts in its length. A last window of one
    token with nothing before it is left out: it has nothing to predict.

    Raises:
        UsageError: windows too short to hold anything.
    """
    step = max_len - len(lead)
    if step < 1 or max_len < 2:
        raise UsageError(f"windows of {max_len} tokens have nothing to predict", hint="raise --max-len")
    head = np.asarray(lead, dtype=np.int32)
    cut = [np.concatenate([head, ids[start : start + step]]).astype(np.int32) for start in range(0, len(ids), step)]
    return [window for window in cut if len(window) > 1]


def positions(lengths: Sequence[int], width: int) -> NDArray[np.int64]:
    """``position_ids`` i64[width] of a row that holds examples of these lengths: each counts from 0, and so does the padding."""
    found = np.empty(width, dtype=np.int64)
    at = 0
    for length in (*lengths, width - sum(lengths)):
        found[at : at + length] = np.arange(length)
        at += length
    return found


def check_isolation(forward: Callable[..., torch.Tensor], vocab_size: int, device: torch.device | str = "cpu") -> None:
    """Make sure that an example's logits in a packed row are those it has alone, by running three short rows.

    ``forward`` takes ``input_ids`` and ``position_ids`` (i64[1, T]) and returns logits [1, T, V]; it must switch the
    cache off (``use_cache=False``) and be without dropout, just as in training apart from that.

    Raises:
        UnsupportedError: the model mixes packed examples, or takes no ``position_ids``.
    """
    draw = np.random.Philox(key=0).random_raw(2 * _PROBE_TOKENS) % np.uint64(vocab_size)
    first, second = draw.astype(np.int64)[:_PROBE_TOKENS], draw.astype(np.int64)[_PROBE_TOKENS:]
    joined, alone = np.concatenate([first, second]), np.arange(_PROBE_TOKENS)

    def logits(ids: NDArray[np.int64], places: NDArray[np.int64]) -> torch.Tensor:
        inputs = {"input_ids": torch.from_numpy(ids)[None].to(device), "position_ids": torch.from_numpy(places)[None].to(device)}
        return forward(**inputs)[0, -_PROBE_TOKENS:].float()

    with torch.no_grad():
        try:
            wanted, packed = logits(second, alone), logits(joined, positions([_PROBE_TOKENS, _PROBE_TOKENS], 2 * _PROBE_TOKENS))
            mixed = logits(joined, np.arange(2 * _PROBE_TOKENS))
        except TypeError as error:
            raise UnsupportedError(f"this model takes no position_ids, so packed examples would see each other ({error})", hint="leave out --pack") from error
    error_size, mixing = float((packed - wanted).abs().max()), float((mixed - wanted).abs().max())
    if not error_size <= _TOLERATED_SHARE * mixing:
        message = f"this model lets packed examples see each other: logits move by {error_size:.3g} beside another example, by {mixing:.3g} when simply joined"
        raise UnsupportedError(message, hint="leave out --pack")
