"""Files that hold one group of tensors per module (``<name>.<leaf>``): sorting, naming, and the ledger that forgets no key.

Kohya and LyCORIS files share this; they differ in the leaves they know and in what a group means. Leaves out the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from qlora_tools.adapters.formats import names
from qlora_tools.adapters.formats.names import Base, Modules, Shape, Target
from qlora_tools.adapters.portable import Layer, Portable
from qlora_tools.errors import CorruptError, IncompatibleError, QltError, UsageError
from qlora_tools.names import shortened

T = TypeVar("T")
_NO_BASE = "read without the base: names are taken for those of Stable Diffusion, shapes are as the file has them"


@dataclass(frozen=True)
class Group:
    """What a file says about one layer. ``name`` as in the file, ``tensors`` by leaf, ``target`` what it is in the base."""

    name: str
    target: Target
    tensors: Mapping[str, torch.Tensor]

    @property
    def shape(self) -> Shape | None:
        """The base's weight, if known."""
        return self.target.shape

    def key(self, leaf: str) -> str:
        """The key of a leaf in the file."""
        return f"{self.name}.{leaf}"


@dataclass(frozen=True)
class Built:
    """A layer, and the rank that the file had for it where the layer's is another."""

    layer: Layer
    stored_rank: int | None = None


@dataclass
class _Sorted:
    groups: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)  # component -> name -> leaf -> key
    leftover: list[str] = field(default_factory=list)


def split_leaf(key: str, leaves: Collection[str]) -> tuple[str, str] | None:
    """``(name, leaf)`` where a key ends in one of ``leaves``."""
    return next(((key[: -len(leaf) - 1], leaf) for leaf in leaves if key.endswith(f".{leaf}")), None)


def read(
    tensors: Mapping[str, torch.Tensor],
    leaves: Collection[str],
    build: Callable[[Group], Built],
    modules: Modules | Mapping[str, Modules] | None,
    component: str | None,
) -> tuple[dict[str, dict[str, Built]], tuple[str, ...]]:
    """Component -> module path -> what ``build`` made of its group, and notes.

    ``component``: read this one alone; the others are mentioned in the notes. ``leaves``: longest first where one ends another.

    Raises:
        IncompatibleError: keys that are none of ``leaves``, or modules that the base lacks; all are named. Whatever ``build``
        raises, joined where several modules are wrong.
    """
    sorted_keys = _sort(tensors, leaves)
    if sorted_keys.leftover:
        raise IncompatibleError(
            f"{len(sorted_keys.leftover)} keys of the adapter are not understood: {shortened(sorted_keys.leftover, 20)}",
            hint="nothing was converted: leaving them out would change what the adapter does",
        )
    chosen, notes = choose(sorted_keys.groups, component)
    problems: list[QltError] = []
    result: dict[str, dict[str, Built]] = {}
    for part, base in names.bases(modules, chosen).items():
        made: dict[str, Built] = {}
        for group in _named(tensors, chosen[part], base):
            twice = [piece.module for piece in group.target.pieces if piece.module in made]
            if twice:
                raise IncompatibleError(f"`{group.name}` and another name in the file both mean `{twice[0]}`", hint="remove one of them")
            try:
                built = build(group)
            except QltError as error:
                problems.append(error)
            else:
                made |= {piece.module: Built(piece.cut(built.layer), built.stored_rank) for piece in group.target.pieces}
        result[base.component] = made
    raise_all(problems)
    return result, notes if modules is not None else (*notes, _NO_BASE)


def _sort(tensors: Mapping[str, torch.Tensor], leaves: Collection[str]) -> _Sorted:
    result = _Sorted()
    for key in tensors:
        split = split_leaf(key, leaves)
        place = names.component_of(split[0]) if split else None
        if split is None or place is None:
            result.leftover.append(key)
        else:
            result.groups.setdefault(place[0], {}).setdefault(split[0], {})[split[1]] = key
    if not tensors:
        raise CorruptError("the adapter holds no tensors", hint="save the adapter again")
    return result


def choose(groups: dict[str, T], component: str | None) -> tuple[dict[str, T], tuple[str, ...]]:
    """The component asked for, or all, and a note on what was left. Raises UsageError where it is not in the file."""
    if component is None:
        return groups, ()
    found = next((name for name in names.synonyms(component) if name in groups), None)
    if found is None:
        raise UsageError(f"the adapter does not change `{component}`", hint=f"it changes {shortened(sorted(groups))}")
    others = sorted(set(groups) - {found})
    return {found: groups[found]}, ((f"left out on request: {', '.join(others)}",) if others else ())


def _named(tensors: Mapping[str, torch.Tensor], groups: dict[str, dict[str, str]], base: Base) -> Iterator[Group]:
    paths: dict[str, str] = {}
    for name in groups:
        _, path = names.component_of(name) or ("", name)
        if paths.setdefault(path, name) != name:
            raise IncompatibleError(f"`{name}` and `{paths[path]}` both mean `{path}`", hint="remove one of them")
    for path, target in names.resolve(paths, base.component, base.modules).items():
        name = paths[path]
        yield Group(name, target, {leaf: tensors[key] for leaf, key in groups[name].items()})


def raise_all(problems: list[QltError]) -> None:
    """Raise the first of ``problems`` with what all of its kind say; does nothing without any."""
    if not problems:
        return
    alike = [str(problem) for problem in problems if type(problem) is type(problems[0])]
    raise type(problems[0])(shortened(alike, 8).replace("\n", " "), hint=problems[0].hint)


def portables(built: Mapping[str, Mapping[str, Built]], metadata: Mapping[str, str], notes: tuple[str, ...]) -> dict[str, Portable]:
    """Component -> adapter."""
    base = metadata.get("ss_sd_model_name") or metadata.get("ss_base_model_version")
    return {
        component: Portable({module: found.layer for module, found in layers.items()}, base_name=base, notes=(*notes, *_growth(layers)))
        for component, layers in built.items()
    }


def _growth(layers: Mapping[str, Built]) -> tuple[str, ...]:
    grown = [(found.stored_rank, found.layer.rank) for found in layers.values() if found.stored_rank is not None and found.stored_rank != found.layer.rank]
    if not grown:
        return ()
    before, after = min(rank for rank, _ in grown), max(rank for _, rank in grown)
    return (f"{len(grown)} modules were expanded exactly to plain factors: rank {before} became up to {after}; `qlt adapters resize` makes them small again",)
