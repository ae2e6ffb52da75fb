"""Adapters of kohya-ss sd-scripts: one file, underscored names, one alpha per module.

Keys, after a prefix that names the component (``lora_unet_``, ``lora_te_``, ``lora_te1_`` ...) and the module path with ``_`` for ``.``::

    .lora_down.weight [R, I] or [R, I, k, k]     .lora_up.weight [O, R] or [O, R, 1, 1]
    .alpha, one number                           weight += alpha / R * up down; R where it is missing
    .dora_scale [O, 1] or [O, 1, 1, 1]           rows of the sum rescaled to these lengths

SDXL's UNet goes by the names of the research code (``sgm.py``). Files that also hold LyCORIS leaves are ``lycoris.py``'s.

Source: kohya-ss/sd-scripts ``networks/lora.py``; KohakuBlueleaf/LyCORIS ``modules/locon.py`` for ``dora_scale``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch

from qlora_tools.adapters.formats import grouped, names, pairs, sgm
from qlora_tools.adapters.formats.grouped import Built, Group
from qlora_tools.adapters.formats.names import Modules
from qlora_tools.adapters.portable import EMBEDDING, Layer, Portable
from qlora_tools.adapters.values import checked
from qlora_tools.errors import CorruptError, UnsupportedError
from qlora_tools.names import shortened

DOWN, UP, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
LEAVES = (DOWN, UP, ALPHA, DORA)
#: Modules that only SDXL has: its added conditions, and more than one transformer layer in a block.
_OF_SDXL = re.compile(r"add_embedding\.|(down|mid|up)_blocks?\..*transformer_blocks\.[1-9]")
#: Component -> first part of the names that are written. SD 1 and 2 have one text encoder, called ``lora_te_``.
_PREFIXES = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
    "": "lora_unet_",
}


def recognise(keys: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file with these keys is one of this format: underscored names and nothing but its four leaves."""
    return any(key.endswith(f".{DOWN}") for key in keys) and all(key.startswith(tuple(names.UNDERSCORED)) and grouped.split_leaf(key, LEAVES) for key in keys)


def read(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    modules: Modules | Mapping[str, Modules] | None = None,
    *,
    component: str | None = None,
) -> dict[str, Portable]:
    """Component of the pipeline -> adapter for it. ``modules``: the base's modules, of one model or by component.

    Without ``modules`` only names of Stable Diffusion 1, 2 and XL are understood, and linear or convolution is as the file has
    it. ``component``: read this one alone.

    Raises:
        IncompatibleError: keys or names that fit nothing; shapes that do not fit the base. UnsupportedError: names that need
        the base. CorruptError, NonFiniteError: broken tensors. UsageError: several components for one base model.
    """
    built, notes = grouped.read(tensors, LEAVES, build, modules, component)
    return grouped.portables(built, metadata, notes)


def build(group: Group) -> Built:
    """The layer of one group of this format's leaves."""
    missing = [leaf for leaf in (DOWN, UP) if leaf not in group.tensors]
    if missing:
        raise CorruptError(f"`{group.key(missing[0])}` is missing beside {shortened(group.tensors)}", hint="the file is incomplete: download it again")
    down, up = (pairs.factor(group.key(leaf), group.tensors[leaf]) for leaf in (DOWN, UP))
    return Built(pairs.layer(group.name, down, up, alpha_scale(group, down.shape[0]), group.shape, magnitude(group)))


def alpha_scale(group: Group, rank: int) -> float:
    """alpha / rank of a group."""
    return pairs.alpha_scale(group.key(ALPHA), group.tensors.get(ALPHA), rank)


def magnitude(group: Group) -> torch.Tensor | None:
    """DoRA's lengths [O] of a group, ``None`` without.

    Raises:
        UnsupportedError: lengths per input, which is another decomposition than PEFT's.
    """
    if DORA not in group.tensors:
        return None
    lengths = checked(group.key(DORA), group.tensors[DORA])
    if lengths.ndim >= 2 and lengths.shape[0] == 1 and lengths.shape[1] > 1:
        raise UnsupportedError(f"`{group.key(DORA)}` {list(lengths.shape)} rescales inputs, PEFT's DoRA rescales outputs", hint="merge it where it was trained")
    return lengths


def write(
    portables: Mapping[str, Portable], *, modules: Modules | None = None, use_sgm_names: bool | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of one file with every component's adapter.

    ``use_sgm_names``: name the UNet's modules as the research code does, which readers expect of SDXL; by default when
    something tells that it is SDXL. ``modules``: the UNet's modules; SDXL's without.

    Raises:
        UnsupportedError: something that this format cannot hold (biases, embeddings, whole tensors) or name, by name.
    """
    if use_sgm_names is None:
        changed = [module for component in ("unet", "") if component in portables for module in portables[component].layers]
        use_sgm_names = "text_encoder_2" in portables or any(_OF_SDXL.match(name) for name in (*changed, *(modules or ())))
    research = {module: spelling for spelling, module in sgm.spellings(modules or sgm.sdxl_modules())} if use_sgm_names else {}
    tensors: dict[str, torch.Tensor] = {}
    for component, portable in portables.items():
        refuse_unwritable(portable, "kohya")
        prefix = _prefix(component, portables)
        for module, layer in portable.layers.items():
            spelling = research.get(module) if use_sgm_names and component in ("unet", "") else module
            if spelling is None:
                raise UnsupportedError(f"`{module}` has no name in SDXL's UNet", hint="give the UNet with --base, or ask for diffusers' names")
            for leaf, tensor in _leaves(layer).items():
                _put(tensors, f"{prefix}{names.flat(spelling)}.{leaf}", tensor)
    return tensors, _metadata(portables)


def _prefix(component: str, portables: Mapping[str, Portable]) -> str:
    if component == "text_encoder" and set(portables) <= {"unet", "text_encoder"}:
        return "lora_te_"
    if component not in _PREFIXES:
        raise UnsupportedError(f"kohya files have no name for `{component}` as this base has it", hint="write diffusers or PEFT")
    return _PREFIXES[component]


def _put(tensors: dict[str, torch.Tensor], key: str, tensor: torch.Tensor) -> None:
    if key in tensors:
        raise UnsupportedError(f"two modules of the adapter would both be called `{key}`", hint="write another format")
    tensors[key] = tensor.contiguous()


def _leaves(layer: Layer) -> dict[str, torch.Tensor]:
    leaves = {DOWN: layer.a, UP: layer.b, ALPHA: torch.tensor(layer.scale * layer.rank, dtype=torch.float32)}
    if layer.magnitude is not None:
        leaves[DORA] = layer.magnitude.reshape(-1, *(1 for _ in layer.a.shape[1:]))
    return leaves


def _metadata(portables: Mapping[str, Portable]) -> dict[str, str]:
    layers = [layer for portable in portables.values() for layer in portable.layers.values()]
    ranks, alphas = {layer.rank for layer in layers}, {layer.scale * layer.rank for layer in layers}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


def refuse_unwritable(portable: Portable, format_name: str, *, biases: bool = False) -> None:
    """Raise for what files of image models have no place for. ``biases``: they have for biases.

    Raises:
        UnsupportedError: names every such tensor.
    """
    wrong = [*portable.replacements, *portable.token_rows]
    wrong += [module for module, layer in portable.layers.items() if layer.kind == EMBEDDING or (layer.bias is not None and not biases)]
    if wrong:
        raise UnsupportedError(
            f"{format_name} files cannot hold whole tensors, token rows, embeddings{'' if biases else ' or biases'}: {shortened(wrong, 20)}",
            hint="write PEFT, or merge the adapter",
        )
