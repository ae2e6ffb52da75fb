"""``qlt convert``: an adapter of any known format in a format that others read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_tools.adapters import portable_peft
from qlora_tools.adapters.formats.table import FORMATS, WRITTEN, Write
from qlora_tools.adapters.stored import Hints
from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import UsageError
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.adapter_files import Loaded, adapter_path, fit, hints_for, load, one_component, save_peft, source_name
from qlora_tools.verbs.opening import describe_input, open_model, resolve_device


@dataclass(frozen=True)
class ConvertResult:
    """What was (or would be) written. ``files`` beside the manifest; empty in a dry run."""

    output: Path
    source: Path
    read_as: str
    written_as: str
    components: tuple[str, ...]
    dry_run: bool
    layers: int
    files: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float


def convert(
    *,
    adapter: str | Path,
    to: str,
    base: str | Path | None = None,
    for_export: str | Path | None = None,
    format_name: str | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    component: str | None = None,
    allow_pickle: bool = False,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ConvertResult:
    """Write ``adapter`` as format ``to``. What that format cannot carry is refused by name; the rest of the words are import's.

    ``component``: which of several to take, or, for the formats of image models, what to call the one there is. ``base`` is
    needed by formats whose names or row orders depend on it (GGUF, MLX). ``for_export``: the folder of an export with inputs for adapters, whose names and
    packing the file gets; needs the base too.
    """
    began = time.perf_counter()
    if to not in WRITTEN:
        raise UsageError(f"--to {to!r} is not a format that can be written", hint=f"choose one of {', '.join(WRITTEN)}")
    if for_export is not None and (to != "onnx_adapter" or base is None):
        raise UsageError("an adapter for an exported graph", hint="--to onnx_adapter --for EXPORT --base MODEL")
    path = adapter_path(adapter)
    checkpoint = open_model(base, progress) if base is not None else None
    dest = output or Path("adapters") / slug(f"{source_name(path)}-{to}")
    inputs = [path, *([checkpoint.folder] if checkpoint else []), *([Path(for_export)] if for_export else [])]
    check_output(dest, force=force, inputs=inputs)
    hints = Hints(alpha=alpha, rank=rank, component=component)
    loaded = load(path, base=checkpoint, format_name=format_name, hints=hints, allow_pickle=allow_pickle, device=resolve_device(device), progress=progress)
    command = {"verb": "convert", "to": to, "from": loaded.format, "alpha": alpha, "rank": rank, "component": component}
    portables = loaded.components
    files: tuple[str, ...] = ()
    if to == "peft":
        loaded = one_component(loaded, component if component in loaded.components else None)
    if dry_run and to == "peft":
        portable_peft.content(loaded.portable)
    elif to == "peft":
        save_peft(
            loaded.portable,
            dest,
            command=command,
            inputs={"adapter": loaded.described()},
            sources=inputs,
            base=checkpoint,
            base_tensors=loaded.base_tensors,
            task_type=loaded.task_type,
            force=force,
        )
    elif for_export is not None and checkpoint is not None:
        _write_for(Path(for_export), loaded, checkpoint, dest, command, force=force, dry_run=dry_run, inputs=inputs)
    elif dry_run:
        with TemporaryDirectory() as scratch:  # what the format refuses, it refuses when it writes
            _writer(to)(portables, Path(scratch), hints_for(hints, checkpoint))
    else:
        described = {**({"base": describe_input(checkpoint)} if checkpoint else {}), "adapter": loaded.described()}
        with output_folder(dest, force=force, inputs=inputs) as folder:
            _writer(to)(portables, folder, hints_for(hints, checkpoint))
            seal(folder, Manifest("adapter", command, inputs=described, base_tensors=dict(loaded.base_tensors or {})))
    if not dry_run:
        files = tuple(sorted(item.name for item in dest.iterdir() if item.name != "qlt-manifest.json"))
    return ConvertResult(
        output=dest,
        source=path,
        read_as=loaded.format,
        written_as=to,
        components=tuple(sorted(name for name in portables if name)),
        dry_run=dry_run,
        layers=sum(len(portable.layers) for portable in portables.values()),
        files=files,
        notes=tuple(dict.fromkeys(note for portable in portables.values() for note in portable.notes)),
        seconds=time.perf_counter() - began,
    )


def _write_for(
    export: Path,
    loaded: Loaded,
    base: LogicalCheckpoint,
    dest: Path,
    command: Mapping[str, object],
    *,
    force: bool,
    dry_run: bool,
    inputs: list[Path],
) -> None:
    """The one file that the graph in ``export`` takes, named after the adapter."""
    from qlora_tools.export.onnx_adapter import adapter_names, file_of, write_adapter_file
    from qlora_tools.verbs.convert_for import factors_for

    factors = factors_for(export, fit(loaded.portable, base, str(loaded.stored.path)), base)
    if dry_run:
        return
    described = {"base": describe_input(base), "adapter": loaded.described(), "export": {"name": export.resolve().name}}
    with output_folder(dest, force=force, inputs=inputs) as folder:
        write_adapter_file(file_of(folder, adapter_names([source_name(loaded.stored.path)])[0]), factors)
        seal(folder, Manifest("adapter", {**command, "for": export.resolve().name}, inputs=described, base_tensors=dict(loaded.base_tensors or {})))


def _writer(to: str) -> Write:
    write = FORMATS[to].write
    assert write is not None
    return write
