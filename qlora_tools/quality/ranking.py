"""Several settings judged on the same windows: who is better, who ties, and how much of a fine-tune each keeps.

Works on the stored records of :mod:`~qlora_tools.quality.probe`, so a benchmark can be ranked long after it ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_tools.quality.intervals import compare, retention_interval
from qlora_tools.quality.probe import divergence_of
from qlora_tools.quality.retention import retention

Records = Mapping[str, Mapping[str, Any]]


def comparisons(records: Records, metric: str = "kl") -> list[dict[str, Any]]:
    """Every pair of settings, better first, as plain JSON: ``a``, ``b``, ``metric``, ``effect``, ``ci95``, ``n_pairs``, ``verdict``.

    Only settings that separate may be ranked; see :func:`~qlora_tools.quality.intervals.compare` for the verdicts.
    """
    figure = {"kl": "kl_mean", "ppl": "ppl_candidate", "top1": "top1_agreement"}[metric]
    divergences = {name: divergence_of(record) for name, record in records.items()}
    order = sorted(records, key=lambda name: (getattr(divergences[name], figure) * (-1 if metric == "top1" else 1), name))
    found = []
    for i, a in enumerate(order):
        for b in order[i + 1 :]:
            result = compare(a, divergences[a], b, divergences[b], metric)
            bounds = result.effect.bounds
            found.append(
                {
                    "a": a,
                    "b": b,
                    "metric": metric,
                    "effect": result.effect.value,
                    "ci95": bounds and list(bounds),
                    "n_pairs": result.n_pairs,
                    "verdict": result.verdict,
                }
            )
    return found


def with_retention(records: Records, base: str) -> dict[str, dict[str, Any]]:
    """The records with ``retention`` and its interval added, where ``base`` is the untuned model and the reference of all is the tuned one.

    The base itself keeps nothing, by definition. Where the fine-tune gained nothing on this text, ``retention`` is ``None``.
    """
    untuned = divergence_of(records[base])
    found = {}
    for name, record in records.items():
        judged = divergence_of(record)
        share = retention(untuned.ppl_candidate, judged.ppl_reference, judged.ppl_candidate)
        interval = None
        if share is not None:
            interval = retention_interval(untuned.windows.nll_candidate, judged.windows.nll_reference, judged.windows.nll_candidate).bounds
        found[name] = {**record, "retention": share, "ci95": {**record["ci95"], "retention": interval and list(interval)}}
    return found
