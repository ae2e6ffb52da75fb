"""The plan that fills the external data file: every matrix encoded once from fp32, packed ones row range by row range.

Large matrices come in row tiles, so memory follows the tile and neither the model nor the vocabulary. With calibration statistics, weights
whose inputs they hold are encoded under them (:mod:`qlora_tools.export.calibrated`), and their units report what was chosen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit, Write, row_tiles, tile_label
from qlora_tools.errors import IncompatibleError, MissingError, NonFiniteError
from qlora_tools.export.calibrated import Calibration
from qlora_tools.export.decoder.graph import cache_names
from qlora_tools.export.decoder.layout import Layout, Vector
from qlora_tools.export.decoder.matrices import Matrix
from qlora_tools.export.encoding import as_float, encoding, overflow, padding_units
from qlora_tools.export.formats.format import Moments
from qlora_tools.export.formats.normal_floats import NormalFloats
from qlora_tools.export.formats.standard_blocks import StandardBlocks
from qlora_tools.finite import refuse_non_finite
from qlora_tools.models.decoder import Decoder, Piece
from qlora_tools.models.rope import Rope
from qlora_tools.names import nearest, shortened
from qlora_tools.quant.codec import Stored
from qlora_tools.specs import TensorSpec, dtype

#: Names of the plan's sources, beside that of the statistics: dense tensors, and the tensors behind quantized ones as they lie.
MODEL, STORED = "model", "stored"
_ROTARY_ROWS = 1 << 15
#: Buffers that some checkpoints hold beside their weights: masks, and frequencies that the config gives too.
_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")


def plan_weights(source: Source, decoder: Decoder, layout: Layout, statistics: Statistics | None = None) -> Plan:
    """The plan over sources :data:`MODEL`, and where it reads them :data:`STATISTICS` and :data:`STORED`; its outputs in file order.

    Raises:
        MissingError: the source lacks a tensor that the decoder reads. IncompatibleError: one has another shape.
    """
    check_tensors(source, decoder)
    outputs: list[TensorSpec] = []
    units: list[Unit] = []
    for kind, rope in decoder.ropes.items():
        outputs += [TensorSpec(name, layout.compute, (rope.rows(decoder.max_positions), rope.size // 2)) for name in cache_names(kind)]
        units += _rotary(cache_names(kind), rope, decoder.max_positions, layout.compute)
    calibration = Calibration(statistics) if statistics is not None else None
    for vector in layout.norms:
        outputs.append(TensorSpec(vector.name, layout.compute, (vector.size,)))
        units.append(_norm(vector, layout.compute))
    for matrix in layout.matrices():
        outputs += matrix.specs()
        units += _matrix(matrix, calibration, source)
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
    _check_nothing_left_out(source, decoder)


def _check_nothing_left_out(source: Source, decoder: Decoder) -> None:
    """No tensor of the layers or the head is passed over: a bias or a norm that the description does not have would be missing in every sum."""
    expected = decoder.expected_shapes().keys() | ({f"{decoder.module('head')}.weight"} if decoder.tied else set())
    layers = tuple(f"{decoder.modules['layer'].format(layer=layer)}." for layer in range(decoder.layers))
    left_out = [
        name for name in source.specs if name.startswith((*layers, f"{decoder.module('head')}.")) and name not in expected and not _BUFFERS.search(name)
    ]
    if left_out:
        raise IncompatibleError(
            f"the model holds {shortened(f'`{name}`' for name in left_out)}, which the config says it has not",
            hint="set attention_bias or mlp_bias in config.json as the model was trained; tensors of another architecture cannot be left out",
        )


def _rotary(names: tuple[str, str], rope: Rope, max_positions: int, compute: str) -> Iterator[Unit]:
    for start in range(0, rope.rows(max_positions), _ROTARY_ROWS):
        stop = min(start + _ROTARY_ROWS, rope.rows(max_positions))

        def caches(start: int = start, stop: int = stop) -> Outcome:
            return Outcome({name: cache.to(dtype(compute).torch) for name, cache in zip(names, rope.caches(start, stop), strict=True)})

        yield Unit(f"{names[0].rpartition('.')[0]}[{start}:{stop}]", (), tuple(Write(name, start, stop - start) for name in names), caches)


def _norm(vector: Vector, compute: str) -> Unit:
    """The offset is added in fp32, before the one rounding."""
    convert = as_float(vector.name, vector.name, compute)

    def shifted(tensor: torch.Tensor) -> Outcome:
        return convert(tensor.float() + vector.offset if vector.offset else tensor)

    return Unit(vector.name, (Read(MODEL, vector.name),), (Write(vector.name),), shifted)


def _matrix(matrix: Matrix, calibration: Calibration | None, source: Source) -> Iterator[Unit]:
    """Units that encode each piece's rows into the matrix's parts, and collect the biases."""
    if matrix.woven:
        yield from _woven(matrix)
        return
    yield from _encoded(matrix, calibration, source) if not isinstance(matrix.format, StandardBlocks) else [_assembled(matrix, matrix.format, calibration)]
    if matrix.bias is not None:
        for (piece, offset), biased in zip(matrix.placed(), matrix.biased, strict=True):
            target = Write(matrix.bias, offset, piece.rows)
            if biased:
                rows = None if piece.whole else (piece.first, piece.first + piece.rows)
                read = Read(MODEL, f"{piece.module}.bias", rows)
                yield Unit(tile_label(read.name, rows), (read,), (target,), as_float(read.name, matrix.bias, matrix.compute))
            else:
                yield Unit(f"{piece.module}.bias", (), (target,), _zeros(matrix.bias, piece.rows, matrix.compute))


def _encoded(matrix: Matrix, calibration: Calibration | None, source: Source) -> Iterator[Unit]:
    specs = matrix.format.parts(matrix.name, matrix.total_rows, matrix.columns)
    for piece, offset in matrix.placed():
        weight = f"{piece.module}.weight"
        held = _adoptable(matrix, piece, source) if calibration is None else None
        if held is not None:
            writes = tuple(Write(spec.name, offset, piece.rows) for spec in specs)
            yield Unit(weight, tuple(Read(STORED, part) for part in held.parts), writes, _adopting(matrix, held))
            continue
        moments = calibration.reads(weight) if calibration else ()
        for start, stop in _tiles(piece, matrix.columns):
            writes = tuple(Write(spec.name, offset + start, stop - start) for spec in specs)
            moments_of = partial(calibration.moments, moments[0]) if calibration and moments else None
            encode = _encoding(matrix, weight, moments_of)
            read, encode = _reading(piece, start, stop, encode)
            yield Unit(tile_label(weight, read.rows), (read, *moments), writes, encode)
    yield from padding_units(matrix.format, matrix.name, matrix.total_rows, matrix.columns)


def _adoptable(matrix: Matrix, piece: Piece, source: Source) -> Stored | None:
    """How the piece lies in the checkpoint, where the matrix's format can take these very bytes."""
    if not isinstance(matrix.format, NormalFloats) or not isinstance(source, LogicalCheckpoint) or not piece.whole:
        return None
    held = source.quantized.get(f"{piece.module}.weight")
    return held if held is not None and matrix.format.adopts(held, piece.rows, matrix.columns) else None


def _adopting(matrix: Matrix, held: Stored) -> Callable[..., Outcome]:
    form = matrix.format
    assert isinstance(form, NormalFloats)

    def adopt(*tensors: torch.Tensor) -> Outcome:
        try:
            return Outcome(form.adopt(matrix.name, held, dict(zip(held.parts, tensors, strict=True))))
        except NonFiniteError as error:
            raise overflow(held.spec.name, matrix.compute) from error

    return adopt


def _assembled(matrix: Matrix, form: StandardBlocks, calibration: Calibration | None) -> Unit:
    """All pieces at once, for a format whose parts do not begin with the rows."""
    reads, turns = zip(*(_reading(piece, 0, piece.rows, lambda rows_OI: Outcome({"": rows_OI})) for piece in matrix.pieces), strict=True)
    moments = calibration.reads(reads[0].name) if calibration else ()
    moments_of = partial(calibration.moments, moments[0]) if calibration and moments else None
    weight = reads[0].name if len(reads) == 1 else matrix.name
    encode = _encoding(replace(matrix, format=form.by_rows), weight, moments_of)

    def assemble(*tensors: torch.Tensor) -> Outcome:
        rows_OI = [turn(tensor).tensors[""] for turn, tensor in zip(turns, tensors, strict=False)]
        for read, tensor in zip(reads, rows_OI, strict=True):
            refuse_non_finite(read.name, tensor)
        found = encode(rows_OI[0] if len(rows_OI) == 1 else torch.cat(rows_OI), *tensors[len(reads) :])
        return Outcome(form.assemble(matrix.name, found.tensors), found.report)

    return Unit(weight, (*reads, *moments), tuple(Write(spec.name) for spec in form.parts(matrix.name, matrix.total_rows, matrix.columns)), assemble)


def _woven(matrix: Matrix) -> Iterator[Unit]:
    """Units that encode two pieces at a time, their rows alternating. What experts are given depends on the router, so there are no moments."""
    placed = list(matrix.placed())
    parts = [spec.name for spec in matrix.format.parts(matrix.name, matrix.total_rows, matrix.columns)]
    for (first, row), (second, _) in zip(placed[::2], placed[1::2], strict=True):
        names = f"{first.module}.weight", f"{second.module}.weight"
        for tile in row_tiles(TensorSpec(names[0], "F32", (first.rows, 2 * matrix.columns))):
            start, stop = tile or (0, first.rows)
            writes = tuple(Write(part, row + 2 * start, 2 * (stop - start)) for part in parts)
            yield Unit(tile_label(names[0], tile), tuple(Read(MODEL, name, tile) for name in names), writes, _encoding_both(matrix, names))


def _encoding_both(matrix: Matrix, names: tuple[str, str]) -> Callable[[torch.Tensor, torch.Tensor], Outcome]:
    def encode(*both: torch.Tensor) -> Outcome:
        alike = both if both[0].dtype == both[1].dtype else [tensor.float() for tensor in both]
        try:
            return encode_one(torch.stack(tuple(alike), 1).flatten(0, 1))
        except NonFiniteError:
            for name, tensor in zip(names, both, strict=True):
                refuse_non_finite(name, tensor)
            raise

    encode_one = _encoding(matrix, names[0], None)
    return encode


def _tiles(piece: Piece, columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges of the piece. A transposed one comes whole: its rows are columns of what is stored, and only a layer's own linears are stored so,
    whose size does not follow the vocabulary."""
    for tile in (None,) if piece.transposed else row_tiles(TensorSpec(piece.module, "F32", (piece.rows, columns))):
        yield tile or (0, piece.rows)


def _reading(piece: Piece, start: int, stop: int, encode: Callable[..., Outcome]) -> tuple[Read, Callable[..., Outcome]]:
    """What to read for rows ``[start, stop)`` of the piece, and ``encode`` fed with just these rows."""
    name, rows = f"{piece.module}.weight", (piece.first + start, piece.first + stop)
    if not piece.transposed:
        return Read(MODEL, name, None if rows == (0, piece.of) else rows), encode

    def turned(stored_IO: torch.Tensor, *rest: torch.Tensor) -> Outcome:
        return encode(stored_IO.T[rows[0] : rows[1]].contiguous(), *rest)

    return Read(MODEL, name), turned


def _encoding(matrix: Matrix, weight: str, moments_of: Callable[..., Moments] | None) -> Callable[..., Outcome]:
    return encoding(matrix.format, matrix.name, weight, moments_of, matrix.compute)


def _zeros(name: str, rows: int, compute: str) -> Callable[[], Outcome]:
    return lambda: Outcome({name: torch.zeros(rows, dtype=dtype(compute).torch)})
