"""``qlt extract``: a LoRA adapter out of a full fine-tune, with the error it has and the best any rank could reach."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_tools.adapters.merged import base_fingerprint
from qlora_tools.adapters.peft_files import WEIGHTS, write_config
from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.writer import SafetensorsWriter
from qlora_tools.engine.run import run
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.stages.extract import ExtractConfig, plan_extract
from qlora_tools.stages.extract_result import Extracted, ExtractReport, finish
from qlora_tools.verbs.opening import describe_input, folder_name, open_model, resolve_device


@dataclass(frozen=True)
class ExtractResult:
    """What was (or would be) written. ``report`` is ``None`` in a dry run: what an adapter holds depends on the weights."""

    output: Path
    base: Path
    tuned: Path
    dry_run: bool
    compared_tensors: int
    report: ExtractReport | None
    seconds: float


def extract(
    *,
    base: str | Path,
    tuned: str | Path,
    config: ExtractConfig | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ExtractResult:
    """Decompose ``tuned - base`` into a PEFT adapter; see :class:`ExtractConfig` for ranks, targets and embeddings.

    Raises:
        IncompatibleError: shapes or names differ, nothing changed, or something changed that an adapter cannot hold.
        UsageError: a rank or a target that makes no sense. And what reading and writing raise.
    """
    began = time.perf_counter()
    config = config or ExtractConfig()
    first, second = open_model(base, progress), open_model(tuned, progress)
    dest = output or Path("adapters") / slug(f"{folder_name(second.folder)}-{_setting(config)}")
    inputs = [first.folder, second.folder]
    check_output(dest, force=force, inputs=inputs)
    fingerprint = base_fingerprint(first)
    known = {name: fingerprint(name) for name in first.quantized}
    extraction = plan_extract(first, second, first.family, config, base_ties=first.ties, tuned_ties=second.ties, known_hashes=known)
    report = None
    if not dry_run:
        reports = run(extraction.plan, {"base": first, "tuned": second}, device=resolve_device(device), title="extract", progress=progress)
        extracted = finish(extraction, reports, second.specs, base_config=first.config, base_model=str(base))
        del reports
        _write(extracted, dest, config, first, second, force=force, progress=progress)
        report = extracted.report
    return ExtractResult(dest, first.folder, second.folder, dry_run, len(extraction.pieces), report, time.perf_counter() - began)


def _write(
    extracted: Extracted, dest: Path, config: ExtractConfig, base: LogicalCheckpoint, tuned: LogicalCheckpoint, *, force: bool, progress: Progress
) -> None:
    with output_folder(dest, force=force, inputs=[base.folder, tuned.folder]) as folder:
        writer = SafetensorsWriter(folder / WEIGHTS, extracted.plan.outputs)
        try:
            run(extracted.plan, {"tuned": tuned}, writer, title="write adapter", progress=progress)
            writer.close()
        finally:
            writer.abort()
        write_config(folder, extracted.config)
        manifest = Manifest(
            "adapter",
            {"verb": "extract", **asdict(config)},
            inputs={"base": describe_input(base), "tuned": describe_input(tuned)},
            base_tensors=extracted.base_tensors,
            report=asdict(extracted.report),
        )
        seal(folder, manifest)


def _setting(config: ExtractConfig) -> str:
    """``r16``, ``auto``, ``energy0.9`` or ``20000000B``: the part of an output's name that tells settings apart."""
    if config.energy is not None:
        return f"energy{config.energy:g}"
    if config.max_bytes is not None:
        return f"{config.max_bytes}B"
    return f"r{config.fixed_rank}" if config.fixed_rank else "auto"
