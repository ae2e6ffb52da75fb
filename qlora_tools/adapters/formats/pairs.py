"""A pair of factors from a stranger's file, made into a layer: checked, squeezed to the shape that the base has.

Owns the checks every image format shares: ranks that agree, a sane alpha, shapes that fit. Leaves out the numbers themselves
(``values.py``), names (``names.py``) and where the factors come from.

Axes: O outputs, I inputs, R rank, k kernel axes.
"""

from __future__ import annotations

import math

import torch

from qlora_tools.adapters.portable import CONV, LINEAR, Layer
from qlora_tools.adapters.values import checked
from qlora_tools.errors import CorruptError, IncompatibleError, NonFiniteError, UnsupportedError


def factor(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` checked (``values.py``), with two axes or more. Raises CorruptError for fewer."""
    if tensor.ndim < 2:
        raise CorruptError(f"`{key}` is {list(tensor.shape)}, expected a matrix", hint="save the adapter again")
    return checked(key, tensor)


def scalar(key: str, tensor: torch.Tensor) -> float:
    """The one number in ``tensor``, which may be an integer tensor.

    Raises:
        CorruptError: more than one number. NonFiniteError: NaN or infinity.
    """
    if tensor.numel() != 1 or tensor.is_complex():
        raise CorruptError(f"`{key}` is {tensor.dtype} {list(tensor.shape)}, expected one number", hint="save the adapter again")
    value = float(tensor.double().item())
    if not math.isfinite(value):
        raise NonFiniteError(f"`{key}` is {value}", hint="set it to the alpha that the adapter was trained with")
    return value


def alpha_scale(key: str, alpha: torch.Tensor | None, rank: int) -> float:
    """alpha / rank; 1 without alpha.

    Raises:
        UnsupportedError: alpha is 0, which some trainers read as the rank and others as nothing. See also :func:`scalar`.
    """
    if alpha is None:
        return 1.0
    value = scalar(key, alpha)
    if value == 0.0:
        raise UnsupportedError(f"`{key}` is 0: trainers take that for the rank, other readers for no effect", hint=f"write {rank} there for full strength")
    return value / rank


def layer(name: str, a: torch.Tensor, b: torch.Tensor, scale: float, shape: tuple[int, ...] | None, magnitude: torch.Tensor | None = None) -> Layer:
    """The layer of a down factor ``a`` [R, I, k...] and an up factor ``b`` [O, R, 1...].

    ``shape`` is the base's weight, [O, I] or [O, I, k...]; linear layers stored as 1x1 convolutions are squeezed to it and the
    other way round. Without it the file's own shape decides. ``magnitude``: any shape with O numbers.

    Raises:
        CorruptError: the two do not belong together. IncompatibleError: they do not fit the base.
    """
    if a.shape[0] != b.shape[1] or any(size != 1 for size in b.shape[2:]):
        raise CorruptError(f"`{name}`: factors {list(a.shape)} and {list(b.shape)} do not multiply", hint="save the adapter again")
    rank = a.shape[0]
    wanted = tuple(a.shape[1:]) if shape is None else tuple(shape[1:])
    found = _squeezed(tuple(a.shape[1:]), len(wanted))
    if not wanted or found != wanted or (shape is not None and b.shape[0] != shape[0]):
        raise IncompatibleError(
            f"`{name}`: factors {list(a.shape)} and {list(b.shape)} for a weight of {list(shape or ())}",
            hint="give the base model that the adapter was trained on",
        )
    lengths = None if magnitude is None else _magnitude(name, magnitude, b.shape[0])
    ones = (1,) * (len(wanted) - 1)
    return Layer(a.reshape(rank, *wanted), b.reshape(b.shape[0], rank, *ones), scale, CONV if ones else LINEAR, magnitude=lengths)


def _squeezed(sizes: tuple[int, ...], length: int) -> tuple[int, ...]:
    """``sizes`` with trailing ones dropped or added to have ``length`` axes, where that is possible."""
    if len(sizes) > length and all(size == 1 for size in sizes[length:]):
        return sizes[:length]
    return sizes + (1,) * (length - len(sizes))


def _magnitude(name: str, magnitude: torch.Tensor, outputs: int) -> torch.Tensor:
    if magnitude.numel() != outputs or max(magnitude.shape, default=1) != outputs:
        raise IncompatibleError(f"`{name}`: DoRA lengths {list(magnitude.shape)} for {outputs} outputs", hint="save the adapter again")
    return magnitude.reshape(-1)
