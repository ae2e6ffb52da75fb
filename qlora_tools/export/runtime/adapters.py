"""LoRA factors as inputs of a graph: which a graph takes, which a file holds, and whether they fit.

A graph made for adapters has optional inputs ``<matrix>.lora_A`` [I, R] and ``<matrix>.lora_B`` [R, O], which default to rank 0: the
base's own output. Factors are fed by name, like any other input. ONNX Runtime's own way, active adapters in the run options, is not
used: ``run_with_iobinding`` ignores them in silence, and of two that share names the second has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from qlora_tools.adapters.formats.onnx_file import open_adapter_file
from qlora_tools.errors import IncompatibleError, MissingError
from qlora_tools.export.runtime.values import moved

SUFFIX = ".onnx_adapter"
_FACTORS = (".lora_A", ".lora_B")
_SHOWN = 3


@dataclass(frozen=True)
class Adapter:
    """Factors on the device, ready to be fed. ``file`` owns the memory of those that were not moved."""

    path: Path
    factors: Mapping[str, ort.OrtValue]
    file: Any


def factor_inputs(session: Any) -> dict[str, Any]:
    """The graph's inputs that adapters fill, by name."""
    return {value.name: value for value in session.get_overridable_initializers() if value.name.endswith(_FACTORS)}


def adapters_beside(folder: Path) -> dict[str, Path]:
    """Adapter files in an export, by name, in order of name."""
    return {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def find_adapter(folder: Path, adapter: str | Path) -> Path:
    """The file that ``adapter`` names: one of the export's own, or a path.

    Raises:
        MissingError: neither.
    """
    beside = adapters_beside(folder)
    if str(adapter) in beside:
        return beside[str(adapter)]
    if Path(adapter).is_file():
        return Path(adapter)
    known = f"it has {', '.join(beside)}" if beside else "it has none"
    raise MissingError(f"`{adapter}` is neither an adapter of {folder} ({known}) nor an {SUFFIX} file", hint="name one of them, or give the path of a file")


def read_adapter(path: Path, inputs: Mapping[str, Any], device: str) -> Adapter:
    """The factors in ``path``, checked against the graph's ``inputs``.

    Raises:
        CorruptError: not an adapter file. IncompatibleError: names, types or shapes that the graph does not have; the message lists them.
    """
    file = open_adapter_file(path)
    found: dict[str, ort.OrtValue] = file.get_parameters()
    wrong = _misfits(found, inputs)
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise IncompatibleError(
            f"{path.name} does not fit this graph: {'; '.join(wrong[:_SHOWN])}{more}", hint="export the adapter together with its base, or anew"
        )
    return Adapter(path, found if device == "cpu" else {name: moved(value, device) for name, value in found.items()}, file)


def _misfits(found: Mapping[str, ort.OrtValue], inputs: Mapping[str, Any]) -> list[str]:
    if not inputs:
        return ["the graph has no inputs for adapters"]
    if not found:
        return ["the file is empty"]
    ranks: dict[str, int] = {}
    wrong = [line for name, value in sorted(found.items()) if (line := _misfit(name, value, inputs.get(name), ranks))]
    return wrong + [f"`{name}` has no `{partner}` beside it" for name, partner in _alone(found)]


def _misfit(name: str, value: ort.OrtValue, wanted: Any, ranks: dict[str, int]) -> str | None:
    """What is wrong with one tensor. ``ranks``: the sizes of named dimensions so far, which both factors of a matrix share."""
    if wanted is None:
        return f"the graph has no input `{name}`"
    if value.data_type() != wanted.type:
        return f"`{name}` is {value.data_type()} in the file and {wanted.type} in the graph"
    shape = list(value.shape())
    fits = len(shape) == len(wanted.shape) and all(
        size == (expected if isinstance(expected, int) else ranks.setdefault(expected, size) if isinstance(expected, str) else size)
        for size, expected in zip(shape, wanted.shape, strict=True)
    )
    return None if fits else f"`{name}` is {shape} in the file and {_shape(wanted.shape, ranks)} in the graph"


def _shape(expected: Iterable[Any], ranks: Mapping[str, int]) -> str:
    return f"[{', '.join(f'{name} = {ranks[name]}' if name in ranks else str(name) for name in expected)}]"


def _alone(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Factors without their partner: rank 0 would be fed in its place."""
    a, b = _FACTORS
    partners = {name: name.removesuffix(a) + b if name.endswith(a) else name.removesuffix(b) + a for name in found}
    return [(name, partner) for name, partner in sorted(partners.items()) if partner not in found]
