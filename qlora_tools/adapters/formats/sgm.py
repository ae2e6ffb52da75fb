"""The two ways to name the modules of a Stable Diffusion UNet: by diffusers, and by the research code it came from.

The research code numbers blocks in one row (``input_blocks.4.1``); diffusers nests them (``down_blocks.1.attentions.0``). Which
number is which follows from how many residual blocks a level has, and that is read off the modules themselves::

    input_blocks.0.0      conv_in
    input_blocks.n.0|1    down_blocks.i.resnets.j | attentions.j       n counts every j of every i, and each downsampler, from 1
    input_blocks.n.0.op   down_blocks.i.downsamplers.0.conv
    middle_block.0|1|2    mid_block.resnets.0 | attentions.0 | resnets.1
    output_blocks.n.0|1   up_blocks.i.resnets.j | attentions.j         n counts every j of every i, from 0
    output_blocks.n.1|2   up_blocks.i.upsamplers.0                     last j of i; 1 where the level has no attention

Also owned here: the module names of the published SD 1, 2 and XL models, for files that come without a base.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

_BLOCK = re.compile(r"(?P<side>down|up)_blocks\.(?P<level>\d+)\.(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)")
_MIDDLE = re.compile(r"mid_block\.(?P<part>resnets|attentions)\.(?P<index>\d+)\.(?P<rest>.+)")
_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}


def spellings(modules: Iterable[str], *, mixed: bool = False) -> Iterator[tuple[str, str]]:
    """``(research name, diffusers name)`` of every module of a UNet among ``modules``.

    ``mixed``: the list joins models with and without attention in a level, as :func:`known_modules` does; upsamplers then
    get both of their numbers.
    """
    listed = list(modules)
    widths = {(side, level): 1 + last for (side, level), last in _last_index(listed).items()}
    attends = {_level(match) for name in listed if (match := _BLOCK.fullmatch(name)) and match["part"] == "attentions"}
    for name in listed:
        if name in _OUTSIDE:
            yield _OUTSIDE[name], name
        elif match := _MIDDLE.fullmatch(name):
            place = 1 if match["part"] == "attentions" else 2 * int(match["index"])
            yield f"middle_block.{place}.{_inner(match)}", name
        elif match := _BLOCK.fullmatch(name):
            for block in _places(match, widths, _level(match) in attends, mixed):
                yield f"{block}.{_inner(match)}".removesuffix("."), name


def _level(match: re.Match[str]) -> tuple[str, int]:
    return match["side"], int(match["level"])


def _last_index(modules: Iterable[str]) -> dict[tuple[str, int], int]:
    """(side, level) -> the highest number of a residual block there."""
    last: dict[tuple[str, int], int] = {}
    for name in modules:
        if (match := _BLOCK.fullmatch(name)) and match["part"] == "resnets":
            last[_level(match)] = max(last.get(_level(match), 0), int(match["index"]))
    return last


def _places(match: re.Match[str], widths: dict[tuple[str, int], int], attends: bool, mixed: bool) -> list[str]:
    """Block numbers of the research code for one module."""
    side, level = _level(match)
    part = match["part"]
    width = widths.get((side, level), 0)
    before = sum(widths.get((side, earlier), 0) + (side == "down") for earlier in range(level))
    if part == "downsamplers":
        return [f"input_blocks.{1 + before + width}.0.op"]
    if part == "upsamplers":
        return [f"output_blocks.{before + width - 1}.{slot}.conv" for slot in ((1, 2) if mixed else (1 + attends,))]
    number = before + int(match["index"])
    row = f"input_blocks.{1 + number}" if side == "down" else f"output_blocks.{number}"
    return [f"{row}.{int(part == 'attentions')}"]


def _inner(match: re.Match[str]) -> str:
    """The path inside a block; samplers have one convolution, which their place already names."""
    part, rest = match["part"], match["rest"]
    if part == "resnets":
        return _RESNET.get(rest, rest)
    return rest if part == "attentions" else ""


_PAIRS = tuple(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
_FEEDS = ("ff.net.0.proj", "ff.net.2")


@cache
def known_modules(component: str) -> tuple[str, ...]:
    """Every module path that SD 1, 2 or XL has in ``component``, in one list; empty for components that they lack."""
    if component == "unet":
        return tuple(_unet(levels=4, depth=10))
    if component.startswith("text_encoder"):
        inner = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
        return (*(f"text_model.encoder.layers.{index}.{name}" for index in range(32) for name in inner), "text_projection")
    return ()


@cache
def sdxl_modules() -> tuple[str, ...]:
    """Module paths of the UNet of SDXL as diffusers names them (three levels; the outermost has no attention)."""
    return tuple(name for name in _unet(levels=3, depth=10) if not name.startswith(("down_blocks.0.attentions", "up_blocks.2.attentions")))


def _unet(levels: int, depth: int) -> Iterator[str]:
    yield from _OUTSIDE
    resnet = [f"resnets.{{}}.{name}" for name in _RESNET]
    attention = [f"attentions.{{}}.{name}" for name in ("proj_in", "proj_out")]
    attention += [f"attentions.{{}}.transformer_blocks.{index}.{name}" for index in range(depth) for name in (*_PAIRS, *_FEEDS)]
    yield from (f"mid_block.{name.format(index)}" for index in range(2) for name in (resnet + attention if index == 0 else resnet))
    for level in range(levels):
        for index in range(3):
            yield from (f"up_blocks.{level}.{name.format(index)}" for name in resnet + attention)
            if index < 2:
                yield from (f"down_blocks.{level}.{name.format(index)}" for name in resnet + attention)
        if level < levels - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv"
            yield f"up_blocks.{level}.upsamplers.0.conv"
