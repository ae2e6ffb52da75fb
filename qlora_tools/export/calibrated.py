"""Rows of a weight carried in the way that disturbs the layer's outputs least.

A format offers candidates that fill the same parts: its plain encoding, and codes chosen by error feedback (:mod:`qlora_tools.quant.gptq`)
from the second moments of the layer's inputs. A row's error at the output is d R d', with d what the row lost and R the moments; it involves no
other row, so every row takes the candidate whose error is least *on text that the candidates were not made from*. ``plain`` is among them and
wins ties: judged so, no row is carried worse than without calibration. A table that is both embedding and head is judged as the head; as measured on
a trained model, its lookups gain nearly as much.

The moments are those of the model that was calibrated. Where adapters are merged in on the way, that is the base: what its layers read
changes little with an adapter, and statistics of it serve every adapter.

Left out: making the statistics (``calibrate/``) and what the whole model loses (``verbs/evaluate``).
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from qlora_tools.checkpoint.statistics import HELD_OUT, INPUT, Statistics
from qlora_tools.engine.plan import Read
from qlora_tools.export.formats.format import Moments, WeightFormat
from qlora_tools.quant.gptq import Feedback, feedback

PLAIN = "plain"
#: The name of the statistics among a plan's sources.
STATISTICS = "statistics"
_TILE = 1024


@dataclass(frozen=True)
class Choice:
    """How some rows of ``weight`` are carried: rows by candidate, and summed squared output errors per token on the judging text."""

    weight: str
    rows: Mapping[str, int]
    plain_error: float
    error: float


@dataclass(frozen=True)
class Gain:
    """All choices of an export: ``share`` is the mean over weights of error / plain error; ``rows`` those taken by each candidate."""

    weights: int
    share: float
    rows: Mapping[str, int]


class Factors:
    """The factor of the moments used last: weights that share their input, and the row tiles of one weight, follow each other in a plan."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name: str | None = None
        self._factor: Feedback | None = None

    def of(self, name: str, moments_II: torch.Tensor) -> Feedback:
        """The factor of ``moments_II``, the tensor ``name`` of the statistics."""
        with self._lock:
            if self._factor is None or self._name != name:
                self._name, self._factor = name, feedback(moments_II)
            return self._factor


class Calibration:
    """What a plan needs of the statistics. Weights that share their input follow each other, and so share the factor of its moments."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._factors = Factors()

    def reads(self, weight: str) -> tuple[Read, ...]:
        """Moments that teach and that judge, where the statistics hold the inputs of ``weight``."""
        learn = self._statistics.name_of(INPUT, weight)
        if learn is None:
            return ()
        judge = self._statistics.name_of(HELD_OUT, weight) or learn
        return Read(STATISTICS, learn), Read(STATISTICS, judge)

    def moments(self, learn: Read, learn_II: torch.Tensor, judge_II: torch.Tensor) -> Moments:
        return Moments(learn_II, judge_II, self._factors.of(learn.name, learn_II))


def encode_calibrated(form: WeightFormat, name: str, weight: str, w_OI: torch.Tensor, moments: Moments) -> tuple[dict[str, torch.Tensor], Choice]:
    """The parts of ``w_OI`` (rows of the tensor ``weight``) with each row from its best candidate, and what was chosen.

    Raises:
        NonFiniteError: NaN or infinity in the weight.
    """
    candidates = iter(form.candidates(name, w_OI, moments))
    label, best = next(candidates)
    assert label == PLAIN
    wide_OI = w_OI.float()

    def errors_of(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return row_errors(wide_OI - form.decode(name, parts, w_OI.shape[1]), moments.judge_II)

    least_O = errors_of(best)
    plain_error = float(least_O.sum())
    labels, winner_O = [label], torch.zeros(len(w_OI), dtype=torch.int64)
    for number, (label, parts) in enumerate(candidates, 1):
        labels.append(label)
        error_O = errors_of(parts)
        better_O = error_O < least_O
        least_O, winner_O = torch.where(better_O, error_O, least_O), torch.where(better_O, number, winner_O)
        best = {part: torch.where(better_O.view(-1, *[1] * (tensor.ndim - 1)), parts[part], tensor) for part, tensor in best.items()}
    taken = Counter(labels[number] for number in winner_O.tolist())
    return best, Choice(weight, dict(taken), plain_error, float(least_O.sum()))


def row_errors(lost_OI: torch.Tensor, moments_II: torch.Tensor) -> torch.Tensor:
    """d R d' of every row d, fp64 [O]: products in fp64 too, so that what a row takes does not depend on the rows beside it in a tile.

    Both are made fp64 in tiles: the moments may be the largest thing in memory.
    """
    found = []
    for tile in lost_OI.split(_TILE):
        wide_TI = tile.double()
        found.append(sum(((wide_TI @ strip.double()) * part).sum(1) for strip, part in zip(moments_II.split(_TILE, 1), wide_TI.split(_TILE, 1), strict=True)))
    return torch.cat(found)


def gain_of(choices: Iterable[Choice]) -> Gain:
    """What calibration gained over a whole export. Row tiles of one weight count as one weight."""
    plain: defaultdict[str, float] = defaultdict(float)
    error: defaultdict[str, float] = defaultdict(float)
    rows: Counter[str] = Counter()
    for choice in choices:
        plain[choice.weight] += choice.plain_error
        error[choice.weight] += choice.error
        rows.update(choice.rows)
    shares = [error[weight] / plain[weight] if plain[weight] > 0 else 1.0 for weight in plain]
    return Gain(len(shares), sum(shares) / max(len(shares), 1), dict(sorted(rows.items())))
