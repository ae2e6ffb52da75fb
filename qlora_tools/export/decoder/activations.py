"""Do a model's activations fit fp16? Some families' residual stream passes 65504, which no check of weights tells and no twin in fp32 shows.

Measured where the parity check runs the model anyway: the largest magnitude that goes into any module or comes out of it, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_tools.errors import CheckFailed
from qlora_tools.export.target import Target

LARGEST_FP16 = 65504.0


class Reach:
    """The largest magnitude so far, and the module that gave it."""

    def __init__(self) -> None:
        self.largest, self.module = 0.0, ""

    def look(self, module: str, found: tuple[Any, ...]) -> None:
        for tensor in found:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                largest = float(tensor.abs().max())
                if largest > self.largest:
                    self.largest, self.module = largest, module

    def check(self, target: Target) -> None:
        """Hold what was seen to the dtype of the graph.

        Raises:
            CheckFailed: a graph in fp16 would give infinity.
        """
        if target.compute == "F16" and self.largest > LARGEST_FP16:
            raise CheckFailed(
                f"activations of `{self.module}` reach {self.largest:.3g}, more than fp16 holds ({LARGEST_FP16:g})",
                hint="export a graph that computes in bf16: --dtype bf16",
            )


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[Reach]:
    """What goes through ``model``'s modules while it runs. Masks, which are given by keyword, do not count."""
    reach = Reach()

    def watching(name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        return lambda _, given, found: reach.look(name, (*given, *(found if isinstance(found, tuple | list) else (found,))))

    handles = [module.register_forward_hook(watching(name)) for name, module in model.named_modules() if name]
    try:
        yield reach
    finally:
        for handle in handles:
            handle.remove()
