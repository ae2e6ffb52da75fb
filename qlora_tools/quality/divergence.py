"""How far a candidate's next-token distributions lie from a reference's.

Per scored token: KL(reference || candidate) in nats, whether both put the same token first, the cosine of
the two logit rows and the change of the probability of the true token. Streamed window by window in float64:
nothing of size [tokens, vocabulary] outlives its window and no logits are stored rounded, so a model
against itself gives exactly 0.

KL is formed as sum p (ln p - ln q) on float64 log-probabilities; where the result is below rounding it is
set to 0, the least a divergence can be. The cosine is a plumbing check only: it hides changes of rank.

Axes: T positions, V vocabulary, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quality.corpus import Ids, Window
from qlora_tools.quality.logits import F64, LogitsOf, as_rows, log_softmax, slices
from qlora_tools.quality.perplexity import exp_mean, scored_rows


@dataclass(frozen=True)
class TokenScores:
    """One number per scored token, all [T]."""

    kl: F64
    agrees: NDArray[np.bool_]
    cosine: F64
    delta_p: F64
    nll_reference: F64
    nll_candidate: F64


@dataclass(frozen=True)
class WindowSums:
    """Sums per window [W]: what intervals resample and what two settings are paired on."""

    tokens: tuple[int, ...]
    kl: tuple[float, ...]
    agrees: tuple[int, ...]
    squared_delta_p: tuple[float, ...]
    nll_reference: tuple[float, ...]
    nll_candidate: tuple[float, ...]


@dataclass(frozen=True)
class Divergence:
    """The candidate against the reference over all scored tokens. KL in nats; agreement and delta-p as fractions."""

    n_tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    cosine_mean: float
    cosine_min: float
    rms_delta_p: float
    ppl_reference: float
    ppl_candidate: float
    windows: WindowSums

    def record(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def score_tokens(reference_TV: Any, candidate_TV: Any, targets_T: Ids, what: str = "window") -> TokenScores:
    """Compare two logit matrices row by row.

    Raises:
        IncompatibleError: the vocabularies differ.
        NonFiniteError: NaN in either.
    """
    reference_TV = as_rows(reference_TV, len(targets_T), f"the reference ({what})")
    candidate_TV = as_rows(candidate_TV, len(targets_T), f"the candidate ({what})")
    if reference_TV.shape != candidate_TV.shape:
        raise IncompatibleError(
            f"the candidate's vocabulary has {candidate_TV.shape[1]} entries, the reference's {reference_TV.shape[1]}",
            hint="compare models with one tokenizer",
        )
    parts = [_score_slice(reference_TV[part], candidate_TV[part], targets_T[part], what) for part in slices(*reference_TV.shape)]
    return TokenScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _score_slice(reference_TV: NDArray[Any], candidate_TV: NDArray[Any], targets_T: Ids, what: str) -> tuple[NDArray[Any], ...]:
    log_p_TV = log_softmax(reference_TV, f"the reference ({what})")
    log_q_TV = log_softmax(candidate_TV, f"the candidate ({what})")
    log_p_T = np.take_along_axis(log_p_TV, targets_T[:, None], axis=1)[:, 0]
    log_q_T = np.take_along_axis(log_q_TV, targets_T[:, None], axis=1)[:, 0]
    agrees_T = reference_TV.argmax(axis=1) == candidate_TV.argmax(axis=1)
    p_TV = np.exp(log_p_TV)
    with np.errstate(invalid="ignore"):  # -inf - -inf, a token both forbid
        terms_TV = np.where(p_TV > 0, p_TV * (log_p_TV - log_q_TV), 0.0)
    kl_T = np.maximum(terms_TV.sum(axis=1), 0.0)
    return kl_T, agrees_T, _cosines(reference_TV, candidate_TV), np.exp(log_q_T) - np.exp(log_p_T), -log_p_T, -log_q_T


def _cosines(a_TV: NDArray[Any], b_TV: NDArray[Any]) -> F64:
    """Cosine of raw logit rows; entries forbidden in either count as 0 in both. Two zero rows are alike: 1."""
    finite_TV = np.isfinite(a_TV) & np.isfinite(b_TV)
    a_TV, b_TV = np.where(finite_TV, a_TV, 0).astype(np.float64), np.where(finite_TV, b_TV, 0).astype(np.float64)
    dot_T, aa_T, bb_T = ((x * y).sum(axis=1) for x, y in ((a_TV, b_TV), (a_TV, a_TV), (b_TV, b_TV)))
    same_T = (a_TV == b_TV).all(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine_T = np.where(aa_T * bb_T > 0, dot_T / np.sqrt(aa_T * bb_T), 0.0)
    return np.where(same_T, 1.0, np.clip(cosine_T, -1.0, 1.0))


def divergence(
    reference_of: LogitsOf, candidate_of: LogitsOf, windows: Sequence[Window], *, progress: Progress = SILENT, title: str = "divergence"
) -> Divergence:
    """Run both models over every window and compare.

    Raises:
        UsageError: no windows.
        IncompatibleError, NonFiniteError: see :func:`score_tokens`.
    """
    if not windows:
        raise UsageError("no windows to score")
    scores: list[TokenScores] = []
    with progress.task(title, len(windows), "windows") as task:
        for number, window in enumerate(windows):
            what = f"window {number}"
            reference_TV = scored_rows(reference_of, window, f"the reference ({what})")
            candidate_TV = scored_rows(candidate_of, window, f"the candidate ({what})")
            scores.append(score_tokens(reference_TV, candidate_TV, window.targets, what))
            task.advance()
    return _summed(scores)


def _summed(scores: Sequence[TokenScores]) -> Divergence:
    sums = WindowSums(
        tokens=tuple(len(s.kl) for s in scores),
        kl=tuple(float(s.kl.sum()) for s in scores),
        agrees=tuple(int(s.agrees.sum()) for s in scores),
        squared_delta_p=tuple(float((s.delta_p**2).sum()) for s in scores),
        nll_reference=tuple(float(s.nll_reference.sum()) for s in scores),
        nll_candidate=tuple(float(s.nll_candidate.sum()) for s in scores),
    )
    n_tokens = sum(sums.tokens)
    kl = np.concatenate([s.kl for s in scores])
    cosine = np.concatenate([s.cosine for s in scores])
    return Divergence(
        n_tokens=n_tokens,
        kl_mean=math.fsum(sums.kl) / n_tokens,
        kl_p99=float(np.quantile(kl, 0.99, method="higher")),
        kl_max=float(kl.max()),
        top1_agreement=sum(sums.agrees) / n_tokens,
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        rms_delta_p=math.sqrt(math.fsum(sums.squared_delta_p) / n_tokens),
        ppl_reference=exp_mean(sums.nll_reference, sums.tokens),
        ppl_candidate=exp_mean(sums.nll_candidate, sums.tokens),
        windows=sums,
    )
