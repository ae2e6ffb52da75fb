"""Inputs common to the verbs: models by folder or hub id, devices, what to write about them in a manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.checkpoint.logical import LogicalCheckpoint, open_checkpoint
from qlora_tools.checkpoint.reader import own_file
from qlora_tools.errors import QltError, StorageError, UsageError
from qlora_tools.manifest import Manifest, read_manifest
from qlora_tools.progress import Progress

#: Beside the weights: tokenizer, processor, chat template and generation settings. Never code, never weights.
_SIDE_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab"})
_NOT_COPIED = frozenset(
    {"config.json", "adapter_config.json", "genai_config.json", "training_args.json", "trainer_state.json", "qlt-manifest.json", "README.txt"}
)
_MAX_SIDE_BYTES = 128 << 20


def open_model(name: str | Path, progress: Progress | None = None) -> LogicalCheckpoint:
    """The checkpoint in a folder or under a hub id. Remote code that its config asks for is not run; a note says so."""
    model = open_checkpoint(resolve_model(str(name)))
    if progress and "auto_map" in model.config:
        progress.note(f"{name}: config.json asks for code of its own (auto_map); it is ignored, stock classes are used")
    return model


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA where torch can use it.

    Raises:
        UsageError: CUDA was asked for and is not there.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no CUDA device", hint="run `qlt doctor`, or use --device cpu")
    return ("cuda" if available else "cpu") if device == "auto" else device


def describe_input(model: LogicalCheckpoint) -> dict[str, str]:
    """What a manifest says about an input checkpoint."""
    return {"name": folder_name(model.folder), "headers_sha256": model.stored.headers_sha256()}


def folder_name(folder: Path) -> str:
    """The name people use for a model folder: for a hub snapshot the repository, not the commit."""
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots":
        return resolved.parent.parent.name.removeprefix("models--").replace("--", "-")
    return resolved.name


def is_export(folder: Path) -> bool:
    """Whether ``folder`` holds a graph."""
    return any(folder.glob("*.onnx"))


def readable_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``; ``None`` where there is none, or one that this version does not read."""
    try:
        return read_manifest(folder)
    except QltError:
        return None


def side_paths(source: Path) -> list[Path]:
    """Tokenizer and settings files beside the weights: what :func:`copy_side_files` copies.

    Raises:
        CorruptError: one of them is a link that leaves the folder.
    """
    return [own_file(path) for path in sorted(source.iterdir()) if _goes_along(path)]


def _goes_along(path: Path) -> bool:
    wanted = path.suffix in _SIDE_SUFFIXES and path.name not in _NOT_COPIED and not path.name.endswith(".index.json")
    return wanted and path.is_file() and path.stat().st_size <= _MAX_SIDE_BYTES


def copy_side_files(source: Path, dest: Path) -> None:
    """Copy tokenizer and settings files beside the weights, never replacing a file that is there. Raises as :func:`side_paths`."""
    for path in side_paths(source):
        if not (dest / path.name).exists():
            shutil.copyfile(path, dest / path.name)


def copy_all(source: Path, dest: Path, *, but: Collection[str]) -> None:
    """Copy everything in ``source``, but the files named ``but`` at its top, into the folder ``dest``. Links stay links: what they point to is not copied.

    Raises:
        StorageError: something could not be read or written.
    """
    try:
        shutil.copytree(source, dest, symlinks=True, dirs_exist_ok=True, ignore=lambda folder, _: but if Path(folder) == source else ())
    except shutil.Error as error:
        path, _, reason = error.args[0][0]
        raise StorageError(f"{path} could not be copied: {reason}", hint="free some space, or take it out of the folder") from error


def given_paths(*given: str | Path | None) -> list[Path]:
    """Those of ``given`` that are files or folders here, and no words: inputs that an output must not replace."""
    return [Path(path) for path in given if path and Path(path).exists()]


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without what would make a loader run code or treat dense weights as quantized."""
    return {name: value for name, value in config.items() if name not in ("auto_map", "quantization_config")}


def config_json(config: Mapping[str, Any]) -> bytes:
    """The bytes of a config.json. Infinity and NaN are written as transformers reads them, unlike in our own files: some models have them (mamba's
    ``time_step_limit``)."""
    return (json.dumps(dict(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
