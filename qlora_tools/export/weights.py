"""The plan that fills the external data file: every matrix encoded once from fp32, packed ones row range by row range.

Large matrices come in row tiles, so memory follows the tile and neither the model nor the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit, Write, row_tiles, tile_label
from qlora_tools.errors import IncompatibleError, MissingError, NonFiniteError
from qlora_tools.export.graph import COS, SIN
from qlora_tools.export.layout import Layout, Matrix
from qlora_tools.finite import is_finite, refuse_non_finite
from qlora_tools.models.decoder import Decoder
from qlora_tools.names import nearest
from qlora_tools.specs import TensorSpec

#: Name of the one source in the plan.
MODEL = "model"
_ROTARY_ROWS = 1 << 15


def plan_weights(source: Source, decoder: Decoder, layout: Layout) -> Plan:
    """The plan over sources ``{"model": source}``; its outputs in file order.

    Raises:
        MissingError: the source lacks a tensor that the decoder reads. IncompatibleError: one has another shape.
    """
    check_tensors(source, decoder)
    outputs = [TensorSpec(name, "F32", (decoder.max_positions, decoder.rope.size // 2)) for name in (COS, SIN)]
    units = list(_rotary(decoder))
    for name, size in layout.norms:
        outputs.append(TensorSpec(name, "F32", (size,)))
        units.append(Unit(name, (Read(MODEL, name),), (Write(name),), _as_float(name, name)))
    for matrix in layout.matrices():
        outputs += matrix.specs()
        units += _matrix(source, matrix)
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


def _rotary(decoder: Decoder) -> Iterator[Unit]:
    for start in range(0, decoder.max_positions, _ROTARY_ROWS):
        stop = min(start + _ROTARY_ROWS, decoder.max_positions)

        def caches(start: int = start, stop: int = stop) -> Outcome:
            return Outcome(dict(zip((COS, SIN), decoder.rope.caches(start, stop), strict=True)))

        yield Unit(f"rotary[{start}:{stop}]", (), (Write(COS, start, stop - start), Write(SIN, start, stop - start)), caches)


def _as_float(name: str, target: str) -> Callable[[torch.Tensor], Outcome]:
    def widen(tensor: torch.Tensor) -> Outcome:
        refuse_non_finite(name, tensor)
        return Outcome({target: tensor.to(torch.float32)})

    return widen


def _matrix(source: Source, matrix: Matrix) -> Iterator[Unit]:
    """Units that encode each module's rows into the matrix's parts, and collect the biases."""
    parts = [spec.name for spec in matrix.format.parts(matrix.name, matrix.total_rows, matrix.columns)]
    offset = 0
    for module, rows, biased in zip(matrix.modules, matrix.rows, matrix.biased, strict=True):
        weight = f"{module}.weight"
        for tile in row_tiles(TensorSpec(weight, "F32", (rows, matrix.columns))):
            start, stop = tile or (0, rows)
            writes = tuple(Write(part, offset + start, stop - start) for part in parts)
            yield Unit(tile_label(weight, tile), (Read(MODEL, weight, tile),), writes, _encoding(matrix, weight))
        if matrix.bias is not None:
            target = Write(matrix.bias, offset, rows)
            if biased:
                yield Unit(f"{module}.bias", (Read(MODEL, f"{module}.bias"),), (target,), _as_float(f"{module}.bias", matrix.bias))
            else:
                yield Unit(f"{module}.bias", (), (target,), _zeros(matrix.bias, rows))
        offset += rows


def _encoding(matrix: Matrix, weight: str) -> Callable[[torch.Tensor], Outcome]:
    def encode(tensor: torch.Tensor) -> Outcome:
        try:
            parts = matrix.format.encode(matrix.name, tensor)
        except NonFiniteError:
            refuse_non_finite(weight, tensor)  # under the checkpoint's name, not the graph's
            raise
        if not all(is_finite(part) for part in parts.values() if part.is_floating_point()):
            refuse_non_finite(weight, tensor)
            raise NonFiniteError(f"`{weight}` overflows in the form this scheme stores", hint="export it with --fp32")
        return Outcome(parts)

    return encode


def _zeros(name: str, rows: int) -> Callable[[], Outcome]:
    return lambda: Outcome({name: torch.zeros(rows)})
