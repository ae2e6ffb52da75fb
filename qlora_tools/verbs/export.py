"""``qlt export``: a checkpoint, or a base with its adapters merged in, as an ONNX graph that has passed a parity check."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.engine.plan import Source
from qlora_tools.errors import UsageError
from qlora_tools.export.decoder.export import DecoderExport, plan_export, write_graph
from qlora_tools.export.decoder.genai import write_genai_config
from qlora_tools.export.target import COMPUTE, CPU, Target
from qlora_tools.manifest import Manifest, canonical_json
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.merging import open_merged
from qlora_tools.verbs.opening import copy_side_files, describe_input, folder_name, open_model, plain_config
from qlora_tools.verbs.quantize import codec_for

if TYPE_CHECKING:
    from qlora_tools.export.calibrated import Gain
    from qlora_tools.export.decoder.parity import Parity

SCHEMES = ("fp32", "int8", "int4", "nf4")


@dataclass(frozen=True)
class ExportResult:
    """What was (or would be) written. ``parity`` is ``None`` in a dry run or with ``verify=False``, ``calibration`` without ``calib``."""

    output: Path
    scheme: str
    carried: str
    note: str | None
    device: str
    dry_run: bool
    file_bytes: int
    parity: Parity | None
    calibration: Gain | None
    seconds: float


@dataclass(frozen=True)
class _Drawn:
    """What an export draws: the tensors, the config, the folder of its tokenizer, its name and its inputs. ``checkpoint``: itself, or the base."""

    source: Source
    checkpoint: LogicalCheckpoint
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
    target: str | None = None,
    scheme: str = "fp32",
    calib: str | Path | None = None,
    verify: bool = True,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ExportResult:
    """Export ``model``, or ``base`` with ``adapters`` merged in on the way, as ``scheme`` (``fp32``, ``int8``, ``int4``, ``nf4``).

    ``calib``: a text, a file of ``qlt calibrate``, ``self`` or ``builtin``; weights are then rounded for what the layers read there. With adapters the
    statistics are the base's. A dry run takes none.

    Raises:
        UsageError: both or neither of ``model`` and ``base``; ``calib`` for fp32. UnsupportedError: a model without a graph. CheckFailed:
        the exported graph does not compute what the checkpoint computes; nothing is left behind.
    """
    began = time.perf_counter()
    if (model is None) == (base is None):
        raise UsageError(
            "an export needs a model, or a base with adapters", hint="qlt export MODEL --int8, or qlt export --base BASE --adapter DIR --merge --int8"
        )
    drawn = _open(model, base, adapters, target, progress)
    dest = output or Path("exports") / slug(f"{drawn.name.replace('+', '-')}-{scheme}")
    check_output(dest, force=force, inputs=drawn.folders)
    drawn_for = _target(device)
    planned = plan_export(drawn.source, drawn.config, scheme, drawn_for)
    if calib is not None and planned.scheme.carried == "fp32":
        raise UsageError("fp32 weights are not rounded, so there is nothing to calibrate", hint="leave --calib out, or export with --int4 or --int8")
    parity, calibration = None, None
    if not dry_run:
        with _statistics(drawn.checkpoint, calib, dest, progress) as statistics:
            if statistics is not None:
                planned = plan_export(drawn.source, drawn.config, scheme, drawn_for, statistics)
            with output_folder(dest, force=force, inputs=drawn.folders) as folder:
                calibration = _write(planned, drawn, folder, progress)
                if verify:
                    from qlora_tools.export.decoder.parity import check_parity  # brings ONNX Runtime with it

                    parity = check_parity(planned, drawn.source, drawn.config, folder, progress=progress)
                command = {"verb": "export", "scheme": scheme, "carried": planned.scheme.carried, "device": drawn_for.provider, "merged": len(adapters)}
                report: dict[str, Any] = {"parity": asdict(parity) if parity else None}
                if statistics is not None and calibration is not None:
                    origin = statistics.origin
                    report["calibration"] = {**asdict(calibration), "text": origin.text, "text_sha256": origin.text_sha256, "tokens": origin.tokens}
                seal(folder, Manifest("export", command, inputs=drawn.inputs, report=report))
    return ExportResult(
        output=dest,
        scheme=scheme,
        carried=planned.scheme.carried,
        note=planned.scheme.note,
        device=drawn_for.provider,
        dry_run=dry_run,
        file_bytes=planned.file_bytes,
        parity=parity,
        calibration=calibration,
        seconds=time.perf_counter() - began,
    )


@contextmanager
def _statistics(checkpoint: LogicalCheckpoint, calib: str | Path | None, dest: Path, progress: Progress) -> Iterator[Statistics | None]:
    """The statistics that ``calib`` names, taken now if need be; none without it."""
    if calib is None:
        yield None
        return
    from qlora_tools.verbs.calibrate import statistics_for  # brings transformers with it

    with statistics_for(checkpoint, calib, beside=dest, progress=progress) as statistics:
        yield statistics


def _write(planned: DecoderExport, drawn: _Drawn, folder: Path, progress: Progress) -> Gain | None:
    """The graph and all that lies beside it."""
    gain = write_graph(planned, drawn.source, folder, progress)
    (folder / "config.json").write_bytes(canonical_json(dict(drawn.config)))
    copy_side_files(drawn.side_files, folder)
    write_genai_config(planned, drawn.config, folder)
    return gain


def _open(model: str | Path | None, base: str | Path | None, adapters: Sequence[tuple[str | Path, float]], target: str | None, progress: Progress) -> _Drawn:
    if base is not None and adapters:
        merged = open_merged(base, adapters, target, codec_for("nf4"), progress)
        folders = (merged.checkpoint.folder, *merged.adapter_folders)
        return _Drawn(merged.source, merged.checkpoint, merged.config, merged.checkpoint.folder, merged.name, folders, merged.inputs())
    if adapters:
        raise UsageError("adapters are merged into a base", hint="give the model as --base")
    checkpoint = open_model(model or base or "", progress)
    return _Drawn(
        checkpoint,
        checkpoint,
        plain_config(checkpoint.config),
        checkpoint.folder,
        folder_name(checkpoint.folder),
        (checkpoint.folder,),
        {"model": describe_input(checkpoint)},
    )


def _target(device: str) -> Target:
    """``auto`` is the CPU, whose graphs run everywhere."""
    return CPU if device == "auto" else Target(device, COMPUTE.get(device, ("F32",))[0])
