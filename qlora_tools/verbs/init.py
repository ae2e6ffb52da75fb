"""``qlt init``: a starting adapter for training on a quantized base."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from qlora_tools.adapters.peft_files import WEIGHTS, write_config
from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.writer import SafetensorsWriter
from qlora_tools.engine.plan import Source
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.stages.init_adapter import InitConfig, Start, Started, plan_init
from qlora_tools.verbs.opening import describe_input, folder_name, open_model, resolve_device
from qlora_tools.verbs.quantize import codec_for


@dataclass(frozen=True)
class InitResult:
    """What was (or would be) written. Errors are relative to ||W|| over all tensors, of the quantized base alone and with the adapter on it;
    ``weighed_left``: the share that is left of the loss as seen through the layers' inputs. ``residual``: the base that a PiSSA adapter is for."""

    output: Path
    base: Path
    method: str
    scheme: str
    rank: int
    alpha: float
    tensors: int
    dry_run: bool
    lost: float | None
    left: float | None
    weighed_left: float | None
    residual: Path | None
    seconds: float


def init(
    *,
    base: str | Path,
    config: InitConfig | None = None,
    scheme: str = "nf4",
    calib: str | Path | None = None,
    residual: Path | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> InitResult:
    """Write a PEFT adapter for ``base`` stored as ``scheme``; ``calib``: a file of statistics, a text or ``self``, which QERA needs.

    ``residual``: where to write the 16-bit base less the adapter, for PiSSA: quantize it and train on that one.

    Raises:
        IncompatibleError: the base is quantized already, or the statistics are of another model. UsageError: see :func:`plan_init`.
    """
    began = time.perf_counter()
    config = config or InitConfig()
    codec, model = codec_for(scheme), open_model(base, progress)
    if model.quantized:
        raise IncompatibleError(f"{base} is quantized already, what it lost is not known", hint="give the 16-bit model that it came from")
    if config.method == "qera" and calib is None:
        raise UsageError("qera weighs what was lost by the layers' inputs", hint="give --calib TEXT, a file of `qlt calibrate`, or --calib self")
    if residual is not None and config.method != "pissa":
        raise UsageError(f"{config.method} leaves the base as it is: there is no residual", hint="leave out --residual")
    dest = output or Path("adapters") / slug(f"{folder_name(model.folder)}-{config.method}-r{config.rank}-{scheme}")
    check_output(dest, force=force, inputs=[model.folder])
    if residual is not None:
        check_output(residual, force=force, inputs=[model.folder])
    reports: list[Started] = []
    with ExitStack() as stack:
        stats = None
        if calib is not None and not dry_run:
            from qlora_tools.verbs.calibrate import statistics_for

            stats = stack.enter_context(statistics_for(model, calib, device=resolve_device(device), beside=dest, progress=progress))
        start = plan_init(model, model.family, config, codec, base_config=model.config, base_model=str(base), moments=stats)
        if not dry_run:
            sources: dict[str, Source] = {"base": model, **({"stats": stats} if stats else {})}
            reports = _write(start, sources, dest, config, model, scheme, force=force, device=device, progress=progress)
    if residual is not None and not dry_run:
        from qlora_tools.verbs.merge import merge

        merge(base=base, adapters=[(dest, -1.0)], output=residual, force=force, device=device, progress=progress)
    return _result(dest, model.folder, config, scheme, len(start.plan.units), reports, residual, dry_run, time.perf_counter() - began)


def _write(
    start: Start,
    sources: dict[str, Source],
    dest: Path,
    config: InitConfig,
    model: LogicalCheckpoint,
    scheme: str,
    *,
    force: bool,
    device: str,
    progress: Progress,
) -> list[Started]:
    with output_folder(dest, force=force, inputs=[model.folder]) as folder:
        with SafetensorsWriter(folder / WEIGHTS, start.plan.outputs) as writer:
            reports: list[Started] = run(start.plan, sources, writer, device=resolve_device(device), title=f"init {config.method}", progress=progress)
        write_config(folder, start.config)
        command = {"verb": "init", "method": config.method, "rank": config.rank, "alpha": start.config["lora_alpha"], "base_format": scheme}
        # a PiSSA adapter is for the residual base, whose bytes are not these
        hashes = {} if config.method == "pissa" else {report.name: report.sha256 for report in reports}
        energies = {report.name: asdict(report) for report in reports}
        seal(folder, Manifest("adapter", command, inputs={"base": describe_input(model)}, base_tensors=hashes, report={"energies": energies}))
    return reports


def _result(
    dest: Path, base: Path, config: InitConfig, scheme: str, tensors: int, reports: list[Started], residual: Path | None, dry_run: bool, seconds: float
) -> InitResult:
    whole = sum(report.weight for report in reports)
    lost, left = sum(report.lost for report in reports), sum(report.left for report in reports)
    seen = [(report.weighed_lost, report.weighed_left) for report in reports if report.weighed_lost is not None and report.weighed_left is not None]
    unseen = sum(energy for energy, _ in seen)
    weighed = math.sqrt(sum(energy for _, energy in seen) / unseen) if unseen else None
    before, after = (math.sqrt(lost / whole), math.sqrt(left / whole)) if whole else (None, None)
    return InitResult(dest, base, config.method, scheme, config.rank, config.scale * config.rank, tensors, dry_run, before, after, weighed, residual, seconds)
