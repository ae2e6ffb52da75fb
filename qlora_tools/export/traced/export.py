"""From a checkpoint's tensors to a traced graph with the scheme's weights: planned from headers and config alone, then written tensor by tensor.

Writes into the folder it is given; that the folder appears whole or not at all is the caller's doing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.engine.plan import Plan, Source, Unit
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError
from qlora_tools.export.calibrated import STATISTICS, Calibration, Choice, Gain, gain_of
from qlora_tools.export.decoder.branches import Beside, Branches, Place, bind_at, truncated_branches, with_fixed
from qlora_tools.export.encoding import constant_unit, encode_units, float_units
from qlora_tools.export.external import ExternalWriter, place
from qlora_tools.export.nodes import Nodes
from qlora_tools.export.notes import Carried, calibrated_weights, carried_otherwise, joined, left_plain
from qlora_tools.export.onnx_adapter import file_of, write_adapter_file
from qlora_tools.export.schemes import FLOATS, Scheme, scheme_of
from qlora_tools.export.target import CPU, Target
from qlora_tools.export.traced.branches import live_places, matrices_at, put_branches, traced_places
from qlora_tools.export.traced.convolutions import Convolution, convolutions_of, put_convolutions
from qlora_tools.export.traced.diffusion import diffusion_subject
from qlora_tools.export.traced.inputs import Subject, subject_of
from qlora_tools.export.traced.layout import Weight, uses_of, weight_of
from qlora_tools.export.traced.names import check_stored, stored_names
from qlora_tools.export.traced.rewrite import put_weights
from qlora_tools.export.traced.trace import Traced, build, trace
from qlora_tools.models.family import Family, family_of
from qlora_tools.models.work import is_of_diffusers
from qlora_tools.progress import SILENT, Progress
from qlora_tools.specs import TensorSpec, dtype, spec_of

MODEL, MODEL_FILE, DATA_FILE = "model", "model.onnx", "model.onnx.data"
#: Constants of the model itself that are larger than this go into the data file.
_INLINE_BYTES = 4096


@dataclass(frozen=True, eq=False)
class TracedExport:
    """A planned export: nothing read or written yet. ``weights`` by the names of the live model; ``graph`` is complete but for its data, which lies at ``offsets``
    of ``data_file``. ``beside``: the adapters behind ``branches``, whose ``places`` go by the paths of the live model."""

    subject: Subject
    config: Mapping[str, Any]
    scheme: Scheme
    target: Target
    graph: ir.Model
    weights: Mapping[str, Weight]
    plan: Plan
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    convolutions: tuple[Convolution, ...]
    offsets: Mapping[str, int]
    data_file: str
    beside: Beside
    branches: Branches
    places: Mapping[str, list[Place]]
    statistics: Statistics | None = None

    @property
    def task(self) -> str:
        return self.subject.task

    @property
    def note(self) -> str | None:
        """What is worth knowing about the scheme, about what it became and about the graph."""
        return joined(self.scheme.note, *carried_otherwise(self.carried, self.scheme), *self._left_plain(), self.subject.note)

    def _left_plain(self) -> Iterator[str]:
        """The note on linears and kernels that were to be calibrated and were not."""
        if self.statistics is not None:
            multiplied = {f"{place.matrix.name}.weight" for several in self.places.values() for place in several} | {one.weight for one in self.convolutions}
            rounded = [weight for weight in self.carried if weight.name in multiplied and weight.carried not in FLOATS]
            yield from left_plain(rounded, {weight.name for weight in rounded} - calibrated_weights(self.plan))

    @property
    def carried(self) -> frozenset[Carried]:
        """Every matrix, table and kernel, by the name of its module; vectors are floats everywhere."""
        taken = {one.weight: "int8" for one in self.convolutions}
        found = {weight.name: weight for weight in self.weights.values() if len(weight.shape) > 1 and dtype(weight.dtype).is_float}
        return frozenset(
            Carried(name.removesuffix(".weight").rpartition(".")[2], taken.get(name, one.carried), math.prod(one.shape), name) for name, one in found.items()
        )

    @property
    def file_bytes(self) -> int:
        return place(self.plan.outputs)[1]


def plan_traced(
    source: Source,
    config: Mapping[str, Any],
    scheme: str | Scheme,
    target: Target = CPU,
    *,
    task: str | None = None,
    beside: Beside | None = None,
    statistics: Statistics | None = None,
    progress: Progress = SILENT,
) -> TracedExport:
    """Trace the model that ``config`` describes, for ``task`` (Optimum's names and their synonyms; without one, what ``architectures`` says), with the
    adapters ``beside`` its weights. With ``statistics``, linears are encoded for the inputs they describe.

    Raises:
        UnsupportedError: no class of transformers for it, or torch cannot trace it. UsageError: no such task. MissingError, IncompatibleError:
        tensors that the graph needs are missing or have other shapes. And what ``bind_at`` raises.
    """
    scheme_of(scheme, target)
    subject = diffusion_subject(config, task) if is_of_diffusers(config) else subject_of(config, task)
    return plan_subject(subject, source, config, scheme, target, beside=beside, statistics=statistics, progress=progress)


def plan_subject(
    subject: Subject,
    source: Source,
    config: Mapping[str, Any],
    scheme: str | Scheme,
    target: Target = CPU,
    *,
    beside: Beside | None = None,
    statistics: Statistics | None = None,
    progress: Progress = SILENT,
) -> TracedExport:
    """:func:`plan_traced` for a model that is already known."""
    chosen = scheme_of(scheme, target)
    with progress.task("trace", 1, "models") as step:
        drawn = draw(subject, source, config, target)
        step.advance(1)
    return fill(drawn, source, chosen, beside=beside, statistics=statistics)


@dataclass(frozen=True, eq=False)
class Drawn:
    """A model's graph without weights. ``stored``: live name -> tensor of the checkpoint."""

    subject: Subject
    config: Mapping[str, Any]
    target: Target
    traced: Traced
    stored: Mapping[str, str | None]


def draw(subject: Subject, source: Source, config: Mapping[str, Any], target: Target = CPU) -> Drawn:
    """Trace the subject's model; ``source`` says which of its buffers are weights."""
    compute = dtype(target.compute).torch
    model = build(subject, compute)
    names = stored_names(model, source, config)
    traced = trace(subject, model, {name for name, stored in names.items() if stored is not None}, compute)
    return Drawn(subject, config, target, traced, names)


def fill(
    drawn: Drawn,
    source: Source,
    scheme: Scheme,
    offsets: Mapping[str, int] | None = None,
    data_file: str = DATA_FILE,
    *,
    beside: Beside | None = None,
    branches: Branches | None = None,
    statistics: Statistics | None = None,
) -> TracedExport:
    """A graph and a plan with the weights of ``source`` as ``scheme`` has them; ``drawn`` itself is left as it is, to be filled again.

    ``offsets``: where tensors lie in a data file that exists already, by name. ``branches``: of ``beside``, where they are bound already, perhaps to more.

    Raises:
        IncompatibleError: ``statistics`` of none of the graph's linears. And what ``bind_at`` raises.
    """
    traced = drawn.traced.copy()
    weights = _weights(traced, drawn.stored, source, scheme, family_of(drawn.config))
    convolutions = convolutions_of(traced.model.graph, traced.empty, weights, scheme) if drawn.subject.kernels else ()
    taken = {live for one in convolutions for live in one.live}
    calibration = Calibration(statistics) if statistics is not None else None
    distinct = {weight.name: weight for live, weight in weights.items() if live not in taken}
    constants = _large_constants(traced.model.graph)
    carried: list[Convolution | Weight] = [*convolutions, *distinct.values()]
    outputs = [spec for one in carried for spec in one.specs()] + [spec_of(name, tensor) for name, tensor in constants.items()]
    units = [one.unit(MODEL) for one in convolutions] + [unit for weight in distinct.values() for unit in _units(weight, calibration)]
    if statistics is not None and not any(read.source == STATISTICS for unit in units for read in unit.reads):
        raise IncompatibleError(f"{statistics.path} describes no layer of this model", hint="run `qlt calibrate` on it")
    units += [constant_unit(name, tensor) for name, tensor in constants.items()]
    places = traced_places(traced.model.graph, traced.empty, weights)
    matrices = matrices_at(places)
    branches = bind_at(beside or Beside(), places, drawn.target) if branches is None else truncated_branches(branches, matrices)
    plan = with_fixed(Plan(tuple(outputs), tuple(units)), branches, matrices, drawn.target)
    outputs = list(plan.outputs)
    offsets = offsets or place(outputs)[0]
    nodes = Nodes({spec.name: spec for spec in outputs}, offsets, data_file, drawn.target)
    left = put_convolutions(traced.model.graph, nodes, convolutions, traced.empty)
    put_branches(traced.model, nodes, places, weights, left, branches.inputs)
    put_weights(traced.model, nodes, weights, left, constants)
    return TracedExport(
        drawn.subject,
        drawn.config,
        scheme,
        drawn.target,
        traced.model,
        weights,
        plan,
        traced.inputs,
        traced.outputs,
        convolutions,
        offsets,
        data_file,
        beside or Beside(),
        branches,
        live_places(places, weights),
        statistics,
    )


def write_traced(export: TracedExport, source: Source, folder: Path, progress: Progress = SILENT) -> Gain | None:
    """``model.onnx``, ``model.onnx.data`` and the files of kept adapters in ``folder``; returns what calibration gained, if there was any.

    Raises:
        NonFiniteError: a weight holds NaN or infinity. StorageError: no room.
    """
    with ExternalWriter(folder / DATA_FILE, export.plan.outputs) as writer:
        sources: dict[str, Source] = {MODEL: source} | ({STATISTICS: export.statistics} if export.statistics is not None else {})
        reports = run(export.plan, sources, writer, title=f"export {export.scheme.name}", progress=progress)
    ir.save(export.graph, folder / MODEL_FILE)
    for name, factors in export.branches.kept.items():
        write_adapter_file(file_of(folder, name), factors)
    return gain_of(report for report in reports if isinstance(report, Choice)) if export.statistics is not None else None


def _weights(traced: Traced, names: Mapping[str, str | None], source: Source, scheme: Scheme, family: Family) -> dict[str, Weight]:
    """Live name -> weight; live names of one stored tensor share theirs."""
    owners: dict[str, list[str]] = {}
    for live, value in traced.empty.items():
        assert value.shape is not None
        owners.setdefault(check_stored(live, tuple(int(axis) for axis in value.shape), names.get(live), source), []).append(live)
    found: dict[str, Weight] = {}
    for stored, lives in owners.items():
        uses = [use for live in lives for use in uses_of(traced.empty[live], traced.model.graph)]
        weight = weight_of(stored, tuple(lives), source.specs[stored], uses, scheme, family)
        found |= dict.fromkeys(lives, weight)
    return found


def _units(weight: Weight, calibration: Calibration | None) -> Iterator[Unit]:
    if weight.form is None:
        spec = TensorSpec(weight.name, weight.dtype, weight.specs()[0].shape)
        return float_units(MODEL, weight.name, spec, turned=weight.turned)
    return encode_units(MODEL, weight.name, weight.name, weight.form, weight.rows, weight.columns, turned=weight.turned, calibration=calibration)


def _large_constants(graph: ir.Graph) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _INLINE_BYTES:
            found[name] = torch.from_numpy(tensor.numpy().copy())
    return found
