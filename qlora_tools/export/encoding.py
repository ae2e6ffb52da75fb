"""Units that fill a weight's parts: read, encoded once from fp32, written by row ranges.

Large weights come in row tiles, so memory follows the tile. Formats that store more rows than a weight has are padded with rows of zeros; formats
that cannot be written by rows, and weights stored the other way round, take the whole weight at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from qlora_tools.engine.plan import Outcome, Read, Unit, Write, row_tiles, tile_label
from qlora_tools.errors import NonFiniteError
from qlora_tools.export.calibrated import Calibration, Choice, encode_calibrated
from qlora_tools.export.formats.format import Moments, WeightFormat
from qlora_tools.export.formats.standard_blocks import StandardBlocks
from qlora_tools.finite import is_finite, refuse_non_finite
from qlora_tools.specs import TensorSpec, dtype


def encode_units(
    source: str, weight: str, name: str, form: WeightFormat, rows: int, columns: int, *, turned: bool = False, calibration: Calibration | None = None
) -> Iterator[Unit]:
    """Units that store the tensor ``weight`` of ``source`` as ``form``'s parts of ``name``, a matrix [rows, columns].

    ``weight`` may have more axes than two; all but its first are the columns. ``turned``: it is stored as [columns, rows].
    ``calibration``: statistics that may hold the moments of its inputs.
    """
    moments = calibration.reads(weight) if calibration else ()
    moments_of = partial(calibration.moments, moments[0]) if calibration and moments else None
    encode = encoding(form, name, weight, moments_of)
    parts, whole = form.parts(name, rows, columns), isinstance(form, StandardBlocks)
    for tile in [None] if turned or whole else list(row_tiles(TensorSpec(weight, "F32", (rows, columns)))):
        start, stop = tile or (0, rows)
        writes = tuple(Write(part.name) if whole else Write(part.name, start, stop - start) for part in parts)
        yield Unit(tile_label(weight, tile), (Read(source, weight, tile), *moments), writes, _turning(turned, encode))
    if not whole:
        yield from padding_units(form, name, rows, columns)


def padding_units(form: WeightFormat, name: str, rows: int, columns: int) -> Iterator[Unit]:
    """Rows of zeros behind the weight's own, where ``form`` stores more than it has."""
    parts = form.parts(name, rows, columns)
    more = parts[0].shape[0] - rows
    if more > 0:
        yield Unit(f"{name} padding", (), tuple(Write(part.name, rows, more) for part in parts), lambda: Outcome(form.encode(name, torch.zeros(more, columns))))


def float_units(source: str, weight: str, target: TensorSpec, *, turned: bool = False) -> Iterator[Unit]:
    """Units that store ``weight`` as ``target``, cast once. ``turned``: its two axes are exchanged."""
    convert = _turning(turned, as_float(weight, target.name, target.dtype))
    for tile in [None] if turned else list(row_tiles(TensorSpec(weight, target.dtype, target.shape))):
        write = Write(target.name) if tile is None else Write(target.name, tile[0], tile[1] - tile[0])
        yield Unit(tile_label(weight, tile), (Read(source, weight, tile),), (write,), convert)


def constant_unit(name: str, tensor: torch.Tensor) -> Unit:
    """A unit that stores ``tensor`` itself."""
    return Unit(name, (), (Write(name),), lambda: Outcome({name: tensor}))


def encoding(form: WeightFormat, name: str, weight: str, moments_of: Callable[..., Moments] | None = None, compute: str = "F32") -> Callable[..., Outcome]:
    """Makes rows of the tensor ``weight`` [O, ...] the parts of ``name`` in a graph that computes in ``compute``. ``moments_of``: makes moments of the further
    tensors it is given; rows are then encoded under them, and the outcome reports the :class:`~qlora_tools.export.calibrated.Choice`."""

    def encode(tensor: torch.Tensor, *moments: torch.Tensor) -> Outcome:
        choice: Choice | None = None
        rows_OI = tensor.flatten(1)
        try:
            if moments_of is None:
                parts = form.encode(name, rows_OI)
            else:
                parts, choice = encode_calibrated(form, name, weight, rows_OI, moments_of(*moments))
        except NonFiniteError as error:
            refuse_non_finite(weight, tensor)  # under the checkpoint's name, not the graph's
            raise overflow(weight, compute) from error
        if not all(is_finite(part) for part in parts.values() if part.is_floating_point()):
            refuse_non_finite(weight, tensor)
            raise overflow(weight, compute)
        return Outcome(parts, choice)

    return encode


def as_float(weight: str, target: str, compute: str) -> Callable[[torch.Tensor], Outcome]:
    """Makes the tensor ``weight`` the tensor ``target`` in the dtype ``compute``, rounded once."""

    def convert(tensor: torch.Tensor) -> Outcome:
        refuse_non_finite(weight, tensor)
        found = tensor.to(dtype(compute).torch)
        if not is_finite(found):
            raise overflow(weight, compute)
        return Outcome({target: found})

    return convert


def overflow(weight: str, compute: str) -> NonFiniteError:
    """The error of a finite weight that a graph in ``compute`` cannot hold."""
    if compute == "F16":
        return NonFiniteError(f"`{weight}` overflows in fp16", hint="export a graph that computes in bf16")
    return NonFiniteError(f"`{weight}` overflows in the form this scheme stores", hint="export it with --fp32")


def _turning(turned: bool, apply: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """``apply`` for a weight that is stored the other way round, if ``turned``."""
    return (lambda stored, *rest: apply(stored.T.contiguous(), *rest)) if turned else apply
