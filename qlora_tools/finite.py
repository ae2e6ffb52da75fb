"""The refusal of NaN and infinity: every verb that reads weights makes it, in the same words."""

from __future__ import annotations

import torch

from qlora_tools.errors import NonFiniteError

_SLAB_ELEMENTS = 1 << 22


def refuse_non_finite(name: str, tensor: torch.Tensor, *, row: int = 0) -> None:
    """Return quietly when every value is finite. ``row`` is where ``tensor`` starts along axis 0 of the whole.

    Looks slab by slab, so no mask of the whole is made; integers pass.

    Raises:
        NonFiniteError: names the tensor, the count in the first bad slab and the first index.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if not tensor.ndim:
        tensor = tensor.reshape(1)
    step = max(1, _SLAB_ELEMENTS * tensor.shape[0] // tensor.numel())
    for start in range(0, tensor.shape[0], step):
        slab = tensor[start : start + step]
        if not torch.isfinite(slab).all():
            wrong = ~torch.isfinite(slab)
            first = [int(position) for position in wrong.nonzero()[0]]
            first[0] += row + start
            raise NonFiniteError(
                f"`{name}` holds NaN or infinity: {int(wrong.sum())} of the values read so far, the first at {first}",
                hint="the weights are damaged or overflowed during training or merging; use an earlier checkpoint",
            )
