"""The part of ``qlt export`` for models whose graph is traced: one graph, or three where one half of a model reads and the other writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.engine.plan import Source
from qlora_tools.errors import UnsupportedError
from qlora_tools.export.target import Target
from qlora_tools.export.traced.export import TracedExport, plan_traced, write_traced
from qlora_tools.export.traced.halves import HalvesExport, check_halves, plan_halves, write_halves
from qlora_tools.progress import Progress

if TYPE_CHECKING:
    from qlora_tools.export.traced.parity import TracedParity

Traced = TracedExport | HalvesExport


def plan_any(source: Source, config: Mapping[str, Any], scheme: str, target: Target, task: str | None, progress: Progress) -> Traced:
    """Trace the model that ``config`` describes.

    Raises:
        UnsupportedError: no class of transformers or diffusers for it, or torch cannot trace it. UsageError: no such task. MissingError,
        IncompatibleError: tensors that the graph needs are missing or have other shapes.
    """
    if config.get("is_encoder_decoder"):
        try:
            return plan_halves(source, config, scheme, target, task=task, progress=progress)
        except UnsupportedError as error:
            progress.note(f"exported as one graph: {error}")
    return plan_traced(source, config, scheme, target, task=task, progress=progress)


def write_any(export: Traced, source: Source, folder: Path, verify: bool, progress: Progress) -> TracedParity | None:
    """The graphs and their data in ``folder``; what the check found, where one was asked for.

    Raises:
        CheckFailed: a graph does not compute what its model computes. NonFiniteError: a weight holds NaN or infinity.
    """
    if isinstance(export, HalvesExport):
        write_halves(export, source, folder, progress)
        found: TracedParity | None = check_halves(export, source, folder, progress=progress) if verify else None
        return found
    write_traced(export, source, folder, progress)
    if not verify:
        return None
    from qlora_tools.export.traced.parity import check_traced  # brings ONNX Runtime with it

    return check_traced(export, source, folder, progress=progress)
