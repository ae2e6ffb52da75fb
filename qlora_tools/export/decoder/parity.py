"""Does the exported graph compute what the checkpoint computes? Asked after every export.

The graph is run over a prompt and then three single steps with a past. It is held against transformers' own
model of the same architecture, twice: with the source's dense weights in fp32, and with the weights as the
graph carries them (encoded and decoded again, or, where calibration chose the codes, decoded from the file). The first distance is what the scheme costs; the second must be
small whatever the scheme, because it is only the rounding of activations, and it is the one that finds a wrong
graph.

A large model is checked on its first layers and the first rows of its vocabulary: a second graph, removed
afterwards, points at the beginning of each tensor in the very file that was exported. So the check reads real
exported bytes and needs little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qlora_tools.engine.plan import Source
from qlora_tools.errors import CheckFailed
from qlora_tools.export.decoder.export import DecoderExport
from qlora_tools.export.decoder.graph import DATA_FILE, build_graph
from qlora_tools.export.decoder.layout import Layout, Matrix, layout_of
from qlora_tools.export.external import place, read_stored
from qlora_tools.export.runtime import DecoderSession
from qlora_tools.models.decoder import Decoder
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress

PROMPT, STEPS = 21, 3
_BATCH = 2
_LAYER_BYTES = 256 << 20
_VOCAB = 4096
_GRAPH_FILE = "parity.onnx"


@dataclass(frozen=True)
class Bound:
    """Largest relative errors allowed: against the carried weights, and against the dense ones."""

    carried: float
    dense: float


#: Activations are rounded to 8 bits per block in the quantized graphs; int4 weights alone move logits by tens of percent in small models.
BOUNDS: Mapping[str, Bound] = {"fp32": Bound(2e-4, 2e-4), "int8": Bound(0.1, 0.2), "int4": Bound(0.15, 0.9)}


@dataclass(frozen=True)
class Parity:
    """What the check found. Relative error: norm of the difference over norm of the reference, logits centred per position."""

    layers: int
    of_layers: int
    positions: int
    decode_steps: int
    error_carried: float
    error_dense: float
    kl_mean: float
    top1_agreement: float

    @property
    def summary(self) -> str:
        part = "" if self.layers == self.of_layers else f", first {self.layers} of {self.of_layers} layers"
        return f"relative error {self.error_carried:.1e} against its own weights, {self.error_dense:.1e} against dense, KL {self.kl_mean:.1e}, top-1 {self.top1_agreement:.1%}{part}"


def check_parity(export: DecoderExport, source: Source, config: Mapping[str, Any], folder: Path, *, progress: Progress = SILENT) -> Parity:
    """Hold the export in ``folder`` against the source.

    Raises:
        CheckFailed: an error above the scheme's bound, or logits that are not finite; the message has the numbers.
    """
    decoder, layout = truncated(export)
    ids_BT = np.random.default_rng(0).integers(0, decoder.vocab, (_BATCH, PROMPT + STEPS))
    with progress.task("parity", 3, "runs") as task:
        stored = _Stored(export, folder) if export.statistics is not None else None
        dense, carried = _references(export, decoder, layout, source, config, ids_BT, stored, lambda: task.advance(1))
        found = _run_graph(export, decoder, layout, folder, ids_BT)
        task.advance(1)
    bound = BOUNDS[export.scheme.carried]
    for phase, rows in {"prefill": slice(0, PROMPT), "prompt with its past kept": slice(PROMPT, PROMPT + 1), "decode": slice(PROMPT + 1, None)}.items():
        _hold(phase, found[:, rows], carried[:, rows], bound.carried, "the weights it carries", export, decoder)
        _hold(phase, found[:, rows], dense[:, rows], bound.dense, "the dense weights", export, decoder)
    kl, agreement = _divergence(dense, found)
    return Parity(decoder.layers, export.decoder.layers, PROMPT, STEPS, relative_error(found, carried), relative_error(found, dense), kl, agreement)


def truncated(export: DecoderExport) -> tuple[Decoder, Layout]:
    """The first layers and vocabulary rows of an export, with the same stored names and formats."""
    full = export.decoder
    layer_bytes = 4 * sum(rows * columns for rows, columns in map(full.linear_shape, ("query", "key", "value", "output", "gate", "up", "down")))
    layers = max(1, min(full.layers, _LAYER_BYTES // layer_bytes))
    decoder = replace(full, layers=layers, vocab=min(full.vocab, _VOCAB), windows=full.windows[:layers])
    return decoder, layout_of(decoder, export.scheme, export.table_dtype, export.target)


def relative_error(found: NDArray[Any], reference: NDArray[Any]) -> float:
    """Norm of the difference over norm of the reference, each row of logits centred (a shift of all logits changes nothing)."""
    centred = _centred(reference)
    return float(np.linalg.norm(_centred(found) - centred)) / max(float(np.linalg.norm(centred)), 1e-30)


def _centred(logits: NDArray[Any]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    centred: NDArray[np.float64] = wide - wide.mean(-1, keepdims=True)
    return centred


def _run_graph(export: DecoderExport, decoder: Decoder, layout: Layout, folder: Path, ids_BT: NDArray[np.int64]) -> NDArray[Any]:
    """Logits [B, prompt + 1 + steps, V]: of the whole prompt without a past, of its last position, of each step."""
    offsets = place(export.plan.outputs)[0]
    specs = {spec.name: spec for spec in export.plan.outputs} | {spec.name: spec for matrix in layout.matrices() for spec in matrix.specs()}
    graph = folder / _GRAPH_FILE
    ir.save(build_graph(decoder, layout, specs, offsets, export.target), graph)
    try:
        session = DecoderSession(folder, threads=max(1, torch.get_num_threads()), file_name=_GRAPH_FILE)
        try:
            pieces = [session.score(ids_BT[:, :PROMPT]), session.prefill(ids_BT[:, :PROMPT])[:, None]]
            pieces += [session.decode(ids_BT[:, position])[:, None] for position in range(PROMPT, PROMPT + STEPS)]
        finally:
            session.close()
    finally:
        graph.unlink()
    return np.concatenate(pieces, axis=1)


class _Stored:
    """The exported file's own parts, for weights that encoding alone would not give again."""

    def __init__(self, export: DecoderExport, folder: Path) -> None:
        self._path = folder / DATA_FILE
        self._offsets = place(export.plan.outputs)[0]
        self._specs = {spec.name: spec for spec in export.plan.outputs}
        self._first_rows = {
            (matrix.name, module): sum(matrix.rows[:number]) for matrix in export.layout.matrices() for number, module in enumerate(matrix.modules)
        }

    def decode(self, matrix: Matrix, module: str, rows: int, *, looked_up: bool) -> torch.Tensor:
        """The first ``rows`` rows of the weight of ``module`` in ``matrix``, fp32."""
        first = self._first_rows[matrix.name, module]
        names = [spec.name for spec in matrix.format.parts(matrix.name, rows, matrix.columns)]
        parts = {name: read_stored(self._path, self._specs[name], self._offsets[name], (first, first + rows)) for name in names}
        return matrix.format.decode(matrix.name, parts, matrix.columns, looked_up=looked_up)


def _references(
    export: DecoderExport,
    decoder: Decoder,
    layout: Layout,
    source: Source,
    config: Mapping[str, Any],
    ids_BT: NDArray[np.int64],
    stored: _Stored | None,
    advance: Callable[[], None],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(dense, carried) logits, laid out like :func:`_run_graph`'s."""
    model = _reference_model(decoder, config)
    parameters = dict(model.named_parameters())
    for name in decoder.expected_shapes():
        parameters[name].copy_(_rows(source, name, parameters[name]))
    dense = _logits(model, ids_BT)
    advance()
    if export.scheme.carried == "fp32":
        advance()
        return dense, dense
    _carry(model, decoder, layout, stored)
    carried = _logits(model, ids_BT)
    advance()
    return dense, carried


def _reference_model(decoder: Decoder, config: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    changes: dict[str, Any] = {"num_hidden_layers": decoder.layers, "vocab_size": decoder.vocab, "tie_word_embeddings": decoder.tied}
    if config.get("layer_types"):
        changes["layer_types"] = config["layer_types"][: decoder.layers]
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        changes[token] = None
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    made = CONFIG_MAPPING[decoder.model_type].from_dict({**plain, **changes})
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval().requires_grad_(False)
    model.tie_weights()
    differing = {name for name, _ in model.named_parameters()} ^ set(decoder.expected_shapes())
    if differing:
        raise CheckFailed(
            f"parity: transformers' {decoder.model_type} and the exported graph differ in {shortened(sorted(differing))}",
            hint="export with another transformers version, or with --no-verify",
        )
    return model


def _rows(source: Source, name: str, like: torch.Tensor) -> torch.Tensor:
    """The tensor, or as many of its first rows as ``like`` has."""
    whole = source.specs[name].shape == tuple(like.shape)
    return source.read(name, None if whole else (0, like.shape[0])).to(torch.float32)


def _carry(model: Any, decoder: Decoder, layout: Layout, stored: _Stored | None) -> None:
    """Replace the model's weights by what the graph carries. A tied table is untied: it may be looked up more exactly than it is multiplied."""
    parameters = dict(model.named_parameters())
    if decoder.tied:
        model.lm_head.weight = torch.nn.Parameter(parameters[f"{decoder.module('embedding')}.weight"].clone(), requires_grad=False)
        model.lm_head.weight.copy_(_carried(layout.head, layout.head.modules[0], model.lm_head.weight, stored, looked_up=False))
    for matrix in layout.matrices():
        for module in matrix.modules:
            weight = parameters[f"{module}.weight"]
            weight.copy_(_carried(matrix, module, weight, stored, looked_up=matrix is layout.embedding))


def _carried(matrix: Matrix, module: str, weight: torch.Tensor, stored: _Stored | None, *, looked_up: bool) -> torch.Tensor:
    if stored is not None:
        return stored.decode(matrix, module, len(weight), looked_up=looked_up)
    return matrix.format.decode("w", matrix.format.encode("w", weight.detach()), weight.shape[1], looked_up=looked_up)


@torch.inference_mode()
def _logits(model: Any, ids_BT: NDArray[np.int64]) -> NDArray[Any]:
    logits: NDArray[Any] = model(input_ids=torch.from_numpy(ids_BT), use_cache=False).logits.numpy()
    return np.concatenate([logits[:, :PROMPT], logits[:, PROMPT - 1 :]], axis=1)


def _hold(phase: str, found: NDArray[Any], reference: NDArray[Any], bound: float, against: str, export: DecoderExport, decoder: Decoder) -> None:
    error = relative_error(found, reference)
    if not error <= bound:
        scope = f"first {decoder.layers} of {export.decoder.layers} layers" if decoder.layers < export.decoder.layers else f"{decoder.layers} layers"
        raise CheckFailed(
            f"parity, {phase}: the {export.scheme.name} graph is {error:.3g} away from {against}, at most {bound:.3g} is allowed ({scope})",
            hint="the graph does not compute what the checkpoint computes; please report it with the model's config.json",
        )


def _divergence(reference: NDArray[Any], found: NDArray[Any]) -> tuple[float, float]:
    """(mean KL(reference || found) in nats, share of positions with the same top token)."""
    p, q = (torch.from_numpy(logits).to(torch.float64).log_softmax(-1) for logits in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean()), float((reference.argmax(-1) == found.argmax(-1)).mean())
