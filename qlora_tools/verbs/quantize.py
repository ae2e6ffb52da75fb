"""``qlt quantize``: a checkpoint in NF4 (double-quantized) or int8 that stock transformers loads."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.fingerprint import Fingerprinted
from qlora_tools.checkpoint.folder import check_output
from qlora_tools.engine.plan import Plan
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.stages.quantize import QuantizeReport, plan_quantize, quantization_config
from qlora_tools.verbs.opening import describe_input, folder_name, open_model, plain_config, resolve_device
from qlora_tools.verbs.saving import save_checkpoint

SCHEMES = ("nf4", "int8")


@dataclass(frozen=True)
class QuantizeResult:
    """What was (or, in a dry run, would be) written. Bytes count tensors, not headers."""

    output: Path
    scheme: str
    dry_run: bool
    quantized_tensors: int
    copied_tensors: int
    dense_bytes: int
    stored_bytes: int
    bits_per_weight: float
    relative_error: float | None
    seconds: float


def codec_for(scheme: str, *, block_size: int = 64, double_quant: bool = True) -> Codec:
    """The codec that stores ``scheme``.

    Raises:
        UsageError: no such scheme.
    """
    if scheme == "nf4":
        return NF4(block_size=block_size, double_quant=double_quant)
    if scheme == "int8":
        return Int8()
    raise UsageError(f"no scheme is called {scheme!r}", hint=f"choose one of {', '.join(SCHEMES)}")


def quantize(
    *,
    model: str | Path,
    scheme: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize every linear of ``model`` except head and embeddings; see :func:`codec_for` for ``scheme``.

    Raises:
        IncompatibleError: the model is quantized already. And what reading and writing raise.
    """
    began = time.perf_counter()
    codec = codec_for(scheme, block_size=block_size, double_quant=double_quant)
    source = open_model(model, progress)
    if source.quantized:
        held = sorted({item.codec.name for item in source.quantized.values()})
        raise IncompatibleError(f"{model} is quantized already ({', '.join(held)})", hint="quantize the 16-bit model that it came from")
    dest = output or Path("checkpoints") / slug(f"{folder_name(source.folder)}-{scheme}")
    check_output(dest, force=force, inputs=[source.folder])
    plan = plan_quantize(source, source.family, codec)
    if not any(unit.label.startswith(codec.name) for unit in plan.units):
        raise IncompatibleError(f"{model} holds no linear layer to quantize", hint="run `qlt inspect` on it")
    reports: list[Any] = []
    if not dry_run:
        hashed = Fingerprinted(source, frozenset(unit.reads[0].name for unit in plan.units if unit.label.startswith(codec.name)))
        reports = save_checkpoint(
            plan,
            {"model": hashed},
            dest,
            config={**plain_config(source.config), "quantization_config": quantization_config(codec, source, source.family)},
            side_files=source.folder,
            manifest=lambda done: Manifest(
                "checkpoint",
                {
                    "verb": "quantize",
                    "scheme": scheme,
                    "block_size": block_size if scheme == "nf4" else None,
                    "double_quant": double_quant if scheme == "nf4" else None,
                },
                inputs={"model": describe_input(source)},
                source_tensors=dict(sorted(hashed.sha256.items())),
                report={"relative_error": {report.name: report.relative_error for report in done if isinstance(report, QuantizeReport)}},
            ),
            force=force,
            inputs=[source.folder],
            device=resolve_device(device),
            title=f"quantize to {scheme}",
            progress=progress,
        )
    return _result(plan, codec, dest, dry_run, [report for report in reports if isinstance(report, QuantizeReport)], source.specs, time.perf_counter() - began)


def _result(plan: Plan, codec: Codec, dest: Path, dry_run: bool, reports: list[QuantizeReport], specs: Any, seconds: float) -> QuantizeResult:
    quantized = {unit.reads[0].name for unit in plan.units if unit.label.startswith(codec.name)}
    weights = sum(specs[name].numel for name in quantized)
    copied = sum(spec.nbytes for name, spec in specs.items() if name not in quantized)
    return QuantizeResult(
        output=dest,
        scheme=codec.name,
        dry_run=dry_run,
        quantized_tensors=len(quantized),
        copied_tensors=len(specs) - len(quantized),
        dense_bytes=sum(spec.nbytes for spec in specs.values()),
        stored_bytes=plan.output_bytes,
        bits_per_weight=8 * (plan.output_bytes - copied) / weights,
        relative_error=(sum(report.relative_error**2 for report in reports) / len(reports)) ** 0.5 if reports else None,
        seconds=seconds,
    )
