"""The plan that fills the external data file: every matrix encoded once from fp32, packed ones row range by row range.

Large matrices come in row tiles, so memory follows the tile and neither the model nor the vocabulary. With calibration statistics, weights
whose inputs they hold are encoded under them (:mod:`qlora_tools.export.calibrated`), and their units report what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from qlora_tools.checkpoint.statistics import HELD_OUT, INPUT, Statistics
from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit, Write, row_tiles, tile_label
from qlora_tools.errors import IncompatibleError, MissingError, NonFiniteError
from qlora_tools.export.calibrated import Choice, Factors, encode_calibrated
from qlora_tools.export.decoder.graph import COS, SIN
from qlora_tools.export.decoder.layout import Layout, Matrix
from qlora_tools.export.formats.format import Moments
from qlora_tools.finite import is_finite, refuse_non_finite
from qlora_tools.models.decoder import Decoder
from qlora_tools.names import nearest
from qlora_tools.specs import TensorSpec, dtype

#: Names of the plan's sources; the second only with calibration.
MODEL, STATISTICS = "model", "statistics"
_ROTARY_ROWS = 1 << 15


def plan_weights(source: Source, decoder: Decoder, layout: Layout, statistics: Statistics | None = None) -> Plan:
    """The plan over sources ``{"model": source, "statistics": statistics}``; its outputs in file order.

    Raises:
        MissingError: the source lacks a tensor that the decoder reads. IncompatibleError: one has another shape.
    """
    check_tensors(source, decoder)
    outputs = [TensorSpec(name, layout.compute, (decoder.max_positions, decoder.rope.size // 2)) for name in (COS, SIN)]
    units = list(_rotary(decoder, layout.compute))
    calibration = _Calibration(statistics) if statistics is not None else None
    for name, size in layout.norms:
        outputs.append(TensorSpec(name, layout.compute, (size,)))
        units.append(Unit(name, (Read(MODEL, name),), (Write(name),), _as_float(name, name, layout.compute)))
    for matrix in layout.matrices():
        outputs += matrix.specs()
        units += _matrix(matrix, calibration)
    return Plan(tuple(outputs), tuple(units))


def check_tensors(source: Source, decoder: Decoder) -> None:
    """Every tensor the decoder reads is there, in its shape, before a byte is read."""
    for name, shape in decoder.expected_shapes().items():
        spec = source.specs.get(name)
        if spec is None:
            close = nearest(name, source.specs)
            raise MissingError(
                f"export needs `{name}` {list(shape)}, which the model does not hold", hint=f"the nearest names are {', '.join(close)}" if close else None
            )
        if spec.shape != shape:
            raise IncompatibleError(
                f"`{name}` is {list(spec.shape)}, config.json makes it {list(shape)}", hint="the config.json does not describe these weights"
            )
    for layer in range(decoder.layers):
        for role in ("query", "key", "value", "output", "gate", "up", "down"):
            bias = f"{decoder.module(role, layer)}.bias"
            if role not in decoder.biased and bias in source.specs:
                raise IncompatibleError(
                    f"the model holds `{bias}`, which the config says it has not", hint="set attention_bias or mlp_bias in config.json as the model was trained"
                )


def _rotary(decoder: Decoder, compute: str) -> Iterator[Unit]:
    for start in range(0, decoder.max_positions, _ROTARY_ROWS):
        stop = min(start + _ROTARY_ROWS, decoder.max_positions)

        def caches(start: int = start, stop: int = stop) -> Outcome:
            cos, sin = (cache.to(dtype(compute).torch) for cache in decoder.rope.caches(start, stop))
            return Outcome({COS: cos, SIN: sin})

        yield Unit(f"rotary[{start}:{stop}]", (), (Write(COS, start, stop - start), Write(SIN, start, stop - start)), caches)


def _as_float(name: str, target: str, compute: str) -> Callable[[torch.Tensor], Outcome]:
    def convert(tensor: torch.Tensor) -> Outcome:
        refuse_non_finite(name, tensor)
        found = tensor.to(dtype(compute).torch)
        if not is_finite(found):
            raise NonFiniteError(f"`{name}` overflows in {compute}", hint="export it in a wider dtype")
        return Outcome({target: found})

    return convert


class _Calibration:
    """What the plan needs of the statistics. Weights that share their input follow each other, and so share the factor of its moments."""

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


def _matrix(matrix: Matrix, calibration: _Calibration | None) -> Iterator[Unit]:
    """Units that encode each module's rows into the matrix's parts, and collect the biases."""
    parts = [spec.name for spec in matrix.format.parts(matrix.name, matrix.total_rows, matrix.columns)]
    offset = 0
    for module, rows, biased in zip(matrix.modules, matrix.rows, matrix.biased, strict=True):
        weight = f"{module}.weight"
        moments = calibration.reads(weight) if calibration else ()
        for tile in row_tiles(TensorSpec(weight, "F32", (rows, matrix.columns))):
            start, stop = tile or (0, rows)
            writes = tuple(Write(part, offset + start, stop - start) for part in parts)
            moments_of = partial(calibration.moments, moments[0]) if calibration and moments else None
            yield Unit(tile_label(weight, tile), (Read(MODEL, weight, tile), *moments), writes, _encoding(matrix, weight, moments_of))
        if matrix.bias is not None:
            target = Write(matrix.bias, offset, rows)
            if biased:
                yield Unit(f"{module}.bias", (Read(MODEL, f"{module}.bias"),), (target,), _as_float(f"{module}.bias", matrix.bias, matrix.compute))
            else:
                yield Unit(f"{module}.bias", (), (target,), _zeros(matrix.bias, rows, matrix.compute))
        offset += rows


def _encoding(matrix: Matrix, weight: str, moments_of: Callable[..., Moments] | None) -> Callable[..., Outcome]:
    def encode(tensor: torch.Tensor, *moments: torch.Tensor) -> Outcome:
        choice: Choice | None = None
        try:
            if moments_of is None:
                parts = matrix.format.encode(matrix.name, tensor)
            else:
                parts, choice = encode_calibrated(matrix.format, matrix.name, weight, tensor, moments_of(*moments))
        except NonFiniteError:
            refuse_non_finite(weight, tensor)  # under the checkpoint's name, not the graph's
            raise
        if not all(is_finite(part) for part in parts.values() if part.is_floating_point()):
            refuse_non_finite(weight, tensor)
            raise NonFiniteError(f"`{weight}` overflows in the form this scheme stores", hint="export it with --fp32")
        return Outcome(parts, choice)

    return encode


def _zeros(name: str, rows: int, compute: str) -> Callable[[], Outcome]:
    return lambda: Outcome({name: torch.zeros(rows, dtype=dtype(compute).torch)})
