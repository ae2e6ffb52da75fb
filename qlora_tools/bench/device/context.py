"""What a process costs on the device before it holds a model: the driver's context, the libraries' handles and the first kernels.

Held by a process of its own, with the engine's runtime and one small product of matrices, and read by the meter while it is held.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from qlora_tools.bench.device.meter import Meter
from qlora_tools.bench.engine import locate

_ONNX = "qlora_tools.export.runtime.loading:open_one_operator"
_TORCH = "qlora_tools.bench.device.context:open_one_tensor"
_TORCH_ENGINES = "qlora_tools.bench.hf_"


def hold_context(engine: str, meter: Meter, options: Mapping[str, Any]) -> dict[str, int | None]:
    """The meter's reading of this process while it holds next to nothing in the runtime of ``engine`` (an import path).

    ``options``: the setting's; its ``device`` and ``memory`` count.
    """
    held = locate(holder_of(engine))(device=str(options.get("device", "cpu")), memory=str(options.get("memory", "lean")))
    reading = meter.read(os.getpid())
    del held
    return reading


def holder_of(engine: str) -> str:
    """The import path of what holds the same runtime's context."""
    return _TORCH if engine.startswith(_TORCH_ENGINES) else _ONNX


def open_one_tensor(*, device: str, memory: str = "lean") -> Any:
    """A small product on ``device``, finished; torch has one way of allocating, so ``memory`` changes nothing."""
    import torch

    tensor = torch.ones(16, 16, device=device)
    product = tensor @ tensor
    if product.is_cuda:
        torch.cuda.synchronize(product.device)
    return product
