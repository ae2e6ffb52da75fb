"""One call from a model's tensors to a folder that ONNX Runtime, onnxruntime-genai and Optimum can run.

Writes into the folder it is given; that the folder appears whole or not at all is the caller's doing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.engine.plan import Plan, Source
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.export.calibrated import STATISTICS, Choice, Gain, gain_of
from qlora_tools.export.decoder.branches import Beside, Branches, bind_branches, with_fixed
from qlora_tools.export.decoder.graph import DATA_FILE, build_graph
from qlora_tools.export.decoder.layout import Layout, layout_of
from qlora_tools.export.decoder.stacked import separate_experts
from qlora_tools.export.decoder.weights import MODEL, STORED, check_tensors, plan_weights
from qlora_tools.export.external import ExternalWriter, place
from qlora_tools.export.notes import calibration_notes, decoder_notes, joined
from qlora_tools.export.onnx_adapter import file_of, write_adapter_file
from qlora_tools.export.schemes import Scheme, scheme_of
from qlora_tools.export.target import CPU, Target
from qlora_tools.models.decoder import Decoder, decoder_of
from qlora_tools.progress import SILENT, Progress

MODEL_FILE = "model.onnx"
#: What GroupQueryAttention insists on: multiples of 8 for heads, of 16 for heads that are rotated and for the part of them that is.
HEAD_STEP, ROTATED_STEP = 8, 16


@dataclass(frozen=True)
class DecoderExport:
    """A planned export: nothing read or written yet."""

    decoder: Decoder
    scheme: Scheme
    table_dtype: str
    layout: Layout
    plan: Plan
    target: Target = CPU
    statistics: Statistics | None = None
    branches: Branches = field(default_factory=Branches)

    @property
    def file_bytes(self) -> int:
        return place(self.plan.outputs)[1]

    @property
    def note(self) -> str | None:
        """What is worth knowing about the scheme and about what it became."""
        calibration = [] if self.statistics is None else calibration_notes(self.layout, self.plan)
        return joined(self.scheme.note, *decoder_notes(self.layout, self.scheme), *calibration)


def plan_export(
    source: Source,
    config: Mapping[str, Any],
    scheme: str | Scheme,
    target: Target = CPU,
    statistics: Statistics | None = None,
    beside: Beside | None = None,
) -> DecoderExport:
    """Everything that can be known from headers and config.json. With ``statistics``, weights are encoded for the inputs they describe; ``beside`` are
    adapters that are not merged into the weights.

    Raises:
        UnsupportedError: architecture, option, scheme or provider without a graph. MissingError, IncompatibleError:
        tensors that are missing or do not have the config's shapes, or statistics that hold no input of this model. And what ``bind_branches`` raises.
    """
    decoder = decoder_of(config).as_stored(source.specs)
    if f"{decoder.module('head')}.weight" in source.specs:
        decoder = replace(decoder, tied=False)  # a head of its own was trained, or merged, whatever the config says
    source = separate_experts(source, decoder)
    if not target.standard:
        _check_head_sizes(decoder)
    chosen = scheme_of(scheme, target)
    check_tensors(source, decoder)
    table_dtype = source.specs[f"{decoder.module('embedding')}.weight"].dtype
    layout = layout_of(decoder, chosen, table_dtype, target)
    plan = plan_weights(source, decoder, layout, statistics)
    if statistics is not None and not any(read.source == STATISTICS for unit in plan.units for read in unit.reads):
        raise IncompatibleError(f"{statistics.path} describes no layer of this model", hint="run `qlt calibrate` on it")
    branches = bind_branches(beside or Beside(), layout, decoder, target)
    return DecoderExport(decoder, chosen, table_dtype, layout, with_fixed(plan, branches, list(layout.matrices()), target), target, statistics, branches)


def _check_head_sizes(decoder: Decoder) -> None:
    heads, rotated = decoder.head_size, {rope.size for rope in decoder.ropes.values()}
    step = ROTATED_STEP if rotated else HEAD_STEP
    if heads % step:
        raise UnsupportedError(
            f"heads of {heads} are not multiples of {step}, which ONNX Runtime's own attention operator wants", hint="plain ONNX takes them: --standard"
        )
    if any(size % step for size in rotated):
        raise UnsupportedError(
            f"heads of which {', '.join(map(str, sorted(rotated)))} dimensions are rotated, no multiple of {step}, which ONNX Runtime's own attention "
            "operator wants",
            hint="plain ONNX takes them: --standard",
        )


def drawn_graph(export: DecoderExport) -> ir.Model:
    """The graph, whose weights lie in a data file that need not be there."""
    specs = {spec.name: spec for spec in export.plan.outputs}
    return build_graph(export.decoder, export.layout, specs, place(export.plan.outputs)[0], export.target, export.branches.inputs)


def write_graph(export: DecoderExport, source: Source, folder: Path, progress: Progress = SILENT) -> Gain | None:
    """``model.onnx``, ``model.onnx.data`` and the files of kept adapters in ``folder``; returns what calibration gained, if there was any.

    Raises:
        NonFiniteError: a weight holds NaN or infinity. StorageError: no room.
    """
    model = drawn_graph(export)
    sources: dict[str, Source] = {MODEL: separate_experts(source, export.decoder)}
    if export.statistics is not None:
        sources[STATISTICS] = export.statistics
    if isinstance(source, LogicalCheckpoint):
        sources[STORED] = source.stored
    with ExternalWriter(folder / DATA_FILE, export.plan.outputs) as writer:
        reports = run(export.plan, sources, writer, title=f"export {export.scheme.name}", progress=progress)
    ir.save(model, folder / MODEL_FILE)
    for name, factors in export.branches.kept.items():
        write_adapter_file(file_of(folder, name), factors)
    return gain_of(report for report in reports if isinstance(report, Choice)) if export.statistics is not None else None
