"""Names: of modules, of tensors, of things on disk. String work only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def slug(text: str) -> str:
    """``text`` as one harmless path component: ``org/Model name`` -> ``org-Model-name``. Never empty, never dotted first."""
    cleaned = _UNSAFE.sub("-", text).strip("-.")
    return cleaned or "unnamed"


def split_tensor(name: str) -> tuple[str, str]:
    """``model.layers.0.q_proj.weight`` -> (``model.layers.0.q_proj``, ``weight``). A name with no dot has module ``""``."""
    module, _, leaf = name.rpartition(".")
    return module, leaf


def layer_index(name: str) -> int | None:
    """The first whole-number path part, which is how every family here numbers its layers; ``None`` outside the layers."""
    for part in name.split("."):
        if part.isdigit():
            return int(part)
    return None


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to ``count`` of ``known`` that look most like ``name``, for hints."""
    return get_close_matches(name, list(known), n=count, cutoff=0.4)


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """``a, b, c and 40 more``: a list that fits in an error message."""
    listed = list(names)
    head = ", ".join(listed[:limit])
    rest = len(listed) - limit
    return head if rest <= 0 else f"{head} and {rest} more"
