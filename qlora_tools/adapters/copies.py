"""Whole tensors in an adapter that are the base's own.

PEFT stores them beside factors on an embedding or a head, though nothing in them was trained. They change nothing where the base is at
hand, and formats of bare factors could not carry them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from qlora_tools.adapters.adapter import Adapter, Part
from qlora_tools.adapters.peft_keys import parse_key
from qlora_tools.adapters.portable import Portable
from qlora_tools.engine.plan import Source, row_tiles
from qlora_tools.names import shortened, split_tensor


def without_copies(portable: Portable, bound: Adapter, base: Source, ties: Mapping[str, str]) -> Portable:
    """``portable`` less the replacements that equal the base's tensors, module by module; with a note of what was left out.

    ``bound`` is the same adapter matched to ``base``; ``ties``: names that the base does not store -> the name that holds their values.
    A copy stays where the adapter ties both ends of the model (dropping one would let it follow the other), and where nothing else is held.
    """
    if portable.tied or not (portable.layers or portable.token_rows):
        return portable
    copies = {parse_key(part.key).path for target, part in bound.replacements.items() if _is_copy(part, base, ties.get(target, target))}
    trained = {split_tensor(name)[0] for name in portable.replacements.keys() - copies}
    dropped = sorted(name for name in copies if split_tensor(name)[0] not in trained)
    if not dropped:
        return portable
    kept = {name: value for name, value in portable.replacements.items() if name not in dropped}
    return replace(portable, replacements=kept, notes=(*portable.notes, f"equal to the base and left out: {shortened(dropped)}"))


def bound_without_copies(bound: Adapter, base: Source, ties: Mapping[str, str]) -> Adapter:
    """``bound`` less the whole tensors that are the base's own; ``ties`` as above."""
    if bound.config.ensure_weight_tying:
        return bound
    kept = {name: part for name, part in bound.replacements.items() if not _is_copy(part, base, ties.get(name, name))}
    return replace(bound, replacements=kept)


def _is_copy(part: Part, base: Source, name: str) -> bool:
    """Whether the values are the same, whatever dtype either side keeps them in; in row tiles, they may be whole vocabularies."""
    if name not in base.specs or part.spec.shape != base.specs[name].shape:
        return False
    return all(_equal(part.read(rows), base.read(name, rows)) for rows in row_tiles(base.specs[name]))


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    common = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(common), second.to(common))
