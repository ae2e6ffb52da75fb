"""Several settings judged on the same windows: who is better, who ties, and how much of a fine-tune each keeps.

Works on the stored records of :mod:`~qlora_tools.quality.probe`, so a benchmark can be ranked long after it ran.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from qlora_tools.quality.intervals import Comparison, compare, retention_interval
from qlora_tools.quality.outputs import best_metric, compare_outputs, figure_of, is_outputs
from qlora_tools.quality.probe import divergence_of
from qlora_tools.quality.retention import retention

Records = Mapping[str, Mapping[str, Any]]


def comparisons(records: Records, metric: str = "kl") -> list[dict[str, Any]]:
    """Every pair of settings, better first, as plain JSON: ``a``, ``b``, ``metric``, ``effect``, ``ci95``, ``n_pairs``, ``verdict``.

    ``metric``: ``kl``, ``ppl``, ``top1``, and of models that look once also ``error`` and ``accuracy``; those that choose no classes are compared by ``error``
    where ``kl`` was asked for. Only settings that separate may be ranked; see :func:`~qlora_tools.quality.intervals.compare` for the verdicts. Whose figure
    is infinite, which JSON holds as ``None``, is in no pair.
    """
    if any(is_outputs(record) for record in records.values()):
        return _outputs_comparisons(records, best_metric(records.values()) if metric == "kl" else metric)
    figure = {"kl": "kl_mean", "ppl": "ppl_candidate", "top1": "top1_agreement"}[metric]
    order = _best_first(records, figure, less_is_better=metric != "top1")
    divergences = {name: divergence_of(records[name]) for name in order}
    return [_plain(compare(a, divergences[a], b, divergences[b], metric)) for a, b in itertools.combinations(order, 2)]


def _outputs_comparisons(records: Records, metric: str) -> list[dict[str, Any]]:
    order = _best_first(records, figure_of(metric), less_is_better=metric not in ("top1", "accuracy"))
    return [_plain(compare_outputs(a, records[a], b, records[b], metric)) for a, b in itertools.combinations(order, 2)]


def _best_first(records: Records, figure: str, *, less_is_better: bool) -> list[str]:
    """The names of those that have the figure as a finite number."""
    known = {name: record[figure] for name, record in records.items() if record.get(figure) is not None and math.isfinite(record[figure])}
    return sorted(known, key=lambda name: (known[name] if less_is_better else -known[name], name))


def _plain(result: Comparison) -> dict[str, Any]:
    bounds = result.effect.bounds
    return {
        "a": result.a,
        "b": result.b,
        "metric": result.metric,
        "effect": result.effect.value,
        "ci95": bounds and list(bounds),
        "n_pairs": result.n_pairs,
        "verdict": result.verdict,
    }


def with_retention(records: Records, base: str) -> dict[str, dict[str, Any]]:
    """The records with ``retention`` and its interval added, where ``base`` is the untuned model and the reference of all is the tuned one.

    The base itself keeps nothing, by definition. Where the fine-tune gained nothing on this text, or a perplexity is beyond all numbers, ``retention`` is
    ``None``. It is a share of perplexity's gain: records of models that look once stay as they are.
    """
    if any(is_outputs(record) for record in records.values()):
        return {name: dict(record) for name, record in records.items()}
    untuned = divergence_of(records[base])
    found = {}
    for name, record in records.items():
        judged = divergence_of(record)
        perplexities = untuned.ppl_candidate, judged.ppl_reference, judged.ppl_candidate
        share = retention(*perplexities) if all(value is not None and math.isfinite(value) for value in perplexities) else None
        interval = None
        if share is not None:
            interval = retention_interval(untuned.windows.nll_candidate, judged.windows.nll_reference, judged.windows.nll_candidate).bounds
        found[name] = {**record, "retention": share, "ci95": {**record["ci95"], "retention": interval and list(interval)}}
    return found
