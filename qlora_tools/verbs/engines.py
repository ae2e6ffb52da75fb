"""Which engine runs a folder, and what it does there: write token after token, or look once.

An export says so in its manifest, a checkpoint in its config.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_tools.bench.engine import locate
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.cores import allowed_cores
from qlora_tools.errors import MissingError
from qlora_tools.manifest import read_manifest
from qlora_tools.models.feeds import positions
from qlora_tools.models.work import FORWARD, work_of
from qlora_tools.verbs.opening import is_export

#: Named, not imported: each brings its runtime with it, and the worker processes of a benchmark import what they need.
TORCH_ENGINE = "qlora_tools.bench.hf_engine:load"
ONNX_ENGINE = "qlora_tools.export.runtime:open_engine"
TORCH_FORWARD = "qlora_tools.bench.hf_forward:load"
ONNX_FORWARD = "qlora_tools.export.runtime.forward:open_forward"


def open_engine(folder: Path, device: str = "auto", adapter: Path | None = None, task: str | None = None) -> Any:
    """The runtime for a folder: ONNX Runtime for an export, transformers (fp32 unless quantized) for a checkpoint, with ``adapter`` on it.

    ``task``: what a checkpoint that looks once is loaded for, where that is not what its config says.
    """
    path, options = engine_of(folder, device)
    if adapter is not None:
        options["adapter"] = str(adapter)
    if task is not None and path == TORCH_FORWARD:
        options["task"] = task
    return locate(path)(threads=_threads(path), **options)


def _threads(engine: str) -> int:
    """For an engine in this very process: torch keeps those it has, because they are one number for everybody in it."""
    if engine not in (TORCH_ENGINE, TORCH_FORWARD):
        return allowed_cores()
    import torch

    return torch.get_num_threads()


def engine_of(folder: Path, device: str = "auto") -> tuple[str, dict[str, Any]]:
    """Import path and options of the engine that runs ``folder``: one that writes token after token, or one that looks once.

    Raises:
        MissingError: neither an export nor a checkpoint.
    """
    looks = kind_of_work(folder) == FORWARD
    if is_export(folder):
        manifest = read_manifest(folder)
        made_for = manifest.command.get("device", "cpu") if manifest else _described_device(folder)
        return ONNX_FORWARD if looks else ONNX_ENGINE, {"folder": str(folder), "device": made_for}
    if not (folder / "config.json").exists():
        raise MissingError(f"{folder} is neither a checkpoint nor an export", hint="run `qlt inspect` on it")
    quantized = "quantization_config" in read_json(folder / "config.json")
    options = {"path": str(folder), "dtype": "stored" if quantized else "fp32", "device": "cpu" if device == "auto" else device}
    return TORCH_FORWARD if looks else TORCH_ENGINE, options


def _described_device(folder: Path) -> str:
    """What a graph of another tool says that it was made for."""
    from qlora_tools.export.runtime.description import describe  # brings the runtime with it

    return describe(folder).device


def task_of(folder: Path) -> str | None:
    """What a traced export says that it computes; ``None`` for a drawn one and for a checkpoint."""
    manifest = read_manifest(folder)
    found = manifest.command.get("task") if manifest is not None and manifest.kind == "export" else None
    return None if found is None else str(found)


def kind_of_work(folder: Path) -> str:
    """One of ``models/work.py``'s."""
    return work_of(_config_of(folder), task_of(folder))


def _config_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").exists() else {}


def positions_of(folder: Path) -> int | None:
    """How many positions a model has, from its config.json; ``None`` where that does not say."""
    return positions(_config_of(folder))
