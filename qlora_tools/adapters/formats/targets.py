"""What readers of single-model formats share: keys sorted by module, factors checked, module paths found in the base, scales baked in.

Every reader has to account for every key; :func:`by_module` is where a key that belongs to nothing is refused. Leaves out what
any one format means by its keys.

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from qlora_tools.adapters.portable import EMBEDDING, LINEAR, Layer, Portable
from qlora_tools.adapters.values import checked
from qlora_tools.errors import CorruptError, IncompatibleError, NonFiniteError, UnsupportedError
from qlora_tools.models.family import family_of
from qlora_tools.names import natural_key, nearest, shortened
from qlora_tools.specs import dtype_of

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "tok_embeddings", "token_embeddings", "embeddings"})
_PREFIXES = ("model.", "transformer.", "base_model.", "language_model.")


def by_module(tensors: Mapping[str, torch.Tensor], pattern: re.Pattern[str], format_name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> slot -> tensor, for keys that ``pattern`` (groups ``module`` and ``slot``) matches whole; in natural order.

    Raises:
        IncompatibleError: keys that do not match, named. CorruptError: not floating point, or empty. NonFiniteError: NaN or infinity.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    leftovers = []
    for key in sorted(tensors, key=natural_key):
        match = pattern.fullmatch(key)
        if match is None:
            leftovers.append(key)
            continue
        found.setdefault(match["module"], {})[match["slot"]] = checked(key, tensors[key])
    if leftovers:
        raise IncompatibleError(
            f"{len(leftovers)} of {len(tensors)} keys are not part of a {format_name} adapter: {shortened(leftovers)}",
            hint="nothing is converted in part; merge the adapter with the tool that made it, or ask for support of these keys",
        )
    if not found:
        raise IncompatibleError(f"no tensors of a {format_name} adapter were found")
    return found


def take_pair(module: str, slots: dict[str, torch.Tensor], names: tuple[str, str], rank_axes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove the two matrices ``names`` from ``slots``; ``rank_axes`` says which axis of each is the rank.

    Raises:
        IncompatibleError: one is missing, not a matrix, or their ranks differ or are zero.
    """
    for name in names:
        if name not in slots:
            raise IncompatibleError(f"`{module}` has {', '.join(sorted(slots))} but no {name}")
    a, b = slots.pop(names[0]), slots.pop(names[1])
    if a.ndim != 2 or b.ndim != 2:
        raise IncompatibleError(f"`{module}`: {names[0]} is {list(a.shape)} and {names[1]} is {list(b.shape)}, expected two matrices")
    if a.shape[rank_axes[0]] != b.shape[rank_axes[1]] or 0 in (*a.shape, *b.shape):
        raise IncompatibleError(f"`{module}`: the ranks of {names[0]} {list(a.shape)} and {names[1]} {list(b.shape)} differ or are zero")
    return a, b


def in_base(module: str, modules: Mapping[str, tuple[int, ...]] | None) -> str:
    """The base's own path for ``module``: itself, or with one leading part more or less. Unchanged when the base is not known.

    Raises:
        IncompatibleError: the base has no such module; names the nearest.
    """
    if modules is None or module in modules:
        return module
    candidates = [module.removeprefix(prefix) for prefix in _PREFIXES] + [prefix + module for prefix in _PREFIXES]
    candidates += [prefix + module.partition(".")[2] for prefix in _PREFIXES if "." in module]
    for candidate in candidates:
        if candidate in modules:
            return candidate
    close = nearest(module, modules)
    raise IncompatibleError(
        f"the base has no module `{module}`" + (f"; the nearest are {', '.join(close)}" if close else ""), hint="check that --base is the right model"
    )


def kind_of(module: str, modules: Mapping[str, tuple[int, ...]] | None, base_config: Mapping[str, Any] | None, embedding_shape: tuple[int, int]) -> str:
    """``EMBEDDING`` or ``LINEAR``. The family or the name decides; a shape in the base that contradicts it, wins.

    ``embedding_shape``: [V, D] the weight would have if this were an embedding.
    """
    known = base_config is not None and family_of(base_config).role(module) != "other"
    role = base_config is not None and family_of(base_config).role(module) == "embedding"
    embedding = role if known else module.rpartition(".")[2] in _EMBEDDINGS
    shape = modules.get(module) if modules else None
    if shape is not None and len(shape) == 2 and shape[0] != shape[1] and set(shape) == set(embedding_shape):
        # A [V, D] weight and the factors of a linear layer [O, I] have their sizes the other way round.
        embedding = embedding and shape == embedding_shape
    return EMBEDDING if embedding else LINEAR


def checked_fit(layers: Mapping[str, Layer], modules: Mapping[str, tuple[int, ...]] | None) -> Mapping[str, Layer]:
    """``layers`` as they are, once every size fits the base's weight (which may be stored inputs first).

    Raises:
        IncompatibleError: every layer that does not fit, with found and expected sizes.
    """
    wrong = []
    for module, layer in layers.items():
        shape = modules.get(module) if modules else None
        if shape is None:
            continue
        outputs, inputs = layer.b.shape[0], math.prod(layer.a.shape[1:])
        weight = (shape[0], math.prod(shape[1:]))
        if (outputs, inputs) not in (weight, weight[::-1] if len(shape) == 2 else weight):
            wrong.append(f"`{module}` updates {outputs} x {inputs}, the base has {list(shape)}")
    if wrong:
        raise IncompatibleError("the adapter does not fit the base: " + "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    return layers


def block_diagonal(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: Sequence[int], total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One update of a fused layer out of updates (a [R_i, I], b [O_i, R_i]) of its parts; part i begins at output ``rows[i]`` of ``total``.

    Returns a [sum R, I] and b [total, sum R], exact, with zeros outside the blocks.
    """
    a = torch.cat([part_a for part_a, _ in pairs])
    b = torch.zeros(total, a.shape[0], dtype=pairs[0][1].dtype)
    column = 0
    for (_, part_b), row in zip(pairs, rows, strict=True):
        b[row : row + part_b.shape[0], column : column + part_b.shape[1]] = part_b
        column += part_b.shape[1]
    return a, b


def baked(b: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * b`` in the dtype of ``b`` where that is exact, else in fp32."""
    product = b.float() * scale
    narrow = product.to(b.dtype)
    return narrow if torch.equal(narrow.float(), product) else product


def narrowed(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` rounded to ``dtype``.

    Raises:
        NonFiniteError: a number is beyond what ``dtype`` holds.
    """
    rounded = tensor.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise NonFiniteError(f"`{name}` holds numbers beyond {dtype_of(dtype).name}", hint="choose F32 or BF16 for the tensors")
    return rounded.contiguous()


def refuse_beyond_factors(portable: Portable, format_name: str, *, magnitudes: bool = False, convolutions: bool = False) -> None:
    """Formats of bare factors cannot say these things, and their consumers would drop them without a word.

    Raises:
        UnsupportedError: what the adapter holds besides factors, by name.
    """
    found: list[tuple[str, Iterable[str]]] = [
        ("biases", [module for module, layer in portable.layers.items() if layer.bias is not None]),
        ("whole tensors (modules_to_save)", portable.replacements),
        ("token rows", portable.token_rows),
    ]
    if not magnitudes:
        found.append(("DoRA magnitudes", [module for module, layer in portable.layers.items() if layer.magnitude is not None]))
    if not convolutions:
        found.append(("convolutions", [module for module, layer in portable.layers.items() if layer.kind not in (LINEAR, EMBEDDING)]))
    said = [f"{what} of {shortened(names)}" for what, names in found if names]
    if said:
        raise UnsupportedError(f"{format_name} cannot hold {'; '.join(said)}", hint="merge the adapter into its base with `qlt merge` and convert the model")
    if not portable.layers:
        raise UnsupportedError("the adapter holds no low-rank layers, so there is nothing to write")


def whole_number(value: object, what: str) -> int:
    """``value`` if it is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CorruptError(f"{what} is {value!r}, expected a positive whole number")
    return value


def real_number(value: object, what: str) -> float:
    """``value`` if it is a finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CorruptError(f"{what} is {value!r}, expected a finite number")
    return float(value)
