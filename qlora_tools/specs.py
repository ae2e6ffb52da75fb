"""What a tensor is without its values: name, dtype, shape. And the one table of dtypes.

Dtype names are safetensors' own (``"BF16"``); the table maps them to torch and to ONNX
(``onnx.TensorProto`` enumeration values) and gives bits per element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qlora_tools.errors import UnsupportedError


@dataclass(frozen=True)
class DType:
    """One row of the dtype table. ``onnx`` is the ``TensorProto.DataType`` value, ``None`` where ONNX has none."""

    name: str
    bits: int
    torch: torch.dtype
    onnx: int | None

    @property
    def is_float(self) -> bool:
        return self.torch.is_floating_point


DTYPES: dict[str, DType] = {
    row.name: row
    for row in (
        DType("BOOL", 8, torch.bool, 9),
        DType("U8", 8, torch.uint8, 2),
        DType("I8", 8, torch.int8, 3),
        DType("F8_E4M3", 8, torch.float8_e4m3fn, 17),
        DType("F8_E5M2", 8, torch.float8_e5m2, 19),
        DType("I16", 16, torch.int16, 5),
        DType("U16", 16, torch.uint16, 4),
        DType("F16", 16, torch.float16, 10),
        DType("BF16", 16, torch.bfloat16, 16),
        DType("I32", 32, torch.int32, 6),
        DType("U32", 32, torch.uint32, 12),
        DType("F32", 32, torch.float32, 1),
        DType("I64", 64, torch.int64, 7),
        DType("U64", 64, torch.uint64, 13),
        DType("F64", 64, torch.float64, 11),
    )
}
_BY_TORCH = {row.torch: row for row in DTYPES.values()}


def dtype(name: str) -> DType:
    """The row for a safetensors dtype name."""
    try:
        return DTYPES[name]
    except KeyError:
        raise UnsupportedError(f"dtype `{name}` is not one this version reads", hint="convert the checkpoint to bf16, fp16 or fp32 first") from None


def dtype_of(torch_dtype: torch.dtype) -> DType:
    """The row for a torch dtype."""
    try:
        return _BY_TORCH[torch_dtype]
    except KeyError:
        raise UnsupportedError(f"torch dtype {torch_dtype} has no safetensors name here") from None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's name, safetensors dtype name and shape (row-major, last axis fastest)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * dtype(self.dtype).bits // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis; the whole tensor for a scalar."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    @property
    def torch_dtype(self) -> torch.dtype:
        return dtype(self.dtype).torch

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous; writing through the view writes the tensor."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec that describes ``tensor`` under ``name``."""
    return TensorSpec(name, dtype_of(tensor.dtype).name, tuple(tensor.shape))
