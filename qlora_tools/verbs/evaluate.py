"""``qlt eval``: perplexity of checkpoints, adapters on a base, and exports, and their divergence from a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tools.bench.engine import locate
from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.cores import allowed_cores
from qlora_tools.errors import IncompatibleError, MissingError, UsageError
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.manifest import read_manifest
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.corpus import Corpus, Method, Window, python_reference, read_corpus, tokenize
from qlora_tools.quality.divergence import divergence
from qlora_tools.quality.intervals import perplexity_interval
from qlora_tools.quality.perplexity import perplexity
from qlora_tools.quality.probe import logits_of, quality_record

#: Named, not imported: each brings its runtime with it, and the worker processes of a benchmark import what they need.
TORCH_ENGINE = "qlora_tools.bench.hf_engine:load"
ONNX_ENGINE = "qlora_tools.export.runtime:open_engine"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")


@dataclass(frozen=True)
class Judged:
    """One model on the text. ``figures`` holds KL and agreement where there is a reference; see ``quality/probe.py``."""

    name: str
    perplexity: float
    ci95: tuple[float, float] | None
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class EvalResult:
    """All models on one text, with the method without which a perplexity is no number."""

    corpus: str
    corpus_sha256: str
    method: str
    n_tokens: int
    reference: str | None
    models: tuple[Judged, ...]


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
    against: str | Path | None = None,
    text: Path | None = None,
    tokens: int = 16_384,
    context: int = 256,
    device: str = "auto",
    progress: Progress = SILENT,
) -> EvalResult:
    """Judge every model (a checkpoint or export folder, or a hub id) on one text; ``against`` is the reference of KL and agreement.

    ``adapters``: PEFT folders, or names of the adapters that an export keeps; each is judged on the first model as one more candidate.

    Raises:
        IncompatibleError: tokenizers differ, so that no number could be compared; or an adapter is for another base.
    """
    candidates = candidates_of(models, adapters, progress)
    folders = [candidate.folder for candidate in candidates]
    reference_folder = resolve_model(str(against)) if against else None
    reading = read_text(folders[0], text, tokens=tokens, context=context)
    _same_tokenizer([*folders, *([reference_folder] if reference_folder else [])])
    reference = open_engine(reference_folder, device) if reference_folder else None
    judged = []
    for candidate in candidates:
        name, folder = candidate.name, candidate.folder
        engine = open_engine(folder, device, candidate.adapter)
        try:
            if reference is None:
                found = perplexity(logits_of(engine), reading.windows, progress=progress, title=f"eval {folder.name}")
                judged.append(Judged(name, found.value, perplexity_interval(found.nll, found.tokens).bounds, {}))
            else:
                result = divergence(logits_of(reference), logits_of(engine), reading.windows, progress=progress)
                figures = quality_record(result, corpus={"name": reading.corpus.name, "sha256": reading.corpus.sha256}, method=reading.method.record())
                judged.append(Judged(name, figures["ppl_candidate"], tuple(figures["ci95"]["ppl_candidate"] or ()) or None, figures))  # type: ignore[arg-type]
        finally:
            engine.close()
    scored = sum(window.n_scored for window in reading.windows)
    return EvalResult(reading.corpus.name, reading.corpus.sha256, reading.method.name, scored, str(against) if against else None, tuple(judged))


def candidates_of(models: Sequence[str | Path], adapters: Sequence[str | Path], progress: Progress = SILENT) -> list[Candidate]:
    """The models as given, then the first of them under each adapter, checked from headers alone before anything is loaded.

    Raises:
        UsageError: no models, or the first is an export that keeps no adapters. And what reading an adapter for a base raises.
    """
    if not models:
        raise UsageError("no models to judge")
    candidates = [Candidate(str(model), resolve_model(str(model))) for model in models]
    base = candidates[0]
    if adapters and list(base.folder.glob("*.onnx")):
        return [*candidates, *_kept(base, adapters)]
    for adapter in adapters:
        from qlora_tools.verbs.merging import open_merged
        from qlora_tools.verbs.quantize import codec_for

        merged = open_merged(base.folder, [(adapter, 1.0)], None, codec_for("nf4"), progress)
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


def open_engine(folder: Path, device: str = "auto", adapter: Path | None = None) -> Any:
    """The runtime for a folder: ONNX Runtime for an export, transformers (fp32 unless quantized) for a checkpoint, with ``adapter`` on it."""
    threads = allowed_cores()
    path, options = engine_of(folder, device)
    if adapter is not None:
        options["adapter"] = str(adapter)
    return locate(path)(threads=threads, **options)


def engine_of(folder: Path, device: str = "auto") -> tuple[str, dict[str, Any]]:
    """Import path and options of the engine that runs ``folder``.

    Raises:
        MissingError: neither an export nor a checkpoint.
    """
    if list(folder.glob("*.onnx")):
        manifest = read_manifest(folder)
        return ONNX_ENGINE, {"folder": str(folder), "device": manifest.command.get("device", "cpu") if manifest else "cpu"}
    if not (folder / "config.json").exists():
        raise MissingError(f"{folder} is neither a checkpoint nor an export", hint="run `qlt inspect` on it")
    quantized = "quantization_config" in read_json(folder / "config.json")
    return TORCH_ENGINE, {"path": str(folder), "dtype": "stored" if quantized else "fp32", "device": "cpu" if device == "auto" else device}


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
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def _same_tokenizer(folders: Sequence[Path]) -> None:
    found = {(folder / "tokenizer.json").read_bytes() for folder in folders if (folder / "tokenizer.json").exists()}
    if len(found) > 1:
        raise IncompatibleError("the models have different tokenizers: their numbers cannot be compared", hint="evaluate them one by one")
