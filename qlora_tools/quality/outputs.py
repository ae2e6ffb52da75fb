"""A model that looks once judged against a reference: a job that a fresh process can run by name, as ``probe.py`` is for models that write.

Both engines (see ``bench/forward.py``) are fed the same inputs one by one: token ids, image files, or inputs drawn from a seed. Per input: the cosine and the
relative error of what the model gives, and where that is scores of classes (outputs called ``...logits``) the divergence and the agreement of the classes,
summed over whatever has a class: an image, a token, or the masked tokens alone. With known answers, also how often each is right, which is the task's own
score. Intervals are bootstraps over inputs, the same draws for all settings, so that two of them are compared in pairs.

A high cosine says that the plumbing holds; only classes and scores say what is lost.

Axes: N rows that have a class, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import IncompatibleError, NonFiniteError, UsageError
from qlora_tools.live.images import open_image, read_preparation
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.divergence import score_tokens
from qlora_tools.quality.intervals import Comparison, Interval, mean_interval, ratio_interval, verdict_of

PROBE = "qlora_tools.quality.outputs:measure"
#: How many inputs are drawn where none are given.
DRAWN = 16
Outputs = Mapping[str, NDArray[Any]]


class Looker(Protocol):
    """See ``bench/forward.py``."""

    def feed(self, case: Mapping[str, Any], seed: int, given: Mapping[str, NDArray[Any]] | None = None) -> Any: ...

    def forward(self, feed: Any) -> Any: ...

    def read(self, outputs: Any) -> Outputs: ...


@dataclass(frozen=True)
class InputSums:
    """One column per figure, one entry per input. ``rows``: how many had a class; ``targets``: for how many the answer is known.

    Without a reference only ``right`` means anything; without classes ``rows`` are 0, without answers ``targets`` are.
    """

    cosine: tuple[float, ...]
    error: tuple[float, ...]
    rows: tuple[int, ...]
    kl: tuple[float, ...]
    agrees: tuple[int, ...]
    targets: tuple[int, ...]
    right: tuple[int, ...]
    reference_right: tuple[int, ...]


def probe_options(
    inputs: Sequence[Mapping[str, Any]], *, corpus: Mapping[str, Any], method: Mapping[str, Any], processor: Path | None = None, length: int = 128
) -> dict[str, Any]:
    """The JSON options of :func:`measure`.

    An input is ``{"ids": [...]}`` (special tokens included), ``{"image": path}`` or ``{"seed": n}``; ``scored`` names the positions that count, and
    ``targets`` the right class of each of them, or of the input as a whole. ``processor``: the folder whose preprocessor_config.json says how images become
    numbers. ``length``: of drawn texts.
    """
    return {
        "inputs": [dict(one) for one in inputs],
        "corpus": dict(corpus),
        "method": dict(method),
        "processor": None if processor is None else str(processor),
        "length": length,
    }


def measure(engine: Looker, reference: Looker | None, options: Mapping[str, Any], *, progress: Progress = SILENT, title: str = "outputs") -> dict[str, Any]:
    """Judge ``engine``; without a ``reference`` only how often it is right.

    Raises:
        UsageError: no inputs, or nothing to judge them by. IncompatibleError: the two give nothing that could be compared. NonFiniteError: NaN or infinity.
    """
    inputs = options["inputs"]
    if not inputs or (reference is None and not all("targets" in one for one in inputs)):
        raise UsageError("no inputs to judge on" if not inputs else "without a reference, inputs need right answers", hint="give --against or --labels")
    rows: list[tuple[float, ...]] = []
    names: tuple[str, ...] = ()
    with progress.task(title, len(inputs), "inputs") as task:
        for one, given in zip(inputs, _given(inputs, options), strict=True):
            found = _run(engine, one, given, options)
            expected = found if reference is None else _run(reference, one, given, options)
            names = compared(found, expected)
            rows.append(_score(found, expected, names, one))
            task.advance()
    columns = zip(*rows, strict=True)
    return outputs_record(InputSums(*(tuple(column) for column in columns)), names, options, with_reference=reference is not None)  # type: ignore[arg-type]


def compared(found: Outputs, expected: Outputs) -> tuple[str, ...]:
    """Names of the outputs that count: all scores of classes where there are any, else the first that both have.

    Raises:
        IncompatibleError: none is common to both, or shapes differ.
    """
    shared = [name for name in found if name in expected]
    if not shared:
        hint = "compare graphs of one task; qlt export --task chooses it"
        raise IncompatibleError(f"the candidate gives {', '.join(found)}, the reference {', '.join(expected)}: nothing to compare", hint=hint)
    names = tuple(name for name in shared if _is_classes(name, found[name])) or (shared[0],)
    for name in names:
        if found[name].shape != expected[name].shape:
            shapes = f"{list(found[name].shape)} from the candidate, {list(expected[name].shape)} from the reference"
            raise IncompatibleError(f"`{name}` is {shapes}", hint="compare models with the same classes and the same width")
    return names


def _is_classes(name: str, output: NDArray[Any]) -> bool:
    return name.endswith("logits") and output.ndim in (2, 3, 4) and output.shape[_class_axis(output)] > 1


def _class_axis(output: NDArray[Any]) -> int:
    """Maps of scores have their classes before rows and columns."""
    return 1 if output.ndim == 4 else output.ndim - 1


def _run(engine: Looker, one: Mapping[str, Any], given: Mapping[str, NDArray[Any]], options: Mapping[str, Any]) -> Outputs:
    case = {"batch": 1, "prompt_tokens": options["length"], "new_tokens": 1}
    return engine.read(engine.forward(engine.feed(case, int(one.get("seed", 0)), given)))


def _given(inputs: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Iterable[dict[str, NDArray[Any]]]:
    preparation = read_preparation(Path(options["processor"])) if any("image" in one for one in inputs) else None
    for one in inputs:
        if "ids" in one:
            yield {"input_ids": np.asarray([one["ids"]], np.int64)}
        elif "image" in one and preparation is not None:
            yield {"pixel_values": preparation.pixels(open_image(Path(one["image"])))[None]}
        else:
            yield {}


def _score(found: Outputs, expected: Outputs, names: tuple[str, ...], one: Mapping[str, Any]) -> tuple[float, ...]:
    """The entries of :class:`InputSums` for one input."""
    x, y = (np.concatenate([outputs[name].astype(np.float64).ravel() for name in names]) for outputs in (found, expected))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        who = "the candidate" if np.isfinite(y).all() else "the reference"
        raise NonFiniteError(f"{who} gave NaN or infinity in {', '.join(names)}", hint="a 16-bit graph may overflow: export it wider")
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    same = bool((x == y).all())
    cosine = 1.0 if same else float(np.clip(x @ y / max(norms[0] * norms[1], 1e-300), -1, 1))
    error = 0.0 if same else float(np.linalg.norm(x - y)) / max(norms[1], 1e-300)
    targets = np.asarray(one.get("targets", ()), np.int64).reshape(-1)
    rows = kl = agrees = right = reference_right = 0.0
    for name in names:
        if not _is_classes(name, found[name]):
            continue
        mine, other = (_rows(outputs[name], one.get("scored")) for outputs in (found, expected))
        scores = score_tokens(other, mine, np.zeros(len(mine), np.int64), f"`{name}`")
        rows, kl, agrees = rows + len(mine), kl + float(scores.kl.sum()), agrees + float(scores.agrees.sum())
        if len(targets) == len(mine):
            right, reference_right = right + float((mine.argmax(1) == targets).sum()), reference_right + float((other.argmax(1) == targets).sum())
    if len(targets) and len(targets) != rows:
        raise IncompatibleError(f"{len(targets)} right answers were given where the model chooses {int(rows)} classes", hint="labels are for classifiers")
    return cosine, error, int(rows), kl, int(agrees), len(targets), int(right), int(reference_right)


def _rows(output: NDArray[Any], scored: Sequence[int] | None) -> NDArray[Any]:
    rows_NC = np.moveaxis(output, _class_axis(output), -1).reshape(-1, output.shape[_class_axis(output)])
    return rows_NC if scored is None else rows_NC[list(scored)]


def outputs_record(sums: InputSums, names: tuple[str, ...], options: Mapping[str, Any], *, with_reference: bool = True) -> dict[str, Any]:
    """Figures with their intervals and their method, in plain JSON types: what ``bench.json`` stores per setting."""
    count = len(sums.cosine)
    figures: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    if with_reference:
        figures |= {"cosine_min": min(sums.cosine), "relative_error_max": max(sums.error)}
        intervals |= {"cosine_mean": mean_interval(sums.cosine, [1] * count), "relative_error": mean_interval(sums.error, [1] * count)}
        if sum(sums.rows):
            figures["kl_max"] = max(kl / rows for kl, rows in zip(sums.kl, sums.rows, strict=True) if rows)
            intervals |= {"kl_mean": mean_interval(sums.kl, sums.rows), "top1_agreement": mean_interval(sums.agrees, sums.rows)}
    if sum(sums.targets):
        intervals["accuracy"] = mean_interval(sums.right, sums.targets)
        if with_reference:
            intervals["accuracy_reference"] = mean_interval(sums.reference_right, sums.targets)
            intervals["accuracy_difference"] = mean_interval([a - b for a, b in zip(sums.right, sums.reference_right, strict=True)], sums.targets)
    return {
        **figures,
        **{name: interval.value for name, interval in intervals.items()},
        "n": count,
        "ci95": {name: None if interval.bounds is None else list(interval.bounds) for name, interval in intervals.items()},
        "corpus": dict(options["corpus"]),
        "method": {**options["method"], "outputs": list(names), "n_inputs": count, "n_classified": int(sum(sums.rows)), "n_targets": int(sum(sums.targets))},
        "inputs": {name: list(column) for name, column in asdict(sums).items()},
    }


def is_outputs(record: Mapping[str, Any]) -> bool:
    """Whether a stored quality record is of this probe."""
    return "inputs" in record


def sums_of(record: Mapping[str, Any]) -> InputSums:
    """What a stored record was summed from."""
    return InputSums(**{name: tuple(record["inputs"][name]) for name in InputSums.__dataclass_fields__})


def best_metric(records: Iterable[Mapping[str, Any]]) -> str:
    """What settings of this probe are ranked by: ``kl`` where all of them choose classes, else ``error``."""
    return "kl" if all(sum(record["inputs"]["rows"]) for record in records) else "error"


def figure_of(metric: str) -> str:
    """The figure in a record that ``metric`` compares."""
    return {"kl": "kl_mean", "error": "relative_error", "top1": "top1_agreement", "accuracy": "accuracy"}[metric]


def compare_outputs(name_a: str, a: Mapping[str, Any], name_b: str, b: Mapping[str, Any], metric: str) -> Comparison:
    """Which of two records on the same inputs is better: a ratio for ``kl`` and ``error``, a difference for ``top1`` and ``accuracy``.

    Raises:
        IncompatibleError: the inputs differ, or the models choose no classes by which ``metric`` could be told.
    """
    x, y = sums_of(a), sums_of(b)
    same = (x.rows, x.targets) == (y.rows, y.targets) and a["corpus"] == b["corpus"] and len(x.cosine) == len(y.cosine)
    if not same:
        raise IncompatibleError(f"{name_a} and {name_b} were not judged on the same inputs", hint="judge both in one run")
    if not all(sum(per) for per in {"accuracy": (x.targets,), "error": ()}.get(metric, (x.rows,))):
        raise IncompatibleError(f"{name_a} and {name_b} cannot be compared by {metric}: no classes, or no right answers", hint="compare them by error")
    if metric in ("kl", "error"):
        effect, neutral = ratio_interval(getattr(x, metric), getattr(y, metric)), 1.0
    else:
        column, per = ("agrees", x.rows) if metric == "top1" else ("right", x.targets)
        effect, neutral = mean_interval([p - q for p, q in zip(getattr(x, column), getattr(y, column), strict=True)], per), 0.0
    return Comparison(name_a, name_b, metric, effect, verdict_of(effect, neutral, less_is_better=metric in ("kl", "error")), len(x.cosine))
