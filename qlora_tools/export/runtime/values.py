"""Tensors of the runtime's own: made on a device, filled and read back whatever their element type.

numpy has no bfloat16: such tensors travel as their 16 bits, and logits are widened to fp32 when they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

from qlora_tools.errors import UnsupportedError


@dataclass(frozen=True)
class Kind:
    """An element type: ``carrier`` is the numpy dtype of the same width that holds it on the host, ``onnx`` its number in ONNX."""

    name: str
    carrier: Any
    onnx: int


FLOATS = {"tensor(float)": Kind("fp32", np.float32, 1), "tensor(float16)": Kind("fp16", np.float16, 10), "tensor(bfloat16)": Kind("bf16", np.uint16, 16)}
INTEGERS = {"tensor(int64)": Kind("int64", np.int64, 7), "tensor(int32)": Kind("int32", np.int32, 6)}


def kind_of(node: Any) -> Kind:
    """Of a graph's input or output.

    Raises:
        UnsupportedError: a type that no decoder has there.
    """
    found = FLOATS.get(node.type) or INTEGERS.get(node.type)
    if found is None:
        raise UnsupportedError(f"`{node.name}` of the graph is {node.type}, expected one of {', '.join((*FLOATS, *INTEGERS))}")
    return found


def empty(kind: Kind, shape: tuple[int, ...], device: str) -> ort.OrtValue:
    """A buffer of the runtime's own: one made from numpy on the CPU would share numpy's memory and alignment."""
    return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), kind.onnx, device, 0)


def filled(kind: Kind, content: NDArray[Any], device: str) -> ort.OrtValue:
    """A copy of ``content``, whose dtype is the kind's carrier, on ``device``."""
    value = empty(kind, content.shape, device)
    if content.size:
        value.update_inplace(np.ascontiguousarray(content))
    return value


def on_host(content: NDArray[Any]) -> ort.OrtValue:
    """``content`` itself as a value, for an input that is read at once."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(content))


def moved(value: ort.OrtValue, device: str) -> ort.OrtValue:
    """A copy of ``value``, which is on the host, on ``device``."""
    kind = {**FLOATS, **INTEGERS}[value.data_type()]
    return filled(kind, read(kind, value), device)


def read(kind: Kind, value: ort.OrtValue) -> NDArray[Any]:
    """The content on the host, in the kind's carrier; a view where the value is on the host and numpy has its type.

    Raises:
        UnsupportedError: bf16 on a device from which this onnxruntime does not copy it.
    """
    if kind.name != "bf16":
        view: NDArray[Any] = value.numpy()
        return view
    content = np.empty(value.shape(), kind.carrier)
    if content.size:
        try:
            ort.OrtValue.ortvalue_from_numpy_with_onnx_type(content, kind.onnx).update_inplace(value)
        except RuntimeError as error:
            hint = "export with fp16 instead, or update onnxruntime"
            raise UnsupportedError(f"onnxruntime {ort.__version__} does not copy bf16 from {value.device_name()}: {error}", hint=hint) from error
    return content


def widened(kind: Kind, content: NDArray[Any]) -> NDArray[Any]:
    """bf16 bits as fp32, exactly; other kinds as they are."""
    if kind.name != "bf16":
        return content
    wide: NDArray[np.float32] = (content.astype(np.uint32) << 16).view(np.float32)
    return wide


def narrowed(kind: Kind, content: NDArray[Any]) -> NDArray[Any]:
    """``content`` in the kind's carrier; fp32 is rounded to bf16 to the nearest, ties to even. Finite numbers only."""
    if kind.name != "bf16":
        return content.astype(kind.carrier, copy=False)
    bits: NDArray[np.uint32] = content.astype(np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def vector(values: list[ort.OrtValue]) -> Any:
    """What ``run_with_ortvaluevector`` takes."""
    result = OrtValueVector()
    result.reserve(len(values))
    for value in values:
        result.push_back(value._ortvalue)
    return result
