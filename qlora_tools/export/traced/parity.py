"""Does the traced graph compute what the checkpoint computes? Asked after every export.

The graph is run on inputs of two sizes, which shows that its moving axes do move, and held against the live model twice, as decoders are
(:mod:`qlora_tools.export.decoder.parity`): with the source's dense weights in fp32, and with the weights as the graph carries them.

The live model is held in memory in fp32. Above :data:`WHOLE_BYTES` a shortened one is taken: the same config with its first layers only, traced once more,
over the very file that was exported. A large model without a number of layers to change is not checked but refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from qlora_tools.engine.plan import Source
from qlora_tools.errors import CheckFailed, OutOfMemory
from qlora_tools.export.bounds import BOUNDS
from qlora_tools.export.decoder.branches import attach, kept_names
from qlora_tools.export.external import read_elements
from qlora_tools.export.scratch import scratch_file
from qlora_tools.export.traced.export import MODEL_FILE, TracedExport, draw, fill
from qlora_tools.export.traced.inputs import SIZES, results, subject_of
from qlora_tools.export.traced.layout import Weight
from qlora_tools.export.traced.names import stored_names
from qlora_tools.export.traced.trace import build
from qlora_tools.export.twin import twin
from qlora_tools.progress import SILENT, Progress

WHOLE_BYTES = 4 << 30
_LAYERS = ("num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_KEPT_LAYERS = 2


@dataclass(frozen=True)
class TracedParity:
    """What the check found. Relative error: norm of the difference over norm of the reference, the largest over outputs and sizes.

    ``top1_agreement``: share of positions whose largest logit is the same one as the dense model's; ``None`` without logits.
    ``shortened``: only the first layers were checked.
    """

    sizes: int
    error_carried: float
    error_dense: float
    top1_agreement: float | None
    shortened: bool

    @property
    def summary(self) -> str:
        agreement = "" if self.top1_agreement is None else f", top-1 {self.top1_agreement:.1%}"
        part = f", first {_KEPT_LAYERS} layers" if self.shortened else ""
        return f"relative error {self.error_carried:.1e} against its own weights, {self.error_dense:.1e} against dense{agreement}{part}"


def check_traced(
    export: TracedExport,
    source: Source,
    folder: Path,
    *,
    file: str = MODEL_FILE,
    adapter: str | None = None,
    from_file: bool = False,
    progress: Progress = SILENT,
) -> TracedParity:
    """Hold the graph ``file`` in ``folder`` against the source; ``adapter`` names the kept one that is on, on both sides. ``from_file``: the
    carried weights are what lies there, not what this checkpoint encodes to.

    Raises:
        CheckFailed: an error above the scheme's bound, or results that are not finite. OutOfMemory: a model too large to be held
        in fp32, and without layers to leave out.
    """
    held = export
    if 4 * sum(int(np.prod(weight.shape)) for weight in set(export.weights.values())) > WHOLE_BYTES:
        held = _shortened(export, source)
    inputs = [held.subject.draw(size) for size in range(len(SIZES))]
    with progress.task("parity", 3, "runs") as task:
        found = _run(held, folder, file, inputs, _fed(held, adapter))
        task.advance(1)
        model = _loaded(held, source)
        attach(model, held.branches, held.places, adapter)
        dense = _results(held, model, inputs)
        task.advance(1)
        carried = dense
        if not held.scheme.dense:
            _carry(held, model, folder / held.data_file if from_file or held.statistics is not None else None)
            carried = _results(held, model, inputs)
        task.advance(1)
    bound = BOUNDS[held.scheme.carried]
    errors = [_hold(held, found, reference, limit, against) for reference, limit, against in (
        (carried, bound.carried, "the weights it carries"), (dense, bound.dense, "the dense weights"))]  # fmt: skip
    return TracedParity(len(inputs), errors[0], errors[1], _agreement(found, dense), held is not export)


def _shortened(export: TracedExport, source: Source) -> TracedExport:
    """The first layers of an export, over the whole one's file."""
    config = {key: min(value, _KEPT_LAYERS) if key in _LAYERS and isinstance(value, int) else value for key, value in export.config.items()}
    if config == dict(export.config):
        raise OutOfMemory(
            "parity holds the model in fp32, which takes more than 4 GiB, and it has no layers that could be left out", hint="export with --no-verify"
        )
    again = export.subject.again
    subject = again(config) if again else replace(subject_of(config, export.task), outputs=export.subject.outputs)
    held = fill(
        draw(subject, source, config, export.target), source, export.scheme, export.offsets, export.data_file, beside=export.beside, branches=export.branches
    )
    return replace(held, statistics=export.statistics)


def _run(
    export: TracedExport, folder: Path, file: str, inputs: list[dict[str, torch.Tensor]], factors: Mapping[str, NDArray[Any]]
) -> list[dict[str, NDArray[Any]]]:
    """Results of the graph, by name, for each of ``inputs``, with the ``factors`` of an adapter."""
    import onnxruntime

    model = export.graph if export.target.compute == "F32" else twin(ir.load(folder / file))
    with scratch_file(folder, ".onnx") as graph:
        ir.save(model, graph)
        try:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = max(1, torch.get_num_threads())
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
            named = [value.name for value in session.get_inputs()]
            fed = ({name: drawn[name].numpy() for name in named} | dict(factors) for drawn in inputs)
            return [dict(zip(export.output_names, session.run(None, one), strict=True)) for one in fed]
        except onnxruntime.capi.onnxruntime_pybind11_state.OrtException as error:
            raise CheckFailed(
                f"parity: onnxruntime does not run the graph: {str(error)[:400]}", hint="please report it with the model's config.json"
            ) from error


def _fed(export: TracedExport, adapter: str | None) -> dict[str, NDArray[Any]]:
    """The factors of a kept adapter by the names of the inputs that take them; a twin's inputs are fp32."""
    kept = {} if adapter is None else export.branches.kept[adapter]
    wide = export.target.compute != "F32"
    pairs = {matrix: pair.widened() if wide else pair for matrix, pair in kept.items()}
    return {name: factor.numpy() for matrix, pair in pairs.items() for name, factor in zip(kept_names(matrix), (pair.a_IR, pair.b_RO), strict=True)}


def _loaded(export: TracedExport, source: Source) -> Any:
    """The live model in fp32 with the source's weights; what the graph does not need and the source does not have is zero."""
    model = build(export.subject)
    names, read = stored_names(model, source, export.config), dict[str, torch.Tensor]()
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, old in table.items():
                name = f"{path}.{leaf}" if path else leaf
                stored = names.get(name)
                if old is None or (stored is None and old.device.type != "meta"):
                    continue
                if stored is None:
                    value = torch.zeros(old.shape)
                else:
                    value = read[stored] if stored in read else source.read(stored)
                    value = read[stored] = value.to(torch.float32) if value.is_floating_point() else value
                table[leaf] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
    return model


def _carry(export: TracedExport, model: Any, data: Path | None) -> None:
    """Replace the weights by what the graph carries: as it lies in the file ``data``, or as it is encoded. A tied table may be looked up more exactly than it
    is multiplied with."""
    for path, module in model.named_modules():
        for leaf, old in module._parameters.items():
            weight = export.weights.get(f"{path}.{leaf}" if path else leaf)
            if old is not None and weight is not None and weight.form is not None:
                module._parameters[leaf] = nn.Parameter(_decoded(export, weight, old, data, looked_up=isinstance(module, nn.Embedding)), requires_grad=False)
    for one in export.convolutions:
        path, _, leaf = one.live[0].rpartition(".")
        module = model.get_submodule(path)
        module._parameters[leaf] = nn.Parameter(one.carried(module._parameters[leaf]), requires_grad=False)


def _decoded(export: TracedExport, weight: Weight, dense: torch.Tensor, data: Path | None, *, looked_up: bool) -> torch.Tensor:
    assert weight.form is not None
    matrix = dense.T.contiguous() if weight.turned else dense.flatten(1)
    if data is None:
        parts = weight.form.encode(weight.name, matrix)
    else:
        parts = {spec.name: read_elements(data, spec, export.offsets[spec.name], spec.nbytes).view(spec.shape) for spec in weight.specs()}
    decoded = weight.form.decode(weight.name, parts, weight.columns, looked_up=looked_up)[: weight.rows]
    return decoded.T.contiguous() if weight.turned else decoded.reshape(weight.shape)


@torch.inference_mode()
def _results(export: TracedExport, model: Any, inputs: list[dict[str, torch.Tensor]]) -> list[dict[str, NDArray[Any]]]:
    answers = (results(model(**drawn, **export.subject.options), export.subject.outputs) for drawn in inputs)
    return [{name: tensor.float().numpy() for name, tensor in answer.items()} for answer in answers]


def _hold(export: TracedExport, found: list[dict[str, NDArray[Any]]], reference: list[dict[str, NDArray[Any]]], bound: float, against: str) -> float:
    """The largest relative error.

    Raises:
        CheckFailed: it is above ``bound``, or not a number.
    """
    worst = 0.0
    for size, (mine, other) in enumerate(zip(found, reference, strict=True)):
        for name, expected in other.items():
            error = relative_error(mine[name], expected)
            if not error <= bound:
                raise CheckFailed(
                    f"parity: `{name}` of the {export.scheme.name} graph is {error:.3g} away from {against} on inputs of size {size}, at most {bound:.3g} is allowed",
                    hint="the graph does not compute what the checkpoint computes; please report it with the model's config.json",
                )
            worst = max(worst, error)
    return worst


def relative_error(found: NDArray[Any], reference: NDArray[Any]) -> float:
    """Norm of the difference over norm of the reference; infinite for another shape."""
    if found.shape != reference.shape:
        return float("inf")
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wide)) / max(float(np.linalg.norm(wide)), 1e-30)


def _agreement(found: list[dict[str, NDArray[Any]]], dense: list[Mapping[str, NDArray[Any]]] | list[dict[str, NDArray[Any]]]) -> float | None:
    pairs = [(mine["logits"].argmax(-1).ravel(), other["logits"].argmax(-1).ravel()) for mine, other in zip(found, dense, strict=True) if "logits" in other]
    return float(np.concatenate([mine == other for mine, other in pairs]).mean()) if pairs else None
