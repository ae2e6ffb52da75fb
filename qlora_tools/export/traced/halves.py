"""The three graphs of a model that reads with one half and writes with the other, planned, written and checked together.

Reading happens once and has a data file of its own. Both graphs that write use the same weights, so they point into one file; only where they would carry a
weight differently has each its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qlora_tools.engine.plan import Plan, Source
from qlora_tools.engine.run import run
from qlora_tools.export.external import ExternalWriter, place
from qlora_tools.export.notes import carried_otherwise, joined
from qlora_tools.export.schemes import Scheme, scheme_of
from qlora_tools.export.target import CPU, Target
from qlora_tools.export.traced.encoder_decoder import DECODER, WITH_PAST, encoder_decoder_subjects
from qlora_tools.export.traced.export import MODEL, Drawn, TracedExport, draw, fill
from qlora_tools.progress import SILENT, Progress

if TYPE_CHECKING:
    from qlora_tools.export.traced.parity import TracedParity


@dataclass(frozen=True, eq=False)
class HalvesExport:
    """A planned export: nothing read or written yet. ``parts`` by the name of their graph; ``files``: the data file of each."""

    parts: Mapping[str, TracedExport]
    files: Mapping[str, str]

    @property
    def first(self) -> TracedExport:
        return next(iter(self.parts.values()))

    @property
    def scheme(self) -> Scheme:
        return self.first.scheme

    @property
    def target(self) -> Target:
        return self.first.target

    @property
    def task(self) -> str:
        return self.first.task

    @property
    def note(self) -> str | None:
        """What is worth knowing about the scheme and about what it became."""
        return joined(self.scheme.note, *carried_otherwise(frozenset().union(*(part.carried for part in self.parts.values())), self.scheme))

    @property
    def plans(self) -> dict[str, Plan]:
        """What each data file is filled by."""
        return {file: self.parts[name].plan for name, file in reversed(list(self.files.items()))}

    @property
    def file_bytes(self) -> int:
        return sum(place(plan.outputs)[1] for plan in self.plans.values())


def plan_halves(
    source: Source, config: Mapping[str, Any], scheme: str | Scheme, target: Target = CPU, *, task: str | None = None, progress: Progress = SILENT
) -> HalvesExport:
    """Trace the halves of the model that ``config`` describes.

    Raises:
        UnsupportedError: not such a model, or torch cannot trace it. MissingError, IncompatibleError: tensors that the graphs need are missing or have other
        shapes.
    """
    chosen = scheme_of(scheme, target)
    return fill_halves(draw_halves(source, config, target, task=task, progress=progress), source, chosen)


def draw_halves(source: Source, config: Mapping[str, Any], target: Target = CPU, *, task: str | None = None, progress: Progress = SILENT) -> dict[str, Drawn]:
    """The graphs without weights."""
    subjects = encoder_decoder_subjects(config, task)
    drawn = {}
    with progress.task("trace", len(subjects), "graphs") as step:
        for name, subject in subjects.items():
            drawn[name] = draw(subject, source, config, target)
            step.advance(1)
    return drawn


def fill_halves(drawn: Mapping[str, Drawn], source: Source, scheme: Scheme) -> HalvesExport:
    """Graphs and plans with the weights of ``source`` as ``scheme`` has them; ``drawn`` is left as it is, to be filled again."""
    files = {name: f"{name}.onnx.data" for name in drawn}
    parts = {name: fill(one, source, scheme, data_file=files[name]) for name, one in drawn.items()}
    if _contains(parts[DECODER].plan, parts[WITH_PAST].plan):
        files[WITH_PAST] = files[DECODER]
        offsets = place(parts[DECODER].plan.outputs)[0]
        parts[WITH_PAST] = fill(drawn[WITH_PAST], source, scheme, offsets, files[DECODER])
    return HalvesExport(parts, files)


def write_halves(export: HalvesExport, source: Source, folder: Path, progress: Progress = SILENT) -> None:
    """Three graphs and their data in ``folder``.

    Raises:
        NonFiniteError: a weight holds NaN or infinity. StorageError: no room.
    """
    for file, plan in export.plans.items():
        with ExternalWriter(folder / file, plan.outputs) as writer:
            run(plan, {MODEL: source}, writer, title=f"export {export.scheme.name}", progress=progress)
    for name, part in export.parts.items():
        ir.save(part.graph, folder / f"{name}.onnx")


def check_halves(export: HalvesExport, source: Source, folder: Path, *, progress: Progress = SILENT) -> TracedParity:
    """Hold each graph against its half of the live model, the last one from a past; the worst of what was found.

    Raises:
        CheckFailed, OutOfMemory: as ``check_traced``.
    """
    from qlora_tools.export.traced.parity import check_traced  # brings ONNX Runtime

    found = [check_traced(part, source, folder, file=f"{name}.onnx", progress=progress) for name, part in export.parts.items()]
    agreements = [one.top1_agreement for one in found if one.top1_agreement is not None]
    return replace(
        max(found, key=lambda one: one.error_carried),
        sizes=min(one.sizes for one in found),
        error_dense=max(one.error_dense for one in found),
        top1_agreement=min(agreements, default=None),
    )


def _contains(larger: Plan, smaller: Plan) -> bool:
    """Whether every tensor of ``smaller`` is a weight that ``larger`` stores in the same form."""
    stored = {spec.name: spec for spec in larger.outputs}
    made = {write.name for plan in (larger, smaller) for unit in plan.units if not unit.reads for write in unit.writes}
    return all(stored.get(spec.name) == spec and spec.name not in made for spec in smaller.outputs)
