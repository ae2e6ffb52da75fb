"""The table of adapter formats: how each is told from the others, read, and written.

Rows are tried in order, so a format whose marks are a part of another's stands after it. What a format's names mean is in a file
of its own, imported when used; this file only says which arguments of ours are theirs, and under which file names they write.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tools.adapters.peft_keys import LORA, parse_key
from qlora_tools.adapters.portable import Portable
from qlora_tools.adapters.stored import Hints, StoredAdapter
from qlora_tools.checkpoint.writer import write_tensors
from qlora_tools.errors import UsageError

Components = Mapping[str, Portable]
Write = Callable[[Components, Path, Hints], None]


@dataclass(frozen=True)
class Format:
    """``recognise`` looks at names, shapes and metadata; ``read`` gives the adapter by component (``""`` where there is one model);
    ``write`` puts files into a folder, ``None`` where the format is only read."""

    recognise: Callable[[StoredAdapter], bool]
    read: Callable[[StoredAdapter, Hints], Components]
    write: Write | None = None


def _module(name: str) -> Any:
    return importlib.import_module(f"qlora_tools.adapters.formats.{name}")


def _image_format(name: str, write: Write | None = None) -> Format:
    """Formats of image models: one file for several components, names matched against the base's modules."""

    def recognise(stored: StoredAdapter) -> bool:
        return bool(_module(name).recognise(stored.specs.keys(), stored.metadata))

    def read(stored: StoredAdapter, hints: Hints) -> Components:
        _refuse_scale(stored, hints, f"{name} files")
        found: Components = _module(name).read(stored.tensors, stored.metadata, hints.modules, component=hints.component)
        return found

    return Format(recognise, read, write)


def _language_format(name: str, write: Write | None = None, *, own_file: bool = False) -> Format:
    """Formats of language models: one model, and a configuration beside. ``own_file``: no safetensors, the format opens its file."""

    def recognise(stored: StoredAdapter) -> bool:
        if own_file or stored.magic:
            return stored.magic == (name.encode() if own_file else b"")
        return bool(_module(name).recognise(stored.specs.keys(), stored.metadata, stored.config))

    def read(stored: StoredAdapter, hints: Hints) -> Components:
        config, tensors = _module(name).load(stored.path) if own_file else (stored.config, stored.tensors)
        found: Portable = _module(name).read(tensors, config, hints)
        return {"": found}

    return Format(recognise, read, write)


def _refuse_scale(stored: StoredAdapter, hints: Hints, who: str) -> None:
    for option, value in (("alpha", hints.alpha), ("rank", hints.rank)):
        if value is not None:
            raise UsageError(f"{stored.path}: {option} {value:g} was given, but {who} state it themselves", hint=f"leave --{option} out")


def _is_peft(stored: StoredAdapter) -> bool:
    """With a configuration of PEFT beside; or raw keys that only PEFT's modules have (``lora_A.weight``, not loralib's bare ``lora_A``)."""
    config = stored.config or {}
    factors = [name for name in stored.specs if parse_key(name).kind == LORA]
    if "peft_type" in config or {"r", "target_modules"} <= config.keys():
        return True
    if not factors or stored.magic or _module("diffusers").recognise(stored.specs.keys(), stored.metadata):
        return False
    return all(name.startswith("base_model.") or ".default" in name or name.endswith((".weight", ".lora_magnitude_vector")) for name in factors)


def _read_peft(stored: StoredAdapter, hints: Hints) -> Components:
    from qlora_tools.adapters import portable_peft

    if stored.config is not None:
        _refuse_scale(stored, hints, "adapter_config.json")
    content = stored.config if stored.config is not None else portable_peft.config_of_shapes(stored.specs, hints, str(stored.path))
    return {"": portable_peft.read(content, stored.tensors, str(stored.path))}


def _write_peft(components: Components, folder: Path, hints: Hints) -> None:
    from qlora_tools.adapters import portable_peft

    portable_peft.write(folder, portable_peft.content(only(components, "peft")))


def _write_kohya(components: Components, folder: Path, hints: Hints) -> None:
    named = {name or hints.component or "unet": portable for name, portable in components.items()}
    tensors, metadata = _module("kohya").write(named, modules=hints.modules)
    write_tensors(folder / "adapter.safetensors", tensors, {"format": "pt", **metadata})


def _write_diffusers(components: Components, folder: Path, hints: Hints) -> None:
    named = {name or hints.component or "": portable for name, portable in components.items()}
    tensors, metadata = _module("diffusers").write(named)
    write_tensors(folder / "pytorch_lora_weights.safetensors", tensors, {"format": "pt", **metadata})


def _write_gguf(components: Components, folder: Path, hints: Hints) -> None:
    _module("gguf").write(only(components, "gguf"), folder / "adapter.gguf", base_config=hints.base_config)


def _write_mlx(components: Components, folder: Path, hints: Hints) -> None:
    _module("mlx").write(only(components, "mlx"), folder, base_config=hints.base_config)


def _write_onnx(components: Components, folder: Path, hints: Hints) -> None:
    _module("onnx_adapter").write(only(components, "onnx_adapter"), folder / "adapter.onnx_adapter", base_config=hints.base_config)


def only(components: Components, name: str) -> Portable:
    """The one component there is. Raises UsageError where there are several and the format holds one model."""
    if len(components) != 1:
        raise UsageError(f"{name} holds one model, the adapter has {', '.join(sorted(components))}", hint="choose one with --component")
    return next(iter(components.values()))


FORMATS: Mapping[str, Format] = {
    "gguf": _language_format("gguf", _write_gguf, own_file=True),
    "onnx_adapter": _language_format("onnx_adapter", _write_onnx, own_file=True),
    "lycoris": _image_format("lycoris"),
    "kohya": _image_format("kohya", _write_kohya),
    "torchtune": _language_format("torchtune"),
    "mlx": _language_format("mlx", _write_mlx),
    "litgpt": _language_format("litgpt"),
    "peft": Format(_is_peft, _read_peft, _write_peft),
    "diffusers": _image_format("diffusers", _write_diffusers),
    "loralib": _language_format("loralib"),
}
#: What ``qlt convert --to`` offers.
WRITTEN = tuple(name for name, row in FORMATS.items() if row.write is not None)
