"""One call from a model's tensors to a folder that ONNX Runtime, onnxruntime-genai and Optimum can run.

Writes into the folder it is given; that the folder appears whole or not at all is the caller's doing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.engine.plan import Plan, Source
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.export.calibrated import Choice, Gain, gain_of
from qlora_tools.export.decoder.graph import DATA_FILE, build_graph
from qlora_tools.export.decoder.layout import Layout, layout_of
from qlora_tools.export.decoder.weights import MODEL, STATISTICS, check_tensors, plan_weights
from qlora_tools.export.external import ExternalWriter, place
from qlora_tools.export.schemes import Scheme, scheme_of
from qlora_tools.export.target import CPU, Target
from qlora_tools.models.decoder import Decoder, decoder_of
from qlora_tools.progress import SILENT, Progress

MODEL_FILE = "model.onnx"
#: GroupQueryAttention's rotary part insists on it.
HEAD_SIZE_STEP = 16


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

    @property
    def file_bytes(self) -> int:
        return place(self.plan.outputs)[1]


def plan_export(source: Source, config: Mapping[str, Any], scheme: str, target: Target = CPU, statistics: Statistics | None = None) -> DecoderExport:
    """Everything that can be known from headers and config.json. With ``statistics``, weights are encoded for the inputs they describe.

    Raises:
        UnsupportedError: architecture, option, scheme or provider without a graph. MissingError, IncompatibleError:
        tensors that are missing or do not have the config's shapes, or statistics that hold no input of this model.
    """
    decoder = decoder_of(config)
    if f"{decoder.module('head')}.weight" in source.specs:
        decoder = replace(decoder, tied=False)  # a head of its own was trained, or merged, whatever the config says
    if decoder.head_size % HEAD_SIZE_STEP:
        raise UnsupportedError(
            f"heads of {decoder.head_size} cannot be exported", hint=f"ONNX Runtime's attention operator takes multiples of {HEAD_SIZE_STEP}"
        )
    chosen = scheme_of(scheme, target)
    check_tensors(source, decoder)
    table_dtype = source.specs[f"{decoder.module('embedding')}.weight"].dtype
    layout = layout_of(decoder, chosen, table_dtype, target)
    plan = plan_weights(source, decoder, layout, statistics)
    if statistics is not None and not any(read.source == STATISTICS for unit in plan.units for read in unit.reads):
        raise IncompatibleError(f"{statistics.path} describes no layer of this model", hint="run `qlt calibrate` on it")
    return DecoderExport(decoder, chosen, table_dtype, layout, plan, target, statistics)


def write_graph(export: DecoderExport, source: Source, folder: Path, progress: Progress = SILENT) -> Gain | None:
    """``model.onnx`` and ``model.onnx.data`` in ``folder``; returns what calibration gained, if there was any.

    Raises:
        NonFiniteError: a weight holds NaN or infinity. StorageError: no room.
    """
    specs = {spec.name: spec for spec in export.plan.outputs}
    model = build_graph(export.decoder, export.layout, specs, place(export.plan.outputs)[0], export.target)
    sources: dict[str, Source] = {MODEL: source}
    if export.statistics is not None:
        sources[STATISTICS] = export.statistics
    with ExternalWriter(folder / DATA_FILE, export.plan.outputs) as writer:
        reports = run(export.plan, sources, writer, title=f"export {export.scheme.name}", progress=progress)
    ir.save(model, folder / MODEL_FILE)
    return gain_of(report for report in reports if isinstance(report, Choice)) if export.statistics is not None else None
