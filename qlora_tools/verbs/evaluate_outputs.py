"""The part of ``qlt eval`` for models that look once: how near their outputs are to a reference's, and how often a classifier is right.

What they are judged on follows from what they read: a labelled file or folder, the windows of a text, images and everything else drawn from seeds. Of a
model that fills in masked words some words are masked, the same for all, and these alone count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.live.images import PROCESSOR_FILE, read_preparation
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.models.feeds import positions
from qlora_tools.models.work import is_of_diffusers
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.outputs import DRAWN, measure, probe_options
from qlora_tools.quality.ranking import comparisons
from qlora_tools.verbs.candidates import Candidate
from qlora_tools.verbs.engines import open_engine, task_of
from qlora_tools.verbs.reading import TOKENIZER_FILES, read_text

_MASKED_SHARE = 0.15
_LONGEST = 512


@dataclass(frozen=True)
class JudgedOutputs:
    """One model on the inputs. ``figures``: see ``quality/outputs.py``; against the first reference where there is one. ``further``: against each other
    reference, by its name. ``verdict``: ``better``, ``worse`` or ``tie`` by accuracy against the first reference, ``None`` where that cannot be told."""

    name: str
    figures: Mapping[str, Any]
    further: Mapping[str, Mapping[str, Any]]
    verdict: str | None


@dataclass(frozen=True)
class OutputsResult:
    """All models on the same inputs. ``corpus_sha256``: ``None`` where inputs were drawn. ``comparisons``: of each pair of them, better first, by accuracy where
    answers are known, else by distance."""

    corpus: str
    corpus_sha256: str | None
    method: str
    n_inputs: int
    reference: str | None
    references: tuple[str, ...]
    models: tuple[JudgedOutputs, ...]
    comparisons: tuple[Mapping[str, Any], ...]


def evaluate_outputs(
    candidates: Sequence[Candidate],
    references: Sequence[Candidate],
    *,
    text: Path | None = None,
    labels: Path | None = None,
    tokens: int = 16_384,
    context: int = 256,
    device: str = "auto",
    progress: Progress = SILENT,
) -> OutputsResult:
    """Judge models that look once; see ``evaluate``.

    Raises:
        UsageError: neither references nor right answers; labels of another kind than the model reads. IncompatibleError: labels that a model's classes do
        not have, or models whose outputs cannot be compared.
    """
    options = inputs_for(candidates[0].folder, text=text, labels=labels, tokens=tokens, context=context)
    _check_answers([*candidates, *references], options, labels)
    task = next((found for one in (*candidates, *references) if (found := task_of(one.folder)) is not None), None)
    judged = [_judged(candidate, references, options, device, task, progress) for candidate in candidates]
    records = {one.name: one.figures for one in judged}
    metric = "accuracy" if all("accuracy" in record for record in records.values()) else "kl" if references else None
    pairs = comparisons(records, metric) if metric and len(records) > 1 else []
    names = tuple(one.name for one in references)
    corpus, first = options["corpus"], names[0] if names else None
    return OutputsResult(corpus["name"], corpus.get("sha256"), options["method"]["name"], len(options["inputs"]), first, names, tuple(judged), tuple(pairs))


def inputs_for(folder: Path, *, text: Path | None = None, labels: Path | None = None, tokens: int = 16_384, context: int = 256) -> dict[str, Any]:
    """The options of ``quality.outputs:measure`` for the model in ``folder``, plain JSON: a benchmark hands them to its probe as they are.

    ``tokens`` and ``context`` are of texts without labels; images without labels, and what has no reader here, are drawn.

    Raises:
        UsageError: labels of another kind than the model reads. MissingError: files that are not there. IncompatibleError: labels that the model's classes
        do not have.
    """
    config, task = read_json(folder / "config.json"), task_of(folder)
    main = _main_input(folder, config, task)
    if labels is not None:
        return _labelled(folder, config, main, labels)
    if main == "input_ids" and any((folder / name).exists() for name in TOKENIZER_FILES):
        return _windows(folder, config, task, text, tokens, context)
    if text is not None:
        raise UsageError(f"a text was given, but {folder} reads `{main}`" if main != "input_ids" else f"{folder} holds no tokenizer", hint="leave out --text")
    return drawn_inputs(folder, context)


def drawn_inputs(folder: Path, context: int = 256, count: int = DRAWN) -> dict[str, Any]:
    """Inputs from seeds, for models that read something of which there is none at hand."""
    config = read_json(folder / "config.json")
    length = min(context, positions(config) or context)
    return probe_options(
        [{"seed": seed} for seed in range(count)],
        corpus={"name": f"{count} drawn inputs"},
        method={"name": "drawn from seeds"},
        length=length,
    )


def _main_input(folder: Path, config: Mapping[str, Any], task: str | None) -> str:
    """The input that a model cannot do without."""
    if is_of_diffusers(config):
        return "sample"
    from qlora_tools.bench.hf_forward import class_of

    return str(class_of(folder, config, task).main_input_name)


def _labelled(folder: Path, config: Mapping[str, Any], main: str, labels: Path) -> dict[str, Any]:
    from qlora_tools.training.images import ImageRecords, ImageRows
    from qlora_tools.training.rows import class_numbers
    from qlora_tools.verbs.training_data import open_examples

    records, classes = open_examples(labels), _classes(config)
    is_image = isinstance(records, ImageRecords)
    if not is_image and records.kind != "labelled":
        raise UsageError(f"{labels} holds {records.kind} records without labels", hint="give {text, label} lines, or images in folders of their classes")
    if main != ("pixel_values" if is_image else "input_ids"):
        raise UsageError(f"{labels} holds {'images' if is_image else 'texts'}, but {folder} reads `{main}`", hint="give labelled examples of its own kind")
    if is_image:
        rows = ImageRows(records, read_preparation(folder), id2label=classes)
        pictures = [{"image": str(records.folder / path), "targets": [int(number)]} for path, number in zip(records.paths, rows.classes, strict=True)]
        corpus = {"name": labels.name, "sha256": rows.sha256}
        return probe_options(pictures, corpus=corpus, method={"name": f"labelled images, prepared by {PROCESSOR_FILE}"}, processor=folder)
    tokenizer = open_tokenizer(folder)
    room = min(positions(config) or _LONGEST, _LONGEST)
    encoded = [tokenizer(row["text"], truncation=True, max_length=room)["input_ids"] for row in records.rows]
    if empty := [index for index, ids in enumerate(encoded) if not ids]:
        raise UsageError(f"{records.where(empty[0])}: the tokenizer makes nothing of this text", hint="leave it out")
    _, numbers = class_numbers([row["label"] for row in records.rows], classes)
    texts = [{"ids": list(ids), "targets": [int(number)]} for ids, number in zip(encoded, numbers, strict=True)]
    method = {"name": f"labelled texts, cut at {room} tokens", "n_tokens": sum(map(len, encoded))}
    return probe_options(texts, corpus={"name": labels.name, "sha256": records.sha256}, method=method)


def _classes(config: Mapping[str, Any]) -> dict[int, str]:
    """The classes that a config names; transformers' two where it names none."""
    found = config.get("id2label")
    try:
        return {int(number): str(name) for number, name in found.items()} if isinstance(found, dict) else {0: "LABEL_0", 1: "LABEL_1"}
    except ValueError as error:
        raise IncompatibleError("config.json: id2label has keys that are not numbers", hint="repair config.json") from error


def _windows(folder: Path, config: Mapping[str, Any], task: str | None, text: Path | None, tokens: int, context: int) -> dict[str, Any]:
    """Windows of a text between the special tokens that the tokenizer puts around every text."""
    tokenizer = open_tokenizer(folder)
    before, after = _around(tokenizer)
    room = min(context, positions(config) or context) - len(before) - len(after)
    reading = read_text(folder, text, tokens=tokens, context=max(room, 2))
    masks = task == "fill-mask" or (task is None and str((config.get("architectures") or [""])[0]).endswith("ForMaskedLM"))
    mask = getattr(tokenizer, "mask_token_id", None) if masks else None
    inputs: list[dict[str, Any]] = []
    for number, window in enumerate(reading.windows):
        ids = [*before, *window.ids.tolist(), *after]
        inputs.append({"ids": ids} if mask is None else _masked(ids, range(len(before), len(ids) - len(after)), int(mask), number))
    around = " between special tokens" if before or after else ""
    hidden = "" if mask is None else f", {_MASKED_SHARE:.0%} of them masked and judged"
    method = {"name": f"windows of {len(reading.windows[0].ids)} tokens{around}{hidden}", "n_tokens": sum(len(window.ids) for window in reading.windows)}
    return probe_options(inputs, corpus={"name": reading.corpus.name, "sha256": reading.corpus.sha256}, method=method)


def _masked(ids: list[int], places: range, mask: int, seed: int) -> dict[str, Any]:
    chosen = sorted(np.random.Generator(np.random.PCG64(seed)).choice(places, max(1, round(_MASKED_SHARE * len(places))), replace=False).tolist())
    hidden = set(chosen)
    return {"ids": [mask if place in hidden else token for place, token in enumerate(ids)], "scored": chosen, "targets": [ids[place] for place in chosen]}


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens before and after a text."""
    whole, plain = (list(tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]) for special in (True, False))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _check_answers(models: Sequence[Candidate], options: Mapping[str, Any], labels: Path | None) -> None:
    """All must mean the same by a class number."""
    if labels is None:
        return
    named = {one.name: _classes(read_json(one.folder / "config.json")) for one in models if (one.folder / "config.json").exists()}
    first, classes = next(iter(named.items()))
    for name, other in named.items():
        if other != classes:
            raise IncompatibleError(f"{name} and {first} have different classes, so one set of labels cannot judge both", hint="evaluate them one by one")
    if max(max(one["targets"]) for one in options["inputs"]) >= len(classes):
        raise IncompatibleError(f"{labels} has more classes than the {len(classes)} of {first}", hint="check id2label in config.json")


def _judged(
    candidate: Candidate, references: Sequence[Candidate], options: Mapping[str, Any], device: str, task: str | None, progress: Progress
) -> JudgedOutputs:
    """One model, alone or beside each reference; never more than two of them are loaded."""
    title = f"eval {candidate.folder.name}"
    with closing(open_engine(candidate.folder, device, candidate.adapter, task)) as engine:
        if not references:
            return JudgedOutputs(candidate.name, measure(engine, None, options, progress=progress, title=title), {}, None)
        against: dict[str, dict[str, Any]] = {}
        for one in references:
            with closing(open_engine(one.folder, device, one.adapter, task)) as reference:
                against[one.name] = measure(engine, reference, options, progress=progress, title=title)
    figures = against.pop(references[0].name)
    return JudgedOutputs(candidate.name, figures, against, _verdict(figures))


def _verdict(figures: Mapping[str, Any]) -> str | None:
    bounds = figures["ci95"].get("accuracy_difference")
    if bounds is None:
        return None
    return "tie" if bounds[0] <= 0 <= bounds[1] else "better" if bounds[0] > 0 else "worse"
