"""Floats as the kernels take them: bit patterns, tiles, worker threads, and which 16-bit ones this processor multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qlora_tools.errors import UnsupportedError
from qlora_tools.quant import kernels

TILE_ELEMENTS = 1 << 20  # tiles of fp32 scratch stay inside a core's cache

_KINDS = {torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16, torch.float32: kernels.FP32}


def native_dtype() -> torch.dtype:
    """bf16 where this processor has instructions for it (AMX, AVX512-BF16, Arm bf16), else fp32: emulated bf16 is slower than fp32."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "arm_bf16")) else torch.float32


def bit_patterns(tensor: torch.Tensor) -> tuple[np.ndarray, int]:
    """(the tensor's words as a numpy view of the same shape, its ``kind`` for the kernels). Contiguous CPU floats are not copied.

    fp64 is rounded to fp32 first.

    Raises:
        UnsupportedError: not a float of 16 bits or more.
    """
    tensor = tensor.detach()
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    refuse_non_float(tensor)
    word = torch.uint32 if tensor.dtype == torch.float32 else torch.uint16
    return tensor.contiguous().view(word).numpy(), _KINDS[tensor.dtype]


def refuse_non_float(tensor: torch.Tensor) -> None:
    """Raises UnsupportedError for whole numbers and 8-bit floats."""
    if tensor.dtype not in _KINDS and tensor.dtype != torch.float64:
        raise UnsupportedError(f"cannot quantize {tensor.dtype} values", hint="quantization starts from bf16, fp16 or fp32 weights")


def tiles(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """``start:stop`` cut at multiples of ``step``."""
    while start < stop:
        end = min((start // step + 1) * step, stop)
        yield start, end
        start = end


def in_threads(work: Callable[[int, int], None], stop: int, step: int, threads: int, start: int = 0) -> None:
    """``work(low, high)`` over ``start:stop``, cut at multiples of ``step`` into about ``threads`` pieces that run at once."""
    share = -(-(stop - start) // max(threads, 1))
    share = -(-share // step) * step
    pieces = [(start, stop)] if threads <= 1 else list(tiles(start, stop, max(share, 1)))
    if len(pieces) == 1:
        work(*pieces[0])
    elif pieces:
        with ThreadPoolExecutor(threads) as pool:
            for piece in [pool.submit(work, low, high) for low, high in pieces]:
                piece.result()


def judging_dtype(device: str) -> torch.dtype:
    """What models that are measured compute in: fp32 on the CPU, where nothing is gained by less, bf16 elsewhere."""
    return torch.float32 if device == "cpu" else torch.bfloat16
