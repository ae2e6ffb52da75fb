"""One setting judged against a reference, as a job that a fresh process can run.

``measure`` takes two engines (anything with ``score(ids_BT) -> logits [B, T, V]``) and plain JSON options,
and gives plain JSON back, so the benchmark's worker can be told to run it by name without knowing this room.
The token windows come ready-made in the options: the text is tokenized once, and every setting sees the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.corpus import Corpus, Ids, Method, Window
from qlora_tools.quality.divergence import Divergence, WindowSums, divergence
from qlora_tools.quality.intervals import Interval, mean_interval, perplexity_interval, perplexity_ratio
from qlora_tools.quality.logits import LogitsOf

PROBE = "qlora_tools.quality.probe:measure"


class Scorer(Protocol):
    def score(self, ids_BT: Ids) -> Any:
        """Logits [B, T, V] of every position."""


def probe_options(corpus: Corpus, method: Method, windows: Sequence[Window]) -> dict[str, Any]:
    """The JSON options of :func:`measure`."""
    return {
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        "method": method.record(),
        "windows": [{"ids": window.ids.tolist(), "first_scored": window.first_scored} for window in windows],
    }


def measure(engine: Scorer, reference: Scorer, options: Mapping[str, Any], *, progress: Progress = SILENT) -> dict[str, Any]:
    """Judge ``engine`` against ``reference`` and return :func:`quality_record`'s dict."""
    windows = [Window(np.asarray(window["ids"], dtype=np.int64), int(window["first_scored"])) for window in options["windows"]]
    result = divergence(logits_of(reference), logits_of(engine), windows, progress=progress)
    return quality_record(result, corpus=options["corpus"], method=options["method"])


def logits_of(engine: Scorer) -> LogitsOf:
    """A batch engine as the callable this room's functions take."""
    return lambda ids_T: engine.score(ids_T[None, :])


def quality_record(result: Divergence, *, corpus: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    """A divergence with its intervals and its method, in plain JSON types: what ``bench.json`` stores per setting."""
    sums = result.windows
    figures = {name: value for name, value in result.record().items() if name != "windows"}
    intervals = {
        "kl_mean": mean_interval(sums.kl, sums.tokens),
        "top1_agreement": mean_interval(sums.agrees, sums.tokens),
        "ppl_candidate": perplexity_interval(sums.nll_candidate, sums.tokens),
        "ppl_reference": perplexity_interval(sums.nll_reference, sums.tokens),
        "ppl_ratio": perplexity_ratio(sums.nll_candidate, sums.nll_reference, sums.tokens),
    }
    return {
        **figures,
        "ppl_ratio": intervals["ppl_ratio"].value,
        "ci95": {name: _bounds(interval) for name, interval in intervals.items()},
        "corpus": dict(corpus),
        "method": {**method, "n_tokens": result.n_tokens, "n_windows": len(sums.tokens)},
        "windows": {name: list(column) for name, column in result.record()["windows"].items()},
    }


def divergence_of(record: Mapping[str, Any]) -> Divergence:
    """A stored quality record as the record that ``intervals.compare`` takes."""
    sums = WindowSums(**{name: tuple(record["windows"][name]) for name in WindowSums.__dataclass_fields__})
    names = Divergence.__dataclass_fields__.keys() - {"windows"}
    return Divergence(**{name: record[name] for name in names}, windows=sums)


def _bounds(interval: Interval) -> list[float] | None:
    return None if interval.bounds is None else list(interval.bounds)
