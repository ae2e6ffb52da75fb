"""The numbers of a stranger's adapter, looked at once: floats, at least one, all finite.

Leaves out shapes and names, which every format checks for itself.
"""

from __future__ import annotations

import torch

from qlora_tools.errors import CorruptError, NonFiniteError
from qlora_tools.finite import is_finite

_KEPT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` when it holds finite floats; eight-bit floats come back as fp32, which holds them exactly.

    Raises:
        CorruptError: not a float tensor, or empty. NonFiniteError: NaN or infinity.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        raise CorruptError(f"`{key}` is {tensor.dtype} {list(tensor.shape)}, expected floats", hint="save the adapter again")
    wide = tensor if tensor.dtype in _KEPT else tensor.float()
    if not is_finite(wide):
        raise NonFiniteError(f"adapter tensor `{key}` holds NaN or infinity", hint="the training run diverged: use an earlier checkpoint")
    return wide
