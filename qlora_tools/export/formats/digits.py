"""int8 weights with one scale and zero point per row, times activations in two 7-bit digits.

Integer matrix units multiply 8-bit by 8-bit, and one byte per activation is too coarse: the rounding of
activations would cost as much as that of the weights. So each token's inputs x, divided by their largest
magnitude m, are split into a leading digit and what is left of it,

    x ~ m/63 (d1 + d2 / 126),    d1 = round(63 x/m) in [-63, 63],    d2 = round(126 (63 x/m - d1)) in [-63, 63]

and both digits go through one integer product as 2T rows, so that the weights are read once. 14 bits of the
activations survive, which leaves the weights as the only error; a token's result does not depend on the tokens
it is computed with. Digits are stored with zero point 64 in unsigned bytes and stay below 128: the pairwise
16-bit sums of CPUs without VNNI cannot saturate (2 * 127 * 128 < 32768).

With one digit (``digits=1``) a token keeps 8 bits, x ~ m/127 d with d in [-127, 127] and zero point 128: half the products, and the rounding of activations
then makes most of the error. Processors without VNNI may saturate there, as they may for every full-range 8-bit product.

A scale for a whole row gets coarser as rows get longer, so columns are cut into groups of at most
``longest_group``, each with its own scale and zero point per row.

With ``remainder`` a table that is looked up as well as multiplied (a tied embedding) keeps what rounding left of
it in a second byte. Only ``gather`` reads it, row by row, so it costs room in the file and next to nothing in memory.

Parts, for each group g of inputs: ``name.g`` I8 [O, I_g], ``name.g.scale`` F32 [O], ``name.g.zero`` I8 [O], and
``name.g.rest`` I8 [O, I_g] if asked for; w = scale * (code - zero), looked up + scale / 254 * rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from qlora_tools.export.formats.format import Moments
from qlora_tools.export.nodes import Nodes
from qlora_tools.quant.affine import REST_STEP, quantize_affine
from qlora_tools.quant.gptq import StepGrid, sweep
from qlora_tools.specs import TensorSpec

_LARGEST = 63
_RATIO = 126
_ZERO = 64
_FULL = 127


@dataclass(frozen=True)
class Digits:
    """``QGemm`` on two digits per activation, or one; ``gather`` dequantizes looked-up rows."""

    longest_group: int = 1024
    remainder: bool = False
    digits: int = 2

    def groups(self, columns: int) -> tuple[int, ...]:
        """Columns in each group: as equal as multiples of 64 allow."""
        count = -(-columns // self.longest_group)
        width = -(-columns // count // 64) * 64
        return tuple(min(width, columns - start) for start in range(0, columns, width))

    @property
    def carried(self) -> str:
        return "int8"

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        specs: list[TensorSpec] = []
        for group, width in enumerate(self.groups(columns)):
            codes, scale, zero, rest = _part_names(name, group)
            specs += TensorSpec(codes, "I8", (rows, width)), TensorSpec(scale, "F32", (rows,)), TensorSpec(zero, "I8", (rows,))
            specs += [TensorSpec(rest, "I8", (rows, width))] if self.remainder else []
        return tuple(specs)

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        parts: dict[str, torch.Tensor] = {}
        start = 0
        for group, width in enumerate(self.groups(w_OI.shape[1])):
            grid = quantize_affine(w_OI, width, (start, start + width), rest=self.remainder)
            codes, scale, zero, rest = _part_names(name, group)
            parts |= {codes: _signed(grid.codes[:, 0]), scale: grid.scale[:, 0], zero: _signed(grid.zero[:, 0])}
            parts |= {} if grid.rest is None else {rest: grid.rest[:, 0]}
            start += width
        return parts

    def candidates(self, name: str, w_OI: torch.Tensor, moments: Moments) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """With a remainder only the plain one: the second byte reaches half a step, which error feedback does not keep to."""
        plain = self.encode(name, w_OI)
        yield "plain", plain
        if self.remainder:
            return
        widths = torch.tensor(self.groups(w_OI.shape[1]))
        names = [_part_names(name, group) for group in range(len(widths))]
        scale_OG = torch.stack([plain[part[1]] for part in names], 1)
        zero_OG = torch.stack([plain[part[2]].float() + 128 for part in names], 1)
        grid = StepGrid(0, 255, scale_OG.repeat_interleave(widths, 1), zero_OG.repeat_interleave(widths, 1))
        codes_OI = sweep(w_OI, moments.feedback, grid)
        pieces = codes_OI.split(widths.tolist(), 1)
        yield "feedback", plain | {part[0]: _signed(piece.contiguous()) for part, piece in zip(names, pieces, strict=True)}

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int, *, looked_up: bool = False) -> torch.Tensor:
        pieces = []
        for group in range(len(self.groups(columns))):
            names = _part_names(name, group)
            codes, scale, zero = (parts[part].to(torch.float32) for part in names[:3])
            piece = (codes - zero[:, None]) * scale[:, None]
            if looked_up and self.remainder:
                piece += parts[names[3]].to(torch.float32) * (scale * REST_STEP)[:, None]
            pieces.append(piece)
        return torch.cat(pieces, dim=1)

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        two = self.digits == 2
        digits, unit = nodes.once(f"{self.digits} digits", x_TI, lambda: _split(nodes, x_TI) if two else _round(nodes, x_TI))
        step, zero = nodes.constant(1 / _LARGEST if two else 1.0, np.float32), nodes.constant(_ZERO if two else _FULL + 1, np.uint8)
        widths = self.groups(columns)
        pieces = nodes.once(f"groups {widths}", digits, lambda: _cut(nodes, digits, widths))
        sums = []
        for group, piece in enumerate(pieces):
            weight = [nodes.stored(part) for part in _part_names(name, group)[:3]]
            sums.append(nodes.contrib("QGemm", piece, step, zero, *weight, transB=1))
        both = sums[0] if len(sums) == 1 else nodes.op("Sum", *sums)
        return _scaled(nodes, self._joined(nodes, both, rows) if two else both, unit, bias)

    @staticmethod
    def _joined(nodes: Nodes, both: ir.Value, rows: int) -> ir.Value:
        """The products of the leading digits and of the second ones, [2T, O], as one sum [T, O]."""
        pair = nodes.op("Reshape", both, nodes.constant([2, -1]))
        found: ir.Value = nodes.op("Reshape", nodes.op("MatMul", nodes.constant([1, 1 / _RATIO], np.float32), pair), nodes.constant([-1, rows]))
        return found

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        found = []
        for group in range(len(self.groups(columns))):
            names = _part_names(name, group)
            codes, scale, zero = (nodes.op("Gather", nodes.stored(part), ids_T, axis=0) for part in names[:3])
            piece = nodes.op("DequantizeLinear", codes, scale, zero, axis=0)
            if self.remainder:
                rest = nodes.op("Gather", nodes.stored(names[3]), ids_T, axis=0)
                step = nodes.op("Mul", scale, nodes.constant(REST_STEP, np.float32))
                piece = nodes.op("Add", piece, nodes.op("DequantizeLinear", rest, step, axis=0))
            found.append(piece)
        return found[0] if len(found) == 1 else nodes.op("Concat", *found, axis=1)


def _split(nodes: Nodes, x_TI: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(digits uint8 [2T, I], largest magnitude of each token [T, 1]).

    A token of zeros is divided by zero; whatever digits come of that, their product is finite and is multiplied by zero.
    """
    zero = nodes.constant(_ZERO, np.uint8)
    step, small_step = nodes.constant(1 / _LARGEST, np.float32), nodes.constant(1 / _LARGEST / _RATIO, np.float32)
    largest = nodes.op("ReduceMax", nodes.op("Abs", x_TI), axes=[1], keepdims=1)
    scaled = nodes.op("Div", x_TI, largest)
    lead = nodes.op("QuantizeLinear", scaled, step, zero)
    rest = nodes.op("Sub", scaled, nodes.op("DequantizeLinear", lead, step, zero))
    return nodes.op("Concat", lead, nodes.op("QuantizeLinear", rest, small_step, zero), axis=0), largest


def _round(nodes: Nodes, x_TI: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(codes uint8 [T, I], scale of each token [T, 1]). Rounding by a scale per row spares a division of the whole, two extremes a copy of magnitudes."""
    extremes = nodes.op("ReduceMax", x_TI, axes=[1], keepdims=0), nodes.op("Neg", nodes.op("ReduceMin", x_TI, axes=[1], keepdims=0))
    scale_T = nodes.op("Mul", nodes.op("Max", *extremes), nodes.constant(1 / _FULL, np.float32))
    zero_T = nodes.op("ConstantOfShape", nodes.op("Shape", scale_T), value=ir.tensor(np.array([_FULL + 1], np.uint8)))
    return nodes.op("QuantizeLinear", x_TI, scale_T, zero_T, axis=0), nodes.op("Unsqueeze", scale_T, nodes.constant([1]))


def _scaled(nodes: Nodes, y_TO: ir.Value, unit: ir.Value, bias: ir.Value | None) -> ir.Value:
    scaled: ir.Value = nodes.op("Mul", y_TO, unit)
    return scaled if bias is None else nodes.op("Add", scaled, bias)


def _part_names(name: str, group: int) -> tuple[str, str, str, str]:
    return f"{name}.{group}", f"{name}.{group}.scale", f"{name}.{group}.zero", f"{name}.{group}.rest"


def _signed(codes: torch.Tensor) -> torch.Tensor:
    """Unsigned codes less 128, as int8: the same bytes with the top bit turned over. Integer units are fastest with signed weights."""
    return codes.bitwise_xor_(128).view(torch.int8)


def _cut(nodes: Nodes, digits: ir.Value, widths: tuple[int, ...]) -> tuple[ir.Value, ...]:
    if len(widths) == 1:
        return (digits,)
    return tuple(nodes.op("Split", digits, nodes.constant(list(widths)), axis=1, outputs=len(widths)))
