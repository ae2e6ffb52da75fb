"""Which format an adapter file has, told from names and shapes alone, and the table of formats.

:func:`open_stored` opens a folder or a file without reading a weight; :func:`recognise` finds its row in :data:`FORMATS`;
:func:`read_components` reads it. To add a format: a module in ``formats/`` and a row in ``formats/table.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.adapters.formats.table import FORMATS
from qlora_tools.adapters.pickled import SUFFIXES, read_pickled
from qlora_tools.adapters.portable import Portable
from qlora_tools.adapters.stored import Hints, StoredAdapter
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.errors import CorruptError, IncompatibleError, MissingError, UnsupportedError, UsageError
from qlora_tools.names import nearest, shortened
from qlora_tools.specs import spec_of

CONFIG = "adapter_config.json"
#: Weight files by the name that a tool always gives them, most telling first.
_KNOWN_NAMES = ("adapter_model.safetensors", "adapters.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
_MAX_CONFIG_BYTES = 16 << 20


class _Lazily(Mapping[str, torch.Tensor]):
    """Tensors of a safetensors file, read when asked for."""

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._file.specs:
            raise KeyError(key)
        return self._file.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.specs)

    def __len__(self) -> int:
        return len(self._file.specs)


def open_stored(source: Path, *, allow_pickle: bool = False) -> StoredAdapter:
    """The adapter at ``source``, a file or a folder that holds one. Safetensors are read lazily.

    Raises:
        MissingError: nothing there that could be an adapter. UsageError: several, and no way to choose. UnsupportedError: a
        pickle, and ``allow_pickle`` is not set. CorruptError: not what the suffix promises.
    """
    path = _weights_in(source) if source.is_dir() else source
    if not path.is_file():
        raise MissingError(f"{source} is not there", hint="give the folder or the file of an adapter")
    beside = path.parent / CONFIG
    config = _read_config(beside) if beside.is_file() else None
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic in (b"algg", b"ggla"):
        raise UnsupportedError(f"{path} is an adapter in the ggla format, which its own makers gave up in 2024", hint="convert the original adapter again")
    if magic == b"GGUF":
        return StoredAdapter(path, magic=b"gguf")
    if path.suffix == ".onnx_adapter":
        return StoredAdapter(path, magic=b"onnx_adapter")
    if path.suffix in SUFFIXES:
        tensors = read_pickled(path, allowed=allow_pickle)
        specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
        return StoredAdapter(path, specs, tensors, {}, config)
    if path.suffix == ".safetensors":
        file = SafetensorsFile(path)
        return StoredAdapter(path, file.specs, _Lazily(file), file.metadata, config)
    raise UnsupportedError(
        f"{path} is of no kind that holds an adapter", hint=f"known are .safetensors, .gguf, .onnx_adapter and, with --allow-pickle, {', '.join(SUFFIXES)}"
    )


def _weights_in(folder: Path) -> Path:
    """The one weight file of a folder, or of its one subfolder that holds an adapter."""
    named = [folder / name for name in _KNOWN_NAMES if (folder / name).is_file()]
    if named:
        return named[0]
    for suffixes in ((".safetensors", ".gguf", ".onnx_adapter"), SUFFIXES):
        found = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{folder} holds {len(found)} weight files: {shortened(path.name for path in found)}", hint="give the one that is the adapter")
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if len(inner) == 1:
        return _weights_in(inner[0])
    if inner:
        raise UsageError(f"{folder} holds several adapters: {shortened(path.name for path in inner)}", hint=f"give one of them, such as {inner[0]}")
    raise MissingError(f"{folder} holds no adapter", hint="give the folder or the file with its weights")


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise CorruptError(f"{path} has {path.stat().st_size} bytes, far more than a configuration needs")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}", hint="download or save the adapter again") from None
    if not isinstance(content, dict):
        raise CorruptError(f"{path}: holds {type(content).__name__}, expected an object")
    return content


def recognise(stored: StoredAdapter, wanted: str | None = None) -> str:
    """The name of the format: ``wanted`` if given, else the first row of the table whose marks are all there.

    Raises:
        UsageError: ``wanted`` is no format. UnsupportedError: no format fits; samples of the names are shown.
    """
    if wanted is not None:
        if wanted not in FORMATS:
            close = nearest(wanted, FORMATS, 1)
            raise UsageError(f"--format {wanted!r} is not known", hint=f"did you mean {close[0]}?" if close else f"known are {', '.join(FORMATS)}")
        return wanted
    for name, row in FORMATS.items():
        if row.recognise(stored):
            return name
    raise UnsupportedError(
        f"{stored.path}: no adapter format has tensors such as {shortened(sorted(stored.specs), 4) or 'none at all'}",
        hint=f"known formats are {', '.join(FORMATS)}; choose one with --format",
    )


def read_components(stored: StoredAdapter, name: str, hints: Hints) -> Mapping[str, Portable]:
    """``stored`` read as format ``name``: component -> adapter (``""`` where there is one model), or only ``hints.component``.

    Raises:
        IncompatibleError: no such component. And what the format's reader raises.
    """
    components = FORMATS[name].read(stored, hints)
    if hints.component is None or set(components) == {""}:
        return components
    if hints.component not in components:
        raise IncompatibleError(f"{stored.path} holds no component {hints.component!r}", hint=f"it holds {', '.join(sorted(components))}")
    return {hints.component: components[hints.component]}
