"""``qlt eval``: perplexity of checkpoints, adapters on a base, and exports, and their divergence from references.

Models that do not write are judged by ``evaluate_outputs.py``; which engine runs a folder, and what it does, is told here for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.bench.engine import locate
from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.cores import allowed_cores
from qlora_tools.errors import IncompatibleError, MissingError, UsageError
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.manifest import read_manifest
from qlora_tools.models.feeds import positions
from qlora_tools.models.work import FORWARD, work_of
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.corpus import Corpus, Method, Window, python_reference, read_corpus, tokenize
from qlora_tools.quality.divergence import divergence
from qlora_tools.quality.intervals import perplexity_interval
from qlora_tools.quality.perplexity import perplexity
from qlora_tools.quality.probe import logits_of, quality_record
from qlora_tools.verbs.opening import is_export

if TYPE_CHECKING:
    from qlora_tools.verbs.evaluate_outputs import OutputsResult

#: Named, not imported: each brings its runtime with it, and the worker processes of a benchmark import what they need.
TORCH_ENGINE = "qlora_tools.bench.hf_engine:load"
ONNX_ENGINE = "qlora_tools.export.runtime:open_engine"
TORCH_FORWARD = "qlora_tools.bench.hf_forward:load"
ONNX_FORWARD = "qlora_tools.export.runtime.forward:open_forward"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
#: Stands between a base and the adapter on it, where both are named as one model.
_WITH = " + "


@dataclass(frozen=True)
class Judged:
    """One model on the text. ``figures`` holds KL and agreement where there is a reference (see ``quality/probe.py``), ``further`` the same for each
    reference after the first, by its name."""

    name: str
    perplexity: float
    ci95: tuple[float, float] | None
    figures: Mapping[str, Any]
    further: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """All models on one text, with the method without which a perplexity is no number. ``references``: all of them; ``reference`` is the first."""

    corpus: str
    corpus_sha256: str
    method: str
    n_tokens: int
    reference: str | None
    models: tuple[Judged, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A model to judge: a checkpoint or export folder, with an adapter on it or none (PEFT's on a checkpoint, its own on an export)."""

    name: str
    folder: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Reading:
    """A text cut for a model: what quality is judged on."""

    corpus: Corpus
    method: Method
    windows: Sequence[Window]


def evaluate(
    *,
    models: Sequence[str | Path],
    adapters: Sequence[str | Path] = (),
    against: str | Path | Sequence[str | Path] | None = None,
    text: Path | None = None,
    labels: Path | None = None,
    tokens: int = 16_384,
    context: int = 256,
    device: str = "auto",
    progress: Progress = SILENT,
) -> EvalResult | OutputsResult:
    """Judge every model (a checkpoint or export folder, or a hub id): those that write on one text, those that look once on inputs of their kind.

    ``adapters``: PEFT folders, or names of the adapters that an export keeps; each is judged on the first model as one more candidate. ``against``: the
    reference of KL and agreement, or several, of which each gets its own figures; ``base + adapter`` is a base with an adapter left unmerged on it.
    ``labels``: right answers for a classifier, ``{text, label}`` lines or images in folders of their classes.

    Raises:
        IncompatibleError: tokenizers differ, so that no number could be compared; models that write beside models that look; or an adapter is for another
        base. UsageError: labels for a model that writes.
    """
    candidates = candidates_of(models, adapters, progress)
    references = references_of(against, progress)
    works = {_work_of(one.folder) for one in (*candidates, *references)}
    if len(works) > 1:
        raise IncompatibleError("some of the models write text and some do not: they cannot be judged together", hint="evaluate them one by one")
    if works == {FORWARD}:
        from qlora_tools.verbs.evaluate_outputs import evaluate_outputs

        return evaluate_outputs(candidates, references, text=text, labels=labels, tokens=tokens, context=context, device=device, progress=progress)
    if labels is not None:
        raise UsageError("labels are right answers for a classifier, and this model writes text", hint="leave out --labels, or judge by --task python-syntax")
    reading = read_text(candidates[0].folder, text, tokens=tokens, context=context)
    _same_tokenizer([one.folder for one in (*candidates, *references)])
    judged = [_judged(candidate, references, reading, device, progress) for candidate in candidates]
    scored, names = sum(window.n_scored for window in reading.windows), tuple(one.name for one in references)
    return EvalResult(reading.corpus.name, reading.corpus.sha256, reading.method.name, scored, names[0] if names else None, tuple(judged), names)


def _judged(candidate: Candidate, references: Sequence[Candidate], reading: Reading, device: str, progress: Progress) -> Judged:
    """One model, alone or beside each reference; never more than two of them are loaded."""
    with closing(open_engine(candidate.folder, device, candidate.adapter)) as engine:
        if not references:
            found = perplexity(logits_of(engine), reading.windows, progress=progress, title=f"eval {candidate.folder.name}")
            return Judged(candidate.name, found.value, perplexity_interval(found.nll, found.tokens).bounds, {})
        corpus = {"name": reading.corpus.name, "sha256": reading.corpus.sha256}
        against: dict[str, dict[str, Any]] = {}
        for one in references:
            with closing(open_engine(one.folder, device, one.adapter)) as reference:
                result = divergence(logits_of(reference), logits_of(engine), reading.windows, progress=progress)
            against[one.name] = quality_record(result, corpus=corpus, method=reading.method.record())
    figures = against.pop(references[0].name)
    bounds = figures["ci95"]["ppl_candidate"]
    return Judged(candidate.name, figures["ppl_candidate"], (bounds[0], bounds[1]) if bounds else None, figures, against)


def references_of(against: str | Path | Sequence[str | Path] | None, progress: Progress = SILENT) -> list[Candidate]:
    """What is judged against, each once, in order.

    Raises:
        What opening a model, or reading an adapter for it, raises.
    """
    found: dict[str, Candidate] = {}
    for name in [against] if isinstance(against, (str, Path)) else against or ():
        model, plus, adapter = str(name).partition(_WITH)
        found.setdefault(str(name), candidates_of([model.strip()], [adapter.strip()] if plus else [], progress)[-1])
    return list(found.values())


def candidates_of(models: Sequence[str | Path], adapters: Sequence[str | Path], progress: Progress = SILENT) -> list[Candidate]:
    """The models as given, then the first of them under each adapter, checked from headers alone before anything is loaded.

    Raises:
        UsageError: no models, or the first is an export that keeps no adapters. And what reading an adapter for a base raises.
    """
    if not models:
        raise UsageError("no models to judge")
    candidates = [Candidate(str(model), resolve_model(str(model))) for model in models]
    base = candidates[0]
    if adapters and is_export(base.folder):
        return [*candidates, *_kept(base, adapters)]
    for adapter in adapters:
        from qlora_tools.verbs.merging import open_merged
        from qlora_tools.verbs.quantize import codec_for

        merged = open_merged(base.folder, [(adapter, 1.0)], None, codec_for("nf4"), progress, new_head=True)
        merged.check_asked(adapter=adapter)
        candidates.append(Candidate(f"{base.name} + {adapter}", base.folder, merged.adapter_folders[0]))
    return candidates


def _kept(export: Candidate, adapters: Sequence[str | Path]) -> list[Candidate]:
    """An export under each of its own adapters."""
    from qlora_tools.export.runtime.adapters import adapters_beside, find_adapter

    if not adapters_beside(export.folder):
        raise UsageError(
            f"{export.name} is an export that keeps no adapters: none can be put on it",
            hint="give a checkpoint first, or export with `qlt export --adapters` or `qlt export --merge`",
        )
    return [Candidate(f"{export.name} + {adapter}", export.folder, find_adapter(export.folder, adapter)) for adapter in adapters]


def open_engine(folder: Path, device: str = "auto", adapter: Path | None = None, task: str | None = None) -> Any:
    """The runtime for a folder: ONNX Runtime for an export, transformers (fp32 unless quantized) for a checkpoint, with ``adapter`` on it.

    ``task``: what a checkpoint that looks once is loaded for, where that is not what its config says.
    """
    path, options = engine_of(folder, device)
    if adapter is not None:
        options["adapter"] = str(adapter)
    if task is not None and path == TORCH_FORWARD:
        options["task"] = task
    return locate(path)(threads=_threads(path), **options)


def _threads(engine: str) -> int:
    """For an engine in this very process: torch keeps those it has, because they are one number for everybody in it."""
    if engine not in (TORCH_ENGINE, TORCH_FORWARD):
        return allowed_cores()
    import torch

    return torch.get_num_threads()


def engine_of(folder: Path, device: str = "auto") -> tuple[str, dict[str, Any]]:
    """Import path and options of the engine that runs ``folder``: one that writes token after token, or one that looks once.

    Raises:
        MissingError: neither an export nor a checkpoint.
    """
    looks = _work_of(folder) == FORWARD
    if is_export(folder):
        manifest = read_manifest(folder)
        made_for = manifest.command.get("device", "cpu") if manifest else _described_device(folder)
        return ONNX_FORWARD if looks else ONNX_ENGINE, {"folder": str(folder), "device": made_for}
    if not (folder / "config.json").exists():
        raise MissingError(f"{folder} is neither a checkpoint nor an export", hint="run `qlt inspect` on it")
    quantized = "quantization_config" in read_json(folder / "config.json")
    options = {"path": str(folder), "dtype": "stored" if quantized else "fp32", "device": "cpu" if device == "auto" else device}
    return TORCH_FORWARD if looks else TORCH_ENGINE, options


def _described_device(folder: Path) -> str:
    """What a graph of another tool says that it was made for."""
    from qlora_tools.export.runtime.description import describe  # brings the runtime with it

    return describe(folder).device


def task_of(folder: Path) -> str | None:
    """What a traced export says that it computes; ``None`` for a drawn one and for a checkpoint."""
    manifest = read_manifest(folder)
    found = manifest.command.get("task") if manifest is not None and manifest.kind == "export" else None
    return None if found is None else str(found)


def _work_of(folder: Path) -> str:
    return work_of(_config_of(folder), task_of(folder))


def _config_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").exists() else {}


def read_text(folder: Path, text: Path | None, *, tokens: int, context: int) -> Reading:
    """``text`` (default: the held-out part of Python's language reference) through the tokenizer in ``folder``.

    Windows are no longer than the model's own context.

    Raises:
        MissingError: no tokenizer there.
    """
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise MissingError(f"{folder} holds no tokenizer, so no text can be read", hint="copy the model's tokenizer files into it")
    tokenizer = open_tokenizer(folder)
    corpus = read_corpus(text) if text else python_reference()
    method = Method(context=min(context, positions_of(folder) or context), max_tokens=tokens)
    windows = tokenize(corpus, lambda content: tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], method)
    return Reading(corpus, method, windows)


def positions_of(folder: Path) -> int | None:
    """How many positions a model has, from its config.json; ``None`` where that does not say."""
    return positions(_config_of(folder))


def _same_tokenizer(folders: Sequence[Path]) -> None:
    found = {(folder / "tokenizer.json").read_bytes() for folder in folders if (folder / "tokenizer.json").exists()}
    if len(found) > 1:
        raise IncompatibleError("the models have different tokenizers: their numbers cannot be compared", hint="evaluate them one by one")
