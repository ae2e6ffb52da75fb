"""Which linears stay in 16 bits when not all of them have to be small: the greedy choice by what each gives per byte.

What a layer gives is how much of the model's KL it causes when it alone is quantized; such contributions add up closely enough to rank by, and the
final mixture is measured as a whole all the same. Left out: measuring (the verb has the model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sensitivity:
    """A linear: what it takes dense and stored, and the KL in nats that storing it alone costs."""

    name: str
    dense_bytes: int
    stored_bytes: int
    kl: float

    @property
    def more_bytes(self) -> int:
        """What keeping it dense costs."""
        return max(1, self.dense_bytes - self.stored_bytes)


@dataclass(frozen=True)
class FrontierPoint:
    """The first ``kept`` layers of the order stay dense. ``predicted_kl``: the sum of the others'; ``measured_kl`` where it was measured."""

    kept: int
    total_bytes: int
    predicted_kl: float
    measured_kl: float | None = None


def by_benefit(layers: Sequence[Sensitivity]) -> list[Sensitivity]:
    """The layers in the order in which they should be given 16 bits: KL saved per byte, falling; of equals the smaller first."""
    return sorted(layers, key=lambda layer: (-layer.kl / layer.more_bytes, layer.more_bytes, layer.name))


def within_bytes(ordered: Sequence[Sensitivity], spare_bytes: int) -> list[str]:
    """The layers to keep dense for ``spare_bytes`` more than everything stored takes: greedy, passing over what no longer fits."""
    kept = []
    for layer in ordered:
        if layer.more_bytes <= spare_bytes:
            kept.append(layer.name)
            spare_bytes -= layer.more_bytes
    return kept


def fewest_for(limit_kl: float, count: int, measure: Callable[[int], float]) -> int:
    """The smallest number of layers kept dense, of ``count``, with ``measure(number) <= limit_kl``, by bisection: a KL that falls with the number.

    All of them are kept where nothing else is enough.
    """
    low, high = -1, count  # low fails or lies below 0, high is enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(middle) <= limit_kl else (middle, high)
    return high


def frontier(ordered: Sequence[Sensitivity], all_stored_bytes: int) -> Iterator[FrontierPoint]:
    """Bytes of the whole against the KL predicted, from everything stored to everything dense."""
    left = sum(layer.kl for layer in ordered)
    yield FrontierPoint(0, all_stored_bytes, left)
    for number, layer in enumerate(ordered, 1):
        left -= layer.kl
        all_stored_bytes += layer.more_bytes
        yield FrontierPoint(number, all_stored_bytes, max(left, 0.0))
