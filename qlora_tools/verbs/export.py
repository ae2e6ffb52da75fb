"""``qlt export``: a checkpoint, or a base with its adapters merged in, as an ONNX graph that has passed a parity check."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.engine.plan import Source
from qlora_tools.errors import UsageError
from qlora_tools.export.decoder_export import plan_export, write_graph
from qlora_tools.export.genai import write_genai_config
from qlora_tools.manifest import Manifest, canonical_json
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.merging import open_merged
from qlora_tools.verbs.opening import copy_side_files, describe_input, folder_name, open_model, plain_config
from qlora_tools.verbs.quantize import codec_for

if TYPE_CHECKING:
    from qlora_tools.export.parity import Parity

SCHEMES = ("fp32", "int8", "int4", "nf4")


@dataclass(frozen=True)
class ExportResult:
    """What was (or would be) written. ``parity`` is ``None`` in a dry run or with ``verify=False``."""

    output: Path
    scheme: str
    carried: str
    note: str | None
    device: str
    dry_run: bool
    file_bytes: int
    parity: Parity | None
    seconds: float


@dataclass(frozen=True)
class _Drawn:
    """What an export draws: the tensors, the config, the folder of its tokenizer, its name and its inputs."""

    source: Source
    config: Mapping[str, Any]
    side_files: Path
    name: str
    folders: tuple[Path, ...]
    inputs: Mapping[str, Mapping[str, str]]


def export(
    *,
    model: str | Path | None = None,
    base: str | Path | None = None,
    adapters: Sequence[tuple[str | Path, float]] = (),
    onto: str | None = None,
    scheme: str = "fp32",
    verify: bool = True,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ExportResult:
    """Export ``model``, or ``base`` with ``adapters`` merged in on the way, as ``scheme`` (``fp32``, ``int8``, ``int4``, ``nf4``).

    Raises:
        UsageError: both or neither of ``model`` and ``base``. UnsupportedError: a model without a graph. CheckFailed:
        the exported graph does not compute what the checkpoint computes; nothing is left behind.
    """
    began = time.perf_counter()
    if (model is None) == (base is None):
        raise UsageError(
            "an export needs a model, or a base with adapters", hint="qlt export MODEL --int8, or qlt export --base BASE --adapter DIR --merge --int8"
        )
    drawn = _open(model, base, adapters, onto, progress)
    dest = output or Path("exports") / slug(f"{drawn.name.replace('+', '-')}-{scheme}")
    check_output(dest, force=force, inputs=drawn.folders)
    provider = _provider(device)
    planned = plan_export(drawn.source, drawn.config, scheme, provider)
    parity = None
    if not dry_run:
        with output_folder(dest, force=force, inputs=drawn.folders) as folder:
            write_graph(planned, drawn.source, folder, progress)
            (folder / "config.json").write_bytes(canonical_json(dict(drawn.config)))
            copy_side_files(drawn.side_files, folder)
            write_genai_config(planned, drawn.config, folder)
            if verify:
                from qlora_tools.export.parity import check_parity  # brings ONNX Runtime with it

                parity = check_parity(planned, drawn.source, drawn.config, folder, progress=progress)
            command = {"verb": "export", "scheme": scheme, "carried": planned.scheme.carried, "device": provider, "merged": len(adapters)}
            seal(folder, Manifest("export", command, inputs=drawn.inputs, report={"parity": asdict(parity) if parity else None}))
    return ExportResult(
        output=dest,
        scheme=scheme,
        carried=planned.scheme.carried,
        note=planned.scheme.note,
        device=provider,
        dry_run=dry_run,
        file_bytes=planned.file_bytes,
        parity=parity,
        seconds=time.perf_counter() - began,
    )


def _open(model: str | Path | None, base: str | Path | None, adapters: Sequence[tuple[str | Path, float]], onto: str | None, progress: Progress) -> _Drawn:
    if base is not None and adapters:
        merged = open_merged(base, adapters, onto, codec_for("nf4"), progress)
        return _Drawn(merged.source, merged.config, merged.checkpoint.folder, merged.name, (merged.checkpoint.folder, *merged.adapter_folders), merged.inputs())
    if adapters:
        raise UsageError("adapters are merged into a base", hint="give the model as --base")
    checkpoint = open_model(model or base or "", progress)
    return _Drawn(
        checkpoint,
        plain_config(checkpoint.config),
        checkpoint.folder,
        folder_name(checkpoint.folder),
        (checkpoint.folder,),
        {"model": describe_input(checkpoint)},
    )


def _provider(device: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is the CPU, whose graphs run everywhere."""
    return "cpu" if device == "auto" else device
