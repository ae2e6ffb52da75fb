"""``qlt inspect``: what a folder or file holds, from headers alone. No weight is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.checkpoint.logical import LogicalCheckpoint, open_checkpoint
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError
from qlora_tools.manifest import Manifest, read_manifest
from qlora_tools.names import natural_key, split_tensor
from qlora_tools.specs import TensorSpec
from qlora_tools.verbs.opening import is_export


@dataclass(frozen=True)
class Group:
    """Tensors that differ only in their numbers: one line of the listing. ``name`` has ``*`` for each number."""

    name: str
    role: str
    count: int
    dtype: str
    shape: tuple[int, ...]
    stored_as: str
    stored_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What was found. ``kind`` is checkpoint, adapter, export, safetensors or bench."""

    path: Path
    kind: str
    facts: Mapping[str, Any]
    groups: tuple[Group, ...] = ()
    made_by: Mapping[str, Any] = field(default_factory=dict)


def inspect(*, path: str | Path) -> Inspection:
    """Look at a checkpoint, adapter, export or bench folder, a hub id, or one safetensors file.

    Raises:
        MissingError: nothing there. UnsupportedError: a folder that holds none of these.
    """
    target = Path(path).expanduser()
    if target.is_file():
        return _file(target)
    folder = target if target.is_dir() else resolve_model(str(path))
    manifest = read_manifest(folder)
    made_by = dict(manifest.command) if manifest else {}
    if (folder / "adapter_config.json").exists():
        return _adapter(folder, manifest, made_by)
    if is_export(folder):
        return _export(folder, made_by)
    if (folder / "bench.json").exists():
        content = read_json(folder / "bench.json")
        rows = content.get("rows")
        return Inspection(folder, "bench", {"schema": content.get("schema"), "rows": len(rows) if isinstance(rows, list) else 0}, made_by=made_by)
    return _checkpoint(open_checkpoint(folder), made_by)


def _file(path: Path) -> Inspection:
    if path.suffix != ".safetensors":
        raise UnsupportedError(f"{path} is not a folder and not a .safetensors file", hint="give the folder that holds it")
    with SafetensorsFile(path) as file:
        facts = {"tensors": len(file.specs), "file_bytes": path.stat().st_size, "metadata": dict(file.metadata)}
        return Inspection(path, "safetensors", facts, _groups(file.specs, lambda name: "", {}))


def _checkpoint(model: LogicalCheckpoint, made_by: Mapping[str, Any]) -> Inspection:
    config = model.config
    facts = {
        "model_type": config.get("model_type", "unknown"),
        "architectures": config.get("architectures", []),
        "family_file": model.family.model_type,
        "parameters": sum(spec.numel for spec in model.specs.values()),
        "tensors": len(model.specs),
        "stored_bytes": sum(spec.nbytes for spec in model.stored.specs.values()),
        "dense_bytes": sum(spec.nbytes for spec in model.specs.values()),
        "dtypes": dict(Counter(spec.dtype for spec in model.stored.specs.values())),
        "codecs": dict(Counter(item.codec.name for item in model.quantized.values())),
        "tied": model.ties,
        "decoder_export": model.family.decoder is not None,
    }
    stored = {name: (item.codec.name, sum(model.stored.specs[part].nbytes for part in item.parts)) for name, item in model.quantized.items()}
    return Inspection(model.folder, "checkpoint", facts, _groups(model.specs, model.family.role, stored), made_by)


def _adapter(folder: Path, manifest: Manifest | None, made_by: Mapping[str, Any]) -> Inspection:
    config = read_json(folder / "adapter_config.json")
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise MissingError(f"{weights} is not there", hint="pickled adapters (.bin) are not read: save it again with safetensors")
    with SafetensorsFile(weights) as file:
        specs = dict(file.specs)
    shown = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save")
    facts = {name: config[name] for name in shown if config.get(name) not in (None, [], False)}
    facts |= {"parameters": sum(spec.numel for spec in specs.values()), "stored_bytes": sum(spec.nbytes for spec in specs.values())}
    facts["bound_to_base"] = f"{len(manifest.base_tensors)} tensors" if manifest and manifest.base_tensors else "no"
    return Inspection(folder, "adapter", facts, _groups(specs, lambda name: "", {}), made_by)


def _export(folder: Path, made_by: Mapping[str, Any]) -> Inspection:
    graphs = sorted(folder.glob("*.onnx"))
    model = read_graph(graphs[0])
    ops = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    facts = {
        "graph": graphs[0].name,
        "ir_version": model.ir_version,
        "opsets": {item.domain or "ai.onnx": item.version for item in model.opset_import},
        "inputs": [item.name for item in model.graph.input][:3] + ([f"and {len(model.graph.input) - 3} more"] if len(model.graph.input) > 3 else []),
        "nodes": dict(ops.most_common()),
        "file_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
    }
    return Inspection(folder, "export", facts, made_by=made_by)


def read_graph(path: Path) -> Any:
    """A graph file as onnx's ``ModelProto``, without the weights beside it.

    Raises:
        MissingError: no such file. CorruptError: it holds no graph, or a part of one.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise MissingError(f"{path} is not there", hint="the export is incomplete: make it again, or copy it again")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise CorruptError(f"{path} is not a whole ONNX graph: {error}", hint="export it again, or copy it again") from error
    return model


def _groups(specs: Mapping[str, TensorSpec], role: Any, stored: Mapping[str, tuple[str, int]]) -> tuple[Group, ...]:
    found: dict[tuple[str, str, tuple[int, ...], str], list[str]] = {}
    for name in sorted(specs, key=natural_key):
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        spec = specs[name]
        found.setdefault((pattern, spec.dtype, spec.shape, stored.get(name, ("dense", 0))[0]), []).append(name)
    return tuple(
        Group(
            pattern,
            role(split_tensor(names[0])[0]),
            len(names),
            dtype,
            shape,
            codec,
            sum(stored[name][1] if name in stored else specs[name].nbytes for name in names),
        )
        for (pattern, dtype, shape, codec), names in found.items()
    )


def as_json(value: Any) -> str:
    """One short line for a fact."""
    return value if isinstance(value, str) else json.dumps(value)
