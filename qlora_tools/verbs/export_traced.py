"""The part of ``qlt export`` for models whose graph is traced: one graph, or three where one half of a model reads and the other writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.engine.plan import Source
from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.export.decoder.branches import Beside
from qlora_tools.export.schemes import Scheme
from qlora_tools.export.target import Target
from qlora_tools.export.traced.diffusion import diffusion_subject
from qlora_tools.export.traced.encoder_decoder import encoder_decoder_subjects
from qlora_tools.export.traced.export import TracedExport, plan_traced, write_traced
from qlora_tools.export.traced.halves import HalvesExport, check_halves, plan_halves, write_halves
from qlora_tools.export.traced.inputs import model_class
from qlora_tools.models.work import is_of_diffusers
from qlora_tools.progress import Progress

if TYPE_CHECKING:
    from qlora_tools.checkpoint.statistics import Statistics
    from qlora_tools.export.calibrated import Gain
    from qlora_tools.export.traced.parity import TracedParity

Traced = TracedExport | HalvesExport


def plan_any(
    source: Source,
    config: Mapping[str, Any],
    scheme: str | Scheme,
    target: Target,
    task: str | None,
    beside: Beside,
    statistics: Statistics | None,
    progress: Progress,
) -> Traced:
    """Trace the model that ``config`` describes, with the adapters ``beside`` its weights, and rounded for what ``statistics`` says.

    Raises:
        UnsupportedError: no class of transformers or diffusers for it, torch cannot trace it, or adapters beside a model of several graphs. UsageError:
        no such task. MissingError, IncompatibleError: tensors that the graph needs are missing or have other shapes.
    """
    if config.get("is_encoder_decoder"):
        if beside.kept or beside.fixed:
            _refuse_several_graphs(config, task)
        try:
            return plan_halves(source, config, scheme, target, task=task, progress=progress)
        except UnsupportedError as error:
            progress.note(f"exported as one graph: {error}")
    return plan_traced(source, config, scheme, target, task=task, beside=beside, statistics=statistics, progress=progress)


def own_task(config: Mapping[str, Any]) -> str | None:
    """What the model that ``config`` describes is traced for when nobody says what; ``None`` where it is not traced unless somebody does, as for an
    autoencoder's halves."""
    try:
        return diffusion_subject(config).task if is_of_diffusers(config) else model_class(config)[1]
    except (UsageError, UnsupportedError):
        return None


def check_calibration(planned: Traced) -> None:
    """Raises UnsupportedError where no text could be run through the model to see what its layers read."""
    if isinstance(planned, HalvesExport):
        raise UnsupportedError(
            "a model that reads with one half and writes with the other is not calibrated: it takes pairs of texts", hint="leave --calib out"
        )
    if "input_ids" not in planned.input_names:
        raise UnsupportedError(f"a model for {planned.task} reads no text, so no text calibrates it", hint="leave --calib out")


def _refuse_several_graphs(config: Mapping[str, Any], task: str | None) -> None:
    """Adapters stand beside one graph. Raises UnsupportedError where the model would become several."""
    try:
        encoder_decoder_subjects(config, task)
    except UnsupportedError:
        return
    raise UnsupportedError(
        "a model of three graphs keeps no adapter beside them: each graph would have some of its inputs, and ONNX Runtime refuses a file with the others",
        hint="merge it: qlt export --base BASE --adapter DIR --merge",
    )


def write_any(export: Traced, source: Source, folder: Path, verify: bool, progress: Progress) -> tuple[Gain | None, dict[str | None, TracedParity]]:
    """The graphs and their data in ``folder``; what calibration gained, and what the check found, where one was asked for, alone (``None``) and with each
    kept adapter.

    Raises:
        CheckFailed: a graph does not compute what its model computes. NonFiniteError: a weight holds NaN or infinity.
    """
    gain = None
    if isinstance(export, HalvesExport):
        write_halves(export, source, folder, progress)
    else:
        gain = write_traced(export, source, folder, progress)
    return gain, check_any(export, source, folder, progress) if verify else {}


def check_any(export: Traced, source: Source, folder: Path, progress: Progress, *, from_file: bool = False) -> dict[str | None, TracedParity]:
    """Hold the graphs in ``folder`` against the source: alone (``None``), and with each kept adapter. ``from_file``: with the weights that lie there.

    Raises:
        CheckFailed: a graph does not compute what its model computes.
    """
    if isinstance(export, HalvesExport):
        return {None: check_halves(export, source, folder, progress=progress)}
    from qlora_tools.export.traced.parity import check_traced  # brings ONNX Runtime with it

    names: list[str | None] = [None, *export.branches.kept]
    return {name: check_traced(export, source, folder, adapter=name, from_file=from_file, progress=progress) for name in names}
