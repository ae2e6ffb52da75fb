"""Records of models that look once, made up."""

from __future__ import annotations

from qlora_tools.quality.outputs import InputSums, outputs_record


def looked(error, *, rows=0, kl=0.0, count=12):
    """Figures of a model that looks once; with ``rows`` it chooses that many classes per input."""
    none, spread = (0,) * count, [1 + 0.01 * (number % 3) for number in range(count)]
    sums = InputSums((0.9,) * count, tuple(error * x for x in spread), (rows,) * count, tuple(rows * kl * x for x in spread), none, none, none, none)
    return outputs_record(sums, ("out",), {"corpus": {"name": "drawn"}, "method": {"name": "seeds"}})
