"""The two orders in which checkpoints keep the rows of a rotated query or key projection.

Rotary embedding turns pairs of dimensions of a head. Hugging Face checkpoints pair dimension ``i`` with ``i + size/2`` ("halves");
Meta's own, torchtune's and the llama architecture of GGUF pair ``2i`` with ``2i + 1`` ("pairs"). The rows are permuted accordingly,
head by head, and with them the rows of B of a low-rank update. Leaves out which families need it: the formats say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qlora_tools.errors import IncompatibleError, MissingError


def pairs_to_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """[O] or [O, X] in pairs order -> the same rows in halves order; ``heads`` divides O into heads of even size."""
    size = _head_size(rows, heads)
    return rows.reshape(heads, size // 2, 2, -1).transpose(1, 2).reshape(rows.shape).contiguous()


def halves_to_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`pairs_to_halves`."""
    size = _head_size(rows, heads)
    return rows.reshape(heads, 2, size // 2, -1).transpose(1, 2).reshape(rows.shape).contiguous()


def head_counts(base_config: Mapping[str, Any] | None, format_name: str) -> tuple[int, int]:
    """(query heads, key and value heads) of the base.

    Raises:
        MissingError: no config of the base. IncompatibleError: its counts are not whole numbers.
    """
    if base_config is None:
        raise MissingError(
            f"{format_name} keeps the rows of query and key projections in another order, and without the base its head counts are unknown",
            hint="name the model the adapter belongs to with --base",
        )
    values = base_config.get("text_config") or base_config
    heads = _count(values, "num_attention_heads", None)
    return heads, _count(values, "num_key_value_heads", heads)


def _count(values: Mapping[str, Any], name: str, default: int | None) -> int:
    count = values.get(name)
    count = default if count is None else count
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise IncompatibleError(f"config.json of the base: `{name}` is {count!r}, expected a positive whole number")
    return count


def _head_size(rows: torch.Tensor, heads: int) -> int:
    size, rest = divmod(rows.shape[0], heads)
    if rest or size % 2 or not size:
        raise IncompatibleError(
            f"a rotated projection with {rows.shape[0]} rows does not divide into {heads} heads of even size", hint="check that --base is the right model"
        )
    return size
