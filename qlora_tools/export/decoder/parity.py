"""Does the exported graph compute what the checkpoint computes? Asked after every export.

The graph is run over a prompt and then three single steps with a past. It is held against transformers' own
model of the same architecture, twice: with the source's dense weights in fp32, and with the weights as the
graph carries them (encoded and decoded again, or, where calibration chose the codes, decoded from the file). The first distance is what the scheme costs; the second must be
small whatever the scheme, because it is only the rounding of activations, and it is the one that finds a wrong
graph.

A graph for a provider that is not here is checked by its twin in fp32 over the same bytes (:mod:`qlora_tools.export.twin`).

A large model is checked on its first layers and the first rows of its vocabulary: a second graph, removed
afterwards, points at the beginning of each tensor in the very file that was exported. So the check reads real
exported bytes and needs little memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qlora_tools.engine.plan import Source
from qlora_tools.errors import CheckFailed
from qlora_tools.export.bounds import bound_of
from qlora_tools.export.decoder.activations import watched
from qlora_tools.export.decoder.branches import Branches, attach, fixed_specs, places_of, truncated_branches
from qlora_tools.export.decoder.export import DecoderExport
from qlora_tools.export.decoder.graph import DATA_FILE, build_graph
from qlora_tools.export.decoder.layout import Layout, layout_of
from qlora_tools.export.decoder.matrices import Matrix
from qlora_tools.export.decoder.stacked import separate_experts
from qlora_tools.export.external import place, read_stored
from qlora_tools.export.onnx_adapter import write_adapter_file
from qlora_tools.export.placement import crossings, host_nodes, strays
from qlora_tools.export.runtime import DecoderSession
from qlora_tools.export.scratch import scratch_file
from qlora_tools.export.twin import runs_here, twin
from qlora_tools.models.decoder import Decoder, Piece, decoder_facts
from qlora_tools.models.family import family_of
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress

PROMPT, STEPS = 21, 3
_BATCH = 2
_LAYER_BYTES = 256 << 20
_VOCAB = 4096
#: Tokens that rounding sends to other experts are seen by all tokens after them: bounds are so many times wider for mixtures.
_MIXTURE_SLACK = 3


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
    elsewhere: tuple[str, ...] = ()
    """Nodes that the graph's own provider does not run; where it is not here, copies between host and device that the graph would cost it."""

    @property
    def summary(self) -> str:
        stray = f"; {len(self.elsewhere)} nodes elsewhere: {shortened(self.elsewhere)}" if self.elsewhere else ""
        part = "" if self.layers == self.of_layers else f", first {self.layers} of {self.of_layers} layers"
        return f"relative error {self.error_carried:.1e} against its own weights, {self.error_dense:.1e} against dense, KL {self.kl_mean:.1e}, top-1 {self.top1_agreement:.1%}{part}{stray}"


def check_parity(
    export: DecoderExport,
    source: Source,
    config: Mapping[str, Any],
    folder: Path,
    *,
    adapter: str | None = None,
    ids_BT: NDArray[np.int64] | None = None,
    from_file: bool = False,
    progress: Progress = SILENT,
) -> Parity:
    """Hold the export in ``folder`` against the source; ``adapter`` names the kept one that is on, on both sides.

    ``ids_BT`` [B, PROMPT + STEPS]: the tokens to run, through the whole model; without them random ones through its beginning. ``from_file``: the carried
    weights are read from the data file even where encoding the source would give them.

    Raises:
        CheckFailed: an error above the scheme's bound, or logits that are not finite; the message has the numbers.
    """
    source = separate_experts(source, export.decoder)
    decoder, layout = truncated(export) if ids_BT is None else (export.decoder, export.layout)
    if ids_BT is None:
        ids_BT = np.random.default_rng(0).integers(0, decoder.vocab, (_BATCH, PROMPT + STEPS))
    branches = truncated_branches(export.branches, layout.matrices())
    with progress.task(f"parity of {adapter}" if adapter else "parity", 3, "runs") as task:
        stored = _Stored(export, folder) if from_file or export.statistics is not None or export.scheme.carried == "nf4" else None
        live = family_of(config).live_names(config, source.specs)
        places = {live(module): found for module, found in places_of(layout, decoder).items()}
        branching = partial(attach, branches=branches, places=places, adapter=adapter)
        dense, carried = _references(export, decoder, layout, source, config, ids_BT, stored, branching)
        task.advance(2)
        found, elsewhere = _run_graph(export, decoder, layout, folder, ids_BT, branches, adapter)
        task.advance(1)
    bound = bound_of(export.scheme)
    for phase, rows in {"prefill": slice(0, PROMPT), "prompt with its past kept": slice(PROMPT, PROMPT + 1), "decode": slice(PROMPT + 1, None)}.items():
        _hold(phase, found[:, rows], carried[:, rows], bound.carried, "the weights it carries", export, decoder)
        _hold(phase, found[:, rows], dense[:, rows], bound.dense, "the dense weights", export, decoder)
    kl, agreement = _divergence(dense, found)
    errors = relative_error(found, carried), relative_error(found, dense)
    return Parity(decoder.layers, export.decoder.layers, PROMPT, STEPS, *errors, kl, agreement, elsewhere)


def truncated(export: DecoderExport) -> tuple[Decoder, Layout]:
    """The first layers and vocabulary rows of an export, with the same stored names and formats."""
    full = export.decoder
    layer_bytes = 4 * sum(rows * columns for rows, columns in map(full.linear_shape, full.linears))
    experts = None
    if full.experts is not None:
        each = 4 * full.experts.expert_elements(full.hidden)
        experts = max(full.experts.per_token, min(full.experts.count, _LAYER_BYTES // each))
        layer_bytes += experts * each
    layers = max(1, min(full.layers, _LAYER_BYTES // layer_bytes))
    rows = full.vocab if export.target.standard else min(full.vocab, _VOCAB)  # plain ONNX stores outputs last: its first bytes are not its first rows
    decoder = full.first(layers, rows, experts)
    return decoder, layout_of(decoder, export.scheme, export.table_dtype, export.target)


def relative_error(found: NDArray[Any], reference: NDArray[Any]) -> float:
    """Norm of the difference over norm of the reference, each row of logits centred (a shift of all logits changes nothing)."""
    centred = _centred(reference)
    return float(np.linalg.norm(_centred(found) - centred)) / max(float(np.linalg.norm(centred)), 1e-30)


def _typical_error(found: NDArray[Any], reference: NDArray[Any]) -> float:
    """The (lower) median of the positions' relative errors: where two experts score alike, rounding sends a token to the other one, and that position
    alone is far off; a wrong graph is wrong everywhere."""
    wide = _centred(reference)
    errors = np.linalg.norm(_centred(found) - wide, axis=-1) / np.maximum(np.linalg.norm(wide, axis=-1), 1e-30)
    return float(np.quantile(errors, 0.5, method="lower"))


def _centred(logits: NDArray[Any]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    centred: NDArray[np.float64] = wide - wide.mean(-1, keepdims=True)
    return centred


def _run_graph(
    export: DecoderExport, decoder: Decoder, layout: Layout, folder: Path, ids_BT: NDArray[np.int64], branches: Branches, adapter: str | None
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Logits [B, prompt + 1 + steps, V]: of the whole prompt without a past, of its last position, of each step; and the nodes that do not run on the
    graph's provider."""
    offsets = place(export.plan.outputs)[0]
    specs = {spec.name: spec for spec in export.plan.outputs} | {spec.name: spec for matrix in layout.matrices() for spec in matrix.specs()}
    specs |= {spec.name: spec for spec in fixed_specs(branches, layout.matrices(), export.target)}
    model = build_graph(decoder, layout, specs, offsets, export.target, branches.inputs)
    host, here = host_nodes(model), runs_here(export.target)
    foretold = crossings(model) if export.target.provider == "cuda" else ()
    device = export.target.provider if here else "cpu"
    with scratch_file(folder, ".onnx") as graph, scratch_file(folder, ".onnx_adapter") as file:
        ir.save(model if here else twin(model), graph)
        session = DecoderSession(folder, threads=max(1, torch.get_num_threads()), device=device, file_name=graph.name)
        try:
            if adapter is not None:
                factors = branches.kept[adapter]
                write_adapter_file(file, factors if here else {name: pair.widened() for name, pair in factors.items()})  # the twin's inputs are fp32
                session.use(file)
            pieces = [session.score(ids_BT[:, :PROMPT]), session.prefill(ids_BT[:, :PROMPT])[:, None]]
            pieces += [session.decode(ids_BT[:, position])[:, None] for position in range(PROMPT, PROMPT + STEPS)]
            elsewhere = tuple(map(str, strays(session.nodes(), device, host))) if device == "cuda" else foretold
        finally:
            session.close()
    return np.concatenate(pieces, axis=1), elsewhere


class _Stored:
    """The exported file's own parts, for weights that encoding alone would not give again."""

    def __init__(self, export: DecoderExport, folder: Path) -> None:
        self._path = folder / DATA_FILE
        self._offsets = place(export.plan.outputs)[0]
        self._specs = {spec.name: spec for spec in export.plan.outputs}

    def decode(self, matrix: Matrix, first: int, rows: int, *, looked_up: bool) -> torch.Tensor:
        """``rows`` rows of ``matrix`` from ``first`` on, as far apart as those of one piece are, fp32."""
        stop = first + (rows - 1) * matrix.step + 1
        names = [spec.name for spec in matrix.format.parts(matrix.name, rows, matrix.columns)]
        parts = {name: read_stored(self._path, self._specs[name], self._offsets[name], (first, stop))[:: matrix.step] for name in names}
        return matrix.format.decode(matrix.name, parts, matrix.columns, looked_up=looked_up)


def _references(
    export: DecoderExport,
    decoder: Decoder,
    layout: Layout,
    source: Source,
    config: Mapping[str, Any],
    ids_BT: NDArray[np.int64],
    stored: _Stored | None,
    attach_branches: Callable[[Any], None],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(dense, carried) logits, laid out like :func:`_run_graph`'s."""
    live = family_of(config).live_names(config, source.specs)
    model = _reference_model(decoder, config, live)
    attach_branches(model)
    parameters = _parameters(model, decoder, live)
    for name, parameter in parameters.items():
        parameter.copy_(_rows(source, name, parameter))
    with watched(model) as reach:
        dense = _logits(model, ids_BT)
    reach.check(export.target)
    if export.scheme.dense and export.target.compute == "F32":
        return dense, dense
    _carry(model, parameters, decoder, layout, stored)
    carried = _logits(model, ids_BT)
    return dense, carried


def _reference_model(decoder: Decoder, config: Mapping[str, Any], live: Callable[[str], str]) -> Any:
    """transformers' model of the same description. ``live``: how a tensor of the checkpoint is called in it."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    layers = decoder_facts(config).get("renamed", {}).get("num_hidden_layers", "num_hidden_layers")
    changes: dict[str, Any] = {layers: decoder.layers, "vocab_size": decoder.vocab, "tie_word_embeddings": decoder.tied}
    if config.get("layer_types"):
        changes["layer_types"] = config["layer_types"][: decoder.layers]
    if decoder.experts is not None:
        changes |= dict.fromkeys(("num_experts", "num_local_experts"), decoder.experts.count)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        changes[token] = None
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    made = CONFIG_MAPPING[decoder.model_type].from_dict({**plain, **changes})
    experts = {"experts_implementation": "eager"} if decoder.experts is not None else {}  # the fast ones want sizes in whole vectors
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, **experts).eval().requires_grad_(False)
    model.tie_weights()
    places = decoder.stacked_places()
    expected = {live(places[name].tensor if name in places else name) for name in decoder.expected_shapes()}
    differing = {name for name, _ in model.named_parameters()} ^ expected
    if differing:
        raise CheckFailed(
            f"parity: transformers' {decoder.model_type} and the exported graph differ in {shortened(sorted(differing))}",
            hint="export with another transformers version, or with --no-verify",
        )
    return model


def _parameters(model: Any, decoder: Decoder, live: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """The reference's own tensors by their names in the checkpoint: what is written into them, the model computes with."""
    parameters: dict[str, torch.Tensor] = dict(model.named_parameters())
    places = decoder.stacked_places()

    def own(name: str) -> torch.Tensor:
        place = places.get(name)
        if place is None:
            return parameters[live(name)]
        whole = parameters[live(place.tensor)]
        return (whole if place.expert is None else whole[place.expert])[place.start : place.stop]

    return {name: own(name) for name in decoder.expected_shapes()}


def _rows(source: Source, name: str, like: torch.Tensor) -> torch.Tensor:
    """The tensor, or as many of its first rows as ``like`` has."""
    whole = source.specs[name].shape == tuple(like.shape)
    return source.read(name, None if whole else (0, like.shape[0])).to(torch.float32)


def _carry(model: Any, parameters: Mapping[str, torch.Tensor], decoder: Decoder, layout: Layout, stored: _Stored | None) -> None:
    """Replace the model's weights by what the graph carries. A tied table is untied: it may be looked up more exactly than it is multiplied."""
    if decoder.tied:
        head = torch.nn.Parameter(parameters[f"{decoder.module('embedding')}.weight"].clone(), requires_grad=False)
        model.get_submodule(decoder.module("head")).weight = head
        head.copy_(_carried(layout.head, layout.head.pieces[0], 0, head, stored, looked_up=False))
    for matrix in layout.matrices():
        for piece, row in matrix.placed():
            weight = parameters[f"{piece.module}.weight"]
            rows_OI = (weight.T if piece.transposed else weight)[piece.first : piece.first + piece.rows]
            rows_OI.copy_(_carried(matrix, piece, row, rows_OI, stored, looked_up=matrix in (layout.embedding, layout.positions)))


def _carried(matrix: Matrix, piece: Piece, row: int, rows_OI: torch.Tensor, stored: _Stored | None, *, looked_up: bool) -> torch.Tensor:
    if stored is not None:
        return stored.decode(matrix, row, piece.rows, looked_up=looked_up)
    return matrix.format.decode("w", matrix.format.encode("w", rows_OI.detach().contiguous()), matrix.columns, looked_up=looked_up)


@torch.inference_mode()
def _logits(model: Any, ids_BT: NDArray[np.int64]) -> NDArray[Any]:
    logits: NDArray[Any] = model(input_ids=torch.from_numpy(ids_BT), use_cache=False).logits.numpy()
    return np.concatenate([logits[:, :PROMPT], logits[:, PROMPT - 1 :]], axis=1)


def _hold(phase: str, found: NDArray[Any], reference: NDArray[Any], bound: float, against: str, export: DecoderExport, decoder: Decoder) -> None:
    rounded = decoder.experts is not None and export.scheme.carried != "fp32"
    error = _typical_error(found, reference) if rounded else relative_error(found, reference)
    bound = min(_MIXTURE_SLACK * bound, 0.9) if rounded else bound
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
