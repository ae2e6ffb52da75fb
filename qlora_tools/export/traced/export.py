"""From a checkpoint's tensors to a traced graph with the scheme's weights: planned from headers and config alone, then written tensor by tensor.

Writes into the folder it is given; that the folder appears whole or not at all is the caller's doing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from qlora_tools.engine.plan import Plan, Source, Unit
from qlora_tools.engine.run import run
from qlora_tools.export.encoding import constant_unit, encode_units, float_units
from qlora_tools.export.external import ExternalWriter, place
from qlora_tools.export.nodes import Nodes
from qlora_tools.export.schemes import Scheme, scheme_of
from qlora_tools.export.target import CPU, Target
from qlora_tools.export.traced.convolutions import Convolution, convolutions_of, put_convolutions
from qlora_tools.export.traced.diffusion import diffusion_subject, is_diffusion
from qlora_tools.export.traced.inputs import Subject, subject_of
from qlora_tools.export.traced.layout import Weight, uses_of, weight_of
from qlora_tools.export.traced.names import check_stored, stored_names
from qlora_tools.export.traced.rewrite import put_weights
from qlora_tools.export.traced.trace import Traced, build, trace
from qlora_tools.models.family import Family, family_of
from qlora_tools.progress import SILENT, Progress
from qlora_tools.specs import TensorSpec, dtype, spec_of

MODEL, MODEL_FILE, DATA_FILE = "model", "model.onnx", "model.onnx.data"
#: Constants of the model itself that are larger than this go into the data file.
_INLINE_BYTES = 4096


@dataclass(frozen=True, eq=False)
class TracedExport:
    """A planned export: nothing read or written yet. ``weights`` by the names of the live model; ``graph`` is complete but for its data, which lies at ``offsets``
    of ``data_file``."""

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

    @property
    def task(self) -> str:
        return self.subject.task

    @property
    def note(self) -> str | None:
        """What is worth knowing about the scheme and about the graph."""
        return "; ".join(note for note in (self.scheme.note, self.subject.note) if note) or None

    @property
    def file_bytes(self) -> int:
        return place(self.plan.outputs)[1]


def plan_traced(
    source: Source, config: Mapping[str, Any], scheme: str, target: Target = CPU, *, task: str | None = None, progress: Progress = SILENT
) -> TracedExport:
    """Trace the model that ``config`` describes, for ``task`` (Optimum's names and their synonyms; without one, what ``architectures`` says).

    Raises:
        UnsupportedError: no class of transformers for it, or torch cannot trace it. UsageError: no such task. MissingError, IncompatibleError:
        tensors that the graph needs are missing or have other shapes.
    """
    scheme_of(scheme, target)
    return plan_subject(diffusion_subject(config) if is_diffusion(config) else subject_of(config, task), source, config, scheme, target, progress=progress)


def plan_subject(
    subject: Subject, source: Source, config: Mapping[str, Any], scheme: str, target: Target = CPU, *, progress: Progress = SILENT
) -> TracedExport:
    """:func:`plan_traced` for a model that is already known."""
    chosen = scheme_of(scheme, target)
    with progress.task("trace", 1, "models") as step:
        drawn = draw(subject, source, config, target)
        step.advance(1)
    return fill(drawn, source, chosen)


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


def fill(drawn: Drawn, source: Source, scheme: Scheme, offsets: Mapping[str, int] | None = None, data_file: str = DATA_FILE) -> TracedExport:
    """A graph and a plan with the weights of ``source`` as ``scheme`` has them; ``drawn`` itself is left as it is, to be filled again.

    ``offsets``: where tensors lie in a data file that exists already, by name.
    """
    traced = drawn.traced.copy()
    weights = _weights(traced, drawn.stored, source, scheme, family_of(drawn.config))
    convolutions = convolutions_of(traced.model.graph, traced.empty, weights, scheme)
    taken = {live for one in convolutions for live in one.live}
    distinct = {weight.name: weight for live, weight in weights.items() if live not in taken}
    constants = _large_constants(traced.model.graph)
    carried: list[Convolution | Weight] = [*convolutions, *distinct.values()]
    outputs = [spec for one in carried for spec in one.specs()] + [spec_of(name, tensor) for name, tensor in constants.items()]
    units = [one.unit(MODEL) for one in convolutions] + [unit for weight in distinct.values() for unit in _units(weight)]
    units += [constant_unit(name, tensor) for name, tensor in constants.items()]
    offsets = offsets or place(outputs)[0]
    nodes = Nodes({spec.name: spec for spec in outputs}, offsets, data_file, drawn.target)
    left = put_convolutions(traced.model.graph, nodes, convolutions, traced.empty)
    put_weights(traced.model, nodes, weights, left, constants)
    plan = Plan(tuple(outputs), tuple(units))
    names = traced.inputs, traced.outputs
    return TracedExport(drawn.subject, drawn.config, scheme, drawn.target, traced.model, weights, plan, *names, convolutions, offsets, data_file)


def write_traced(export: TracedExport, source: Source, folder: Path, progress: Progress = SILENT) -> None:
    """``model.onnx`` and ``model.onnx.data`` in ``folder``.

    Raises:
        NonFiniteError: a weight holds NaN or infinity. StorageError: no room.
    """
    with ExternalWriter(folder / DATA_FILE, export.plan.outputs) as writer:
        run(export.plan, {MODEL: source}, writer, title=f"export {export.scheme.name}", progress=progress)
    ir.save(export.graph, folder / MODEL_FILE)


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


def _units(weight: Weight) -> Iterator[Unit]:
    if weight.form is None:
        spec = TensorSpec(weight.name, weight.dtype, weight.specs()[0].shape)
        return float_units(MODEL, weight.name, spec, turned=weight.turned)
    return encode_units(MODEL, weight.name, weight.name, weight.form, weight.rows, weight.columns, turned=weight.turned)


def _large_constants(graph: ir.Graph) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _INLINE_BYTES:
            found[name] = torch.from_numpy(tensor.numpy().copy())
    return found
