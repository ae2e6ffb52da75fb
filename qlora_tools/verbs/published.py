"""What others have published about models of known shapes: told beside our own figures, never among them.

The shape of a config is looked up in ``published.json``; every entry names its source, and what is known of how it was taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.json")
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


@dataclass(frozen=True)
class Published:
    """``about``: what takes ``nbytes``; ``column``: the column of ours that it is nearest to (``weights``, ``running``, ``training``), if any;
    ``model``: whose figure it is; ``remark``: what to mind where ours stands beside it; ``asked``: what to ask of an estimate so that it is of the same work,
    as far as that is known."""

    model: str
    about: str
    nbytes: int
    source: str
    column: str | None = None
    setting: str | None = None
    remark: str | None = None
    asked: Mapping[str, int] = field(default_factory=dict)


@cache
def _known() -> tuple[Mapping[str, Any], ...]:
    return tuple(json.loads(FILE.read_text(encoding="utf-8"))["models"])


def published_for(config: Mapping[str, Any]) -> tuple[Published, ...]:
    """The figures for models of this shape, none where no one of the list has it."""
    pairs = config.get("num_key_value_heads") or config.get("num_attention_heads")
    shape = [pairs if name == "num_key_value_heads" else config.get(name) for name in _SHAPE]
    for row in _known():
        if row["model_type"] == config.get("model_type") and [row["shape"][name] for name in _SHAPE] == shape:
            return tuple(Published(row["name"], **figure) for figure in row["figures"])
    return ()
