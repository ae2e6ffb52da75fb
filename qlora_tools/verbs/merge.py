"""``qlt merge``: base plus adapters as a checkpoint, dense or requantized, with the share that survives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.folder import check_output
from qlora_tools.errors import UsageError
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.stages.merge import MergeReport, Retention, merge_reports, plan_merge, summarize
from qlora_tools.stages.quantize import quantization_config
from qlora_tools.verbs.merging import ONTO, open_merged
from qlora_tools.verbs.opening import resolve_device
from qlora_tools.verbs.quantize import codec_for
from qlora_tools.verbs.saving import save_checkpoint

#: Below this share the merged model has lost most of what the adapter taught it.
LOW_RETENTION = 0.5


@dataclass(frozen=True)
class TensorRetention:
    """How one changed tensor fared."""

    name: str
    retention: float
    delta_ratio: float


@dataclass(frozen=True)
class MergeResult:
    """What was (or would be) written. ``retention`` is ``None`` in a dry run, or when no tensor changed in place."""

    output: Path
    base: Path
    adapters: tuple[Path, ...]
    scheme: str | None
    onto: str
    dry_run: bool
    changed_tensors: int
    stored_bytes: int
    retention: Retention | None
    tensors: tuple[TensorRetention, ...]
    untied: tuple[str, ...]
    seconds: float

    @property
    def erased(self) -> bool:
        """True when storing the result lost most of the adapter."""
        return self.retention is not None and self.retention.retention < LOW_RETENTION


def merge(
    *,
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    scheme: str | None = None,
    onto: str | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> MergeResult:
    """Merge ``adapters`` (folder, weight) into ``base`` and store the result dense or with ``scheme`` (``nf4``, ``int8``).

    ``onto``: ``original`` or ``dequantized`` (see ``verbs/merging.py``); default: the base as given.
    """
    began = time.perf_counter()
    if not adapters:
        raise UsageError("no adapter to merge", hint="give one with --adapter")
    if onto not in (None, *ONTO):
        raise UsageError(f"--onto {onto!r} is not known", hint=f"choose one of {', '.join(ONTO)}")
    codec = codec_for(scheme) if scheme else None
    merged = open_merged(base, adapters, onto, codec or codec_for("nf4"), progress)
    dest = output or Path("checkpoints") / slug(merged.name.replace("+", "-") + (f"-{scheme}" if scheme else "-merged"))
    inputs = [merged.checkpoint.folder, *merged.adapter_folders]
    check_output(dest, force=force, inputs=inputs)
    family = merged.checkpoint.family
    plan = plan_merge(merged.source, merged.base, merged.source.changed, family, codec)
    reports: list[Any] = []
    if not dry_run:
        config = merged.config
        if codec:
            config["quantization_config"] = quantization_config(codec, merged.source, family)
        reports = save_checkpoint(
            plan,
            {"model": merged.source, "base": merged.base},
            dest,
            config=config,
            side_files=merged.checkpoint.folder,
            manifest=lambda done: Manifest(
                "checkpoint",
                {"verb": "merge", "scheme": scheme, "onto": merged.onto, "weights": [weight for _, weight in adapters]},
                inputs=merged.inputs(),
                report=_report(merge_reports(done)),
            ),
            force=force,
            inputs=inputs,
            device=resolve_device(device),
            title="merge",
            progress=progress,
        )
    sums = merge_reports(reports)
    return MergeResult(
        output=dest,
        base=merged.checkpoint.folder,
        adapters=merged.adapter_folders,
        scheme=scheme,
        onto=merged.onto,
        dry_run=dry_run,
        changed_tensors=len(merged.source.changed),
        stored_bytes=plan.output_bytes,
        retention=summarize(sums),
        tensors=tuple(_tensors(sums)),
        untied=merged.source.untied,
        seconds=time.perf_counter() - began,
    )


def _tensors(sums: list[MergeReport]) -> list[TensorRetention]:
    found = ((report.name, summarize([report])) for report in sums)
    return [TensorRetention(name, total.retention, total.delta_ratio) for name, total in found if total is not None]


def _report(sums: list[MergeReport]) -> dict[str, Any]:
    total = summarize(sums)
    return {"total": asdict(total) if total else None, "tensors": [asdict(row) for row in _tensors(sums)]}
