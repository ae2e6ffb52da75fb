"""Module names in the files of image models: components, underscored paths, and the way back to the base's own names.

Trainers that write ``lora_unet_down_blocks_0_attentions_1_proj_in`` have thrown away which ``_`` was a ``.``. That cannot be
undone, so names are matched forward: every module of the base is spelled the way the file spells names, and looked up.
Without a base the modules of Stable Diffusion (``sgm.py``) stand in for it. Leaves out tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from qlora_tools.adapters.formats import flux, sgm
from qlora_tools.adapters.formats.flux import Piece
from qlora_tools.errors import IncompatibleError, UnsupportedError, UsageError
from qlora_tools.names import nearest, shortened

Shape = tuple[int, ...]
#: Module path -> shape of its weight.
Modules = Mapping[str, Shape]

#: First part of an underscored name -> component of a diffusers pipeline. Longest first.
UNDERSCORED: Mapping[str, str] = {
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "text_encoder",
    "lora_transformer_": "transformer",
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lycoris_": "",
}
#: First part of a dotted name -> the same name as component.
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "diffusion_model")
_TEXT = "text_model."
#: Checkpoints of one file put the parts of a pipeline under these.
_ROOTS = ("model.diffusion_model.", "diffusion_model.")
_FUSED = re.compile(r"(double|single|joint)_(stream_)?blocks|img_attn_qkv|_qkv\b|_linear1\b")


def component_of(key: str) -> tuple[str, str] | None:
    """``(component, rest)`` of a key that starts with an underscored or dotted component; ``None`` for any other key."""
    for prefix, component in UNDERSCORED.items():
        if key.startswith(prefix):
            return component, key.removeprefix(prefix)
    first, dot, rest = key.partition(".")
    return (first, rest) if dot and first in COMPONENTS else None


@dataclass(frozen=True)
class Base:
    """What a component of a file belongs to: its name in the pipeline, and its modules where they are known."""

    component: str
    modules: Modules | None


@dataclass(frozen=True)
class Target:
    """What one name of a file means in the base: a layer with a weight of ``shape`` (if known), made of ``pieces``."""

    shape: Shape | None
    pieces: tuple[Piece, ...]


def bases(modules: Modules | Mapping[str, Modules] | None, components: Iterable[str]) -> dict[str, Base]:
    """Component in the file -> its base. ``modules`` is one model's modules, or component -> modules.

    Raises:
        UsageError: one model for a file that changes several. IncompatibleError: a component that the base does not have.
    """
    wanted = sorted(set(components))
    if modules is None:
        return {component: Base(component, None) for component in wanted}
    if not modules or not isinstance(next(iter(modules.values())), Mapping):
        if len(wanted) > 1:
            raise UsageError(f"the adapter changes {' and '.join(wanted)}, the base is one model", hint=f"name the component, one of {', '.join(wanted)}")
        single = cast(Modules, modules)
        return {component: Base(_denoiser(component, single), single) for component in wanted}
    nested = cast(Mapping[str, Modules], modules)
    found: dict[str, Base] = {}
    for component in wanted:
        same = next((name for name in synonyms(component) if name in nested), None)
        if same is None:
            raise IncompatibleError(
                f"the adapter changes `{component}`, the base has {shortened(nested)}", hint="give the pipeline that the adapter was trained on"
            )
        if any(base.component == same for base in found.values()):
            raise IncompatibleError(f"the adapter changes `{same}` under several names: {shortened(wanted)}", hint="name the component that is wanted")
        found[component] = Base(same, nested[same])
    return found


def synonyms(component: str) -> tuple[str, ...]:
    """Trainers call the denoiser ``unet`` whatever it is."""
    return (component, "transformer", "unet") if component in ("unet", "transformer", "diffusion_model") else (component,)


def _denoiser(component: str, modules: Modules) -> str:
    transformer = any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in modules)
    return "transformer" if transformer and component in ("unet", "transformer", "diffusion_model") else component


def resolve(found: Iterable[str], component: str, modules: Modules | None) -> dict[str, Target]:
    """What each name of a file means in the base.

    Raises:
        IncompatibleError, UnsupportedError: names that mean nothing (:func:`refuse_unmatched`) or several things.
    """
    match = matcher(component, modules)
    stacks = {flat(name): parts for name, parts in flux.stacks(modules)} if modules is not None else {}
    result: dict[str, Target] = {}
    unmatched: list[str] = []
    for name in found:
        module = match(name)
        parts = stacks.get(flat(name))
        if module is not None:
            shape = modules[module] if modules is not None else None
            result[name] = Target(shape, (Piece(module),))
        elif parts is not None and modules is not None:
            pieces = flux.pieces(parts, (modules[part][0] for part in parts))
            result[name] = Target((sum(modules[part][0] for part in parts), *modules[parts[0]][1:]), pieces)
        else:
            unmatched.append(name)
    refuse_unmatched(unmatched, component, modules)
    return result


def matcher(component: str, modules: Modules | None) -> Callable[[str], str | None]:
    """A function from a name in the file, dotted or underscored, to the module path of the base; ``None`` where there is none.

    Raises (when called):
        IncompatibleError: several modules of the base have this name once ``.`` is written ``_``.
    """
    known = list(modules) if modules is not None else sgm.known_modules(component)
    table: dict[str, list[str]] = {}
    for module in known:
        for spelling in (module, *_spellings(module)):
            table.setdefault(flat(spelling), []).append(module)
    if not component.startswith("text_encoder"):
        for spelling, module in sgm.spellings(known, mixed=modules is None):
            table.setdefault(flat(spelling), []).append(module)

    def match(name: str) -> str | None:
        if name in known_set:
            return name
        found = sorted(set(table.get(flat(name), ())))
        if len(found) > 1:
            raise IncompatibleError(f"`{name}` may be any of {shortened(found)} of the base", hint="rename the modules in the file with dots")
        return found[0] if found else None

    known_set = frozenset(known)
    return match


def flat(path: str) -> str:
    """``a.b_c`` -> ``a_b_c``, as the files with underscored names have it."""
    return path.replace(".", "_")


def _spellings(module: str) -> list[str]:
    """Other ways to say the path of one module: text encoders lost their ``text_model.`` in newer libraries."""
    found = [module.removeprefix(root) for root in _ROOTS if module.startswith(root)]
    found.append(module.removeprefix(_TEXT) if module.startswith(_TEXT) else _TEXT + module)
    return found


def refuse_unmatched(names: list[str], component: str, modules: Modules | None) -> None:
    """Raise for names of ``component`` that match no module; does nothing when there are none.

    Raises:
        IncompatibleError: the names are not in the base. UnsupportedError: no base was given and the names are not those of
        Stable Diffusion, or they name layers that the base holds in pieces.
    """
    if not names:
        return
    listed = shortened(names, 20)
    where = f"`{component}`" if component else "the adapter"
    if modules is None:
        raise UnsupportedError(f"{where}: without the base these names cannot be turned into module paths: {listed}", hint="give the base model with --base")
    fused = [name for name in names if _FUSED.search(flat(name))]
    if fused:
        raise UnsupportedError(
            f"{where}: {shortened(fused, 20)} are layers of the original checkpoint that this base holds in other pieces",
            hint="give the base with the names of the trainer, or convert the adapter with diffusers first",
        )
    close = nearest(flat(names[0]), [flat(module) for module in modules], 1)
    raise IncompatibleError(
        f"{where}: {len(names)} names match no module of the base: {listed}",
        hint=f"the nearest module is {close[0]}" if close else "give the base it was trained on",
    )
