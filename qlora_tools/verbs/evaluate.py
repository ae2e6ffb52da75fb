"""``qlt eval``: perplexity of checkpoints, adapters on a base, and exports, and their divergence from references.

Models that do not write are judged by ``evaluate_outputs.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.models.work import FORWARD
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.divergence import divergence
from qlora_tools.quality.intervals import perplexity_interval
from qlora_tools.quality.perplexity import perplexity
from qlora_tools.quality.probe import logits_of, quality_record
from qlora_tools.verbs.candidates import Candidate, candidates_of, references_of
from qlora_tools.verbs.engines import kind_of_work, open_engine
from qlora_tools.verbs.reading import Reading, read_text

if TYPE_CHECKING:
    from qlora_tools.verbs.evaluate_outputs import OutputsResult


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
    works = {kind_of_work(one.folder) for one in (*candidates, *references)}
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


def _same_tokenizer(folders: Sequence[Path]) -> None:
    found = {(folder / "tokenizer.json").read_bytes() for folder in folders if (folder / "tokenizer.json").exists()}
    if len(found) > 1:
        raise IncompatibleError("the models have different tokenizers: their numbers cannot be compared", hint="evaluate them one by one")
