"""The refusal of NaN and infinity: every verb that reads weights makes it, in the same words."""

from __future__ import annotations

import torch

from qlora_tools.errors import NonFiniteError

_SLAB_ELEMENTS = 1 << 22


def is_finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity in it. One sum tells, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def refuse_non_finite(name: str, tensor: torch.Tensor, *, row: int = 0) -> None:
    """Return quietly when every value is finite; integers pass. ``row`` is where ``tensor`` starts along axis 0 of the whole.

    Looks slab by slab, so no mask of the whole is made.

    Raises:
        NonFiniteError: names the tensor, how many values are wrong and where the first is.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    count, first = 0, None
    flat = tensor.reshape(1) if not tensor.ndim else tensor
    step = max(1, _SLAB_ELEMENTS * flat.shape[0] // flat.numel())
    for start in range(0, flat.shape[0], step):
        finite = torch.isfinite(flat[start : start + step])
        if finite.all():
            continue
        wrong = ~finite
        count += int(wrong.sum())
        if first is None:
            first = [int(position) for position in wrong.nonzero()[0]]
            first[0] += row + start
    if first is not None:
        raise NonFiniteError(
            f"{name or 'tensor'}: {count} of {tensor.numel()} values are NaN or infinite, the first at index {first if tensor.ndim else []}",
            hint="the weights are damaged or overflowed during training or merging; check the source checkpoint",
        )
