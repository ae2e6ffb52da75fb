"""The layers of Flux under their original names, and the rows of diffusers' layers that they are made of.

The original checkpoint keeps query, key, value and sometimes the feed-forward in one matrix; diffusers has one layer each. A
low-rank update of the stack is one of every part: the down factor is shared, the up factor is cut by rows. So the way in is
exact.

Source: black-forest-labs/flux ``model.py``; huggingface/diffusers ``scripts/convert_flux_to_diffusers.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from qlora_tools.adapters.portable import Layer

_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
#: diffusers has scale before shift here, the original shift before scale.
_HALVES_SWAPPED = "norm_out.linear"


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a layer of the file, all by default, that are one layer of the base; ``swapped``: their halves change places."""

    module: str
    start: int = 0
    stop: int | None = None
    swapped: bool = False

    def cut(self, layer: Layer) -> Layer:
        """The part of ``layer`` that belongs to this piece."""
        if self.stop is None:
            return layer
        half = (self.stop - self.start) // 2 if self.swapped else 0

        def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[self.start : self.stop].roll(-half, dims=0)

        b = rows(layer.b)
        assert b is not None
        return replace(layer, b=b, bias=rows(layer.bias), magnitude=rows(layer.magnitude))


def stacks(modules: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """``(original name, diffusers' layers in the order of their rows)`` for a transformer of diffusers with ``modules``."""
    known = frozenset(modules)
    blocks = {name.split(".")[1] for name in known if name.startswith("single_transformer_blocks.")}
    if not blocks:
        return  # not Flux
    named = [
        (f"single_blocks.{index}.{name}", tuple(f"single_transformer_blocks.{index}.{part}" for part in parts))
        for index in blocks
        for name, parts in _SINGLE.items()
    ]
    double = {name.split(".")[1] for name in known if name.startswith("transformer_blocks.")}
    named += [
        (f"double_blocks.{index}.{name}", tuple(f"transformer_blocks.{index}.{part}" for part in parts)) for index in double for name, parts in _DOUBLE.items()
    ]
    yield from ((name, parts) for name, parts in (*named, *_OUTSIDE.items()) if known.issuperset(parts))


def pieces(parts: tuple[str, ...], outputs: Iterable[int]) -> tuple[Piece, ...]:
    """How the rows of an original layer fall to ``parts`` that have ``outputs`` rows each."""
    found: list[Piece] = []
    start = 0
    for module, rows in zip(parts, outputs, strict=True):
        found.append(Piece(module, start, start + rows, module == _HALVES_SWAPPED))
        start += rows
    return tuple(found)
