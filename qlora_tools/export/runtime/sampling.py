"""From logits to the next token: transformers' definitions, in numpy, determined by a seed.

Order and meaning are those of transformers' logits processors: repetition penalty, then, if tokens are drawn, temperature, top-k,
top-p and min-p. A token is drawn by one uniform number of a seeded generator and the cumulated probabilities in fp64, so the same
logits and seed give the same text on every machine; transformers draws with torch's generator and gives other texts for a seed.

Axes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_tools.errors import NonFiniteError, UsageError

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 takes the likeliest; ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and a penalty of 1 leave everything as it is."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0 and np.isfinite(self.temperature), "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (good, expected) in ranges.items():
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def with_defaults(self, search: Mapping[str, Any]) -> Sampling:
        """The model's own settings for sampling, in the names of generation_config.json; what they leave open stays."""
        known = {name: search[name] for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty") if isinstance(search.get(name), (int, float))}
        return replace(self, **{"temperature": 1.0, **known})


GREEDY = Sampling()


class Sampler:
    """Chooses for one batch, and remembers which tokens it has seen."""

    def __init__(self, sampling: Sampling, prompts: Sequence[NDArray[np.int64]]) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._seen: list[NDArray[np.int64]] = [np.unique(prompt) for prompt in prompts]

    def choose(self, logits_BV: NDArray[Any]) -> NDArray[np.int64]:
        """The next token of each sequence, int64 [B].

        Raises:
            NonFiniteError: logits that are not numbers.
        """
        chosen_B = np.array([self._choose(logits_V.astype(np.float32), seen) for logits_V, seen in zip(logits_BV, self._seen, strict=True)], np.int64)
        if self._sampling.repetition_penalty != 1:
            self._seen = [np.union1d(seen, token) for seen, token in zip(self._seen, chosen_B, strict=True)]
        return chosen_B

    def _choose(self, logits_V: Logits, seen: NDArray[np.int64]) -> int:
        if np.isnan(logits_V).any() or not np.isfinite(logits_V.max()):
            raise NonFiniteError("the model's logits are not numbers", hint="export again; a 16-bit graph may overflow where bf16 would not")
        logits_V = penalised(logits_V, seen, self._sampling.repetition_penalty)
        if self._sampling.greedy:
            return int(logits_V.argmax())
        cumulated_V = np.cumsum(probabilities(narrowed(logits_V, self._sampling)))
        return int(np.searchsorted(cumulated_V, self._random.random() * cumulated_V[-1], side="right"))


def narrowed(logits_V: Logits, sampling: Sampling) -> Logits:
    """Temperature, top-k, top-p and min-p in their order; what is ruled out is -inf."""
    return likely_enough(nucleus(highest(logits_V / np.float32(sampling.temperature), sampling.top_k), sampling.top_p), sampling.min_p)


def penalised(logits_V: Logits, seen: NDArray[np.int64], penalty: float) -> Logits:
    """Logits of ``seen`` tokens divided by the penalty, or multiplied where they are negative (CTRL, arXiv 1909.05858)."""
    if penalty == 1 or not seen.size:
        return logits_V
    result = logits_V.copy()
    found = result[seen]
    result[seen] = np.where(found < 0, found * np.float32(penalty), found / np.float32(penalty))
    return result


def highest(logits_V: Logits, count: int) -> Logits:
    """The ``count`` highest, and those equal to the last of them; 0 keeps all."""
    if not 0 < count < logits_V.size:
        return logits_V
    return _only(logits_V, logits_V >= np.partition(logits_V, -count)[-count])


def nucleus(logits_V: Logits, share: float) -> Logits:
    """The fewest likeliest tokens that hold ``share`` of the probability (arXiv 1904.09751), at least one."""
    if share >= 1:
        return logits_V
    ascending = np.argsort(logits_V, kind="stable")
    below_V = np.cumsum(probabilities(logits_V)[ascending])
    kept = np.zeros(logits_V.size, bool)
    kept[ascending[below_V > 1 - share]] = True
    kept[ascending[-1]] = True
    return _only(logits_V, kept)


def likely_enough(logits_V: Logits, share: float) -> Logits:
    """Tokens at least ``share`` times as likely as the likeliest (arXiv 2407.01082)."""
    if share <= 0:
        return logits_V
    likelihood_V = probabilities(logits_V)
    return _only(logits_V, likelihood_V >= share * likelihood_V.max())


def probabilities(logits_V: Logits) -> NDArray[np.float64]:
    """Softmax in fp64."""
    weights_V: NDArray[np.float64] = np.exp(logits_V.astype(np.float64) - float(logits_V.max()))
    shares_V: NDArray[np.float64] = weights_V / weights_V.sum()
    return shares_V


def _only(logits_V: Logits, kept: NDArray[np.bool_]) -> Logits:
    return np.where(kept, logits_V, np.float32(-np.inf))
