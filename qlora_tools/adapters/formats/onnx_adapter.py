"""ONNX Runtime adapters (``.onnx_adapter``): named tensors that the runtime feeds to a graph's inputs of the same names.

The file itself says nothing about modules or scales. For graphs that keep modules apart this package has one rule: per module

* ``<module>.lora_A`` [I, R] and ``<module>.lora_B`` [R, O], the scale multiplied into B, so that the graph computes
  ``x @ A @ B`` and adds it. An embedding has A [V, R] (gathered by token) and B [R, D].

``<module>`` is the path in the Hugging Face checkpoint (``model.layers.0.self_attn.q_proj``). Graphs of ``qlt export`` multiply by packed matrices, and
take adapters by those (``export/decoder/branches.py``). Other tools' names (``....lora_A.weight``,
``....lora_A.MatMul.weight``) carry a scale that only their graph knows, and are refused. Left out: DoRA, biases, replaced tensors,
convolutions.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.adapters.formats.onnx_file import open_adapter_file
from qlora_tools.adapters.formats.targets import baked, by_module, checked_fit, in_base, kind_of, narrowed, refuse_beyond_factors, take_pair
from qlora_tools.adapters.portable import Layer, Portable
from qlora_tools.adapters.stored import NO_HINTS, Hints
from qlora_tools.errors import CorruptError, UnsupportedError, UsageError
from qlora_tools.specs import DTYPES, dtype_of
from qlora_tools.specs import dtype as dtype_named

FORMAT = "onnx_adapter"
_KEY = re.compile(r"(?P<module>.+)\.(?P<slot>lora_A|lora_B)")
_FOREIGN = re.compile(r".+\.lora_[AB](\.[A-Za-z]+)*\.weight")
_VERSION = 1
_STORED = {DTYPES[name].onnx: DTYPES[name] for name in ("F32", "F16", "BF16")}


def recognise(keys: Collection[str], metadata: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
    """True for what :func:`load` gives."""
    return metadata.get("format") == FORMAT


def load(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The versions and the tensors of a file, copied out of the runtime's mapping of it.

    Raises:
        MissingError: no such file. CorruptError: not an adapter file, or sizes that the file cannot hold. UnsupportedError: a dtype
        other than fp32, fp16 or bf16.
    """
    adapter = open_adapter_file(path)
    metadata = {"format": FORMAT, "adapter_version": adapter.get_adapter_version(), "model_version": adapter.get_model_version()}
    parameters = adapter.get_parameters()
    return metadata, {name: _copied(path, name, value) for name, value in parameters.items()}


def read(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None, hints: Hints = NO_HINTS) -> Portable:
    """Tensors as :func:`load` gave them; the scale is in B already.

    Raises:
        UsageError: an alpha was given. IncompatibleError: keys left over or without partner, wrong base. UnsupportedError: names of
        another tool.
    """
    if hints.alpha is not None:
        raise UsageError("the scale of an .onnx_adapter is in its tensors, which no alpha changes", hint="leave --alpha out")
    foreign = [key for key in tensors if _FOREIGN.fullmatch(key)]
    if foreign:
        raise UnsupportedError(f"`{foreign[0]}` is named by another exporter, whose graph holds the scale", hint="import the adapter that it was made from")
    layers = {}
    for path, slots in by_module(tensors, _KEY, "ONNX").items():
        a, b = take_pair(path, slots, ("lora_A", "lora_B"), (1, 0))
        hints.check_rank(path, a.shape[1])
        module = in_base(path, hints.modules)
        kind = kind_of(module, hints.modules, hints.base_config, (a.shape[0], b.shape[1]))
        layers[module] = Layer(a.T.contiguous(), b.T.contiguous(), 1.0, kind)
    return Portable(checked_fit(layers, hints.modules))


def write(portable: Portable, path: Path, *, base_config: Mapping[str, Any] | None = None, dtype: str | None = None) -> None:
    """Write ``path``. ``dtype`` (``F32``, ``F16``, ``BF16``) should be the graph's; ``None`` keeps each tensor's own.

    Raises:
        UnsupportedError: parts that cannot be graph inputs of this kind.
    """
    save_tensors(render(portable, dtype=dtype), path)


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """An adapter file of ``tensors``, in the order of their names: the runtime's own order follows that of insertion."""
    import onnxruntime

    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    adapter.set_parameters({name: _value(tensors[name]) for name in sorted(tensors)})
    adapter.export_adapter(str(path.resolve()))


def render(portable: Portable, *, dtype: str | None = None) -> dict[str, torch.Tensor]:
    """Name -> tensor, as :func:`write` writes them; a graph with these inputs computes the adapted model."""
    refuse_beyond_factors(portable, "an .onnx_adapter")
    tensors = {}
    for module, layer in portable.layers.items():
        tensors[f"{module}.lora_A"] = _stored(module, layer.a, dtype)
        tensors[f"{module}.lora_B"] = _stored(module, baked(layer.b, layer.scale), dtype)
    return tensors


def _stored(module: str, factor: torch.Tensor, dtype: str | None) -> torch.Tensor:
    wanted = dtype_named(dtype) if dtype else dtype_of(factor.dtype)
    return narrowed(module, factor.T, wanted.torch if wanted.onnx in _STORED else torch.float32)


def _value(tensor: torch.Tensor) -> Any:
    import onnxruntime

    if tensor.dtype == torch.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), DTYPES["BF16"].onnx)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _copied(path: Path, name: str, value: Any) -> torch.Tensor:
    """A tensor of its own memory; by address, because the runtime gives no array for bf16."""
    row = _STORED.get(value.element_type())
    if row is None:
        raise UnsupportedError(f"{path}: `{name}` is {value.data_type()}, expected fp32, fp16 or bf16")
    shape, count = value.shape(), value.tensor_size_in_bytes()
    if math.prod(shape) * row.torch.itemsize != count or not count:
        raise CorruptError(f"{path}: `{name}` {shape} does not match its {count} bytes")
    return torch.frombuffer(bytearray(ctypes.string_at(value.data_ptr(), count)), dtype=row.torch).reshape(shape)
