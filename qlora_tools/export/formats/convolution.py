"""int8 convolutions without calibration: patches of 8-bit activations times int8 weights, added up to floats.

The input is laid out channels last and rounded to 256 levels between its smallest and its largest value
(``DynamicQuantizeLinear``); each output position gathers the bytes under its kernel into a row, and
``MatMulIntegerToFloat`` multiplies the rows by the weight, scales the sums and adds the bias. The runtime moves the two
transpositions through ReLU, additions and pooling, where they meet those of the neighbours and cancel.

Chosen by measurement (``benchmarks/convolutions.py``). ONNX's own dynamic operator, ``ConvInteger``, is slower than the fp32
convolution, with signed weights several times; a ``DequantizeLinear`` before ``Conv`` only saves room; ``MatMulNBits`` on patches
is slower than fp32. ``QLinearConv`` is as fast as this, but rounds its output too and so wants ranges from a set of images.

All inputs of a call share one range, as everywhere in dynamic quantization: with outliers in a batch the others are rounded
coarser. On CPUs without 8-bit dot products two large activations times two large weights can saturate the 16-bit pair sum.
Not for depthwise and grouped convolutions, whose patches have no matrix to go through, nor for a handful of channels.

Legend: N batch, C input channels, S spatial axes, O output channels, K = kernel positions x C. Parts: ``name`` I8 [K, O],
``name.scale`` F32 [O], ``name.zero`` I8 [O]; w = scale * (code - zero), K in the order of channels last: channel fastest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir
import torch

from qlora_tools.export.nodes import Nodes
from qlora_tools.quant.affine import quantize_affine
from qlora_tools.specs import TensorSpec

#: Past the end of any axis, for ``Slice``.
_END = 1 << 31


@dataclass(frozen=True)
class Window:
    """How a kernel moves, one number per spatial axis. ``starts`` and ``ends`` are the padding before and behind."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    dilations: tuple[int, ...]

    @property
    def offsets(self) -> list[tuple[int, ...]]:
        """Where each position of the kernel lies in the padded input, the last axis fastest."""
        axes = ([step * dilation for step in range(size)] for size, dilation in zip(self.kernel, self.dilations, strict=True))
        return list(product(*axes))

    @property
    def reach(self) -> tuple[int, ...]:
        """The last position of the kernel on each axis."""
        return tuple((size - 1) * dilation for size, dilation in zip(self.kernel, self.dilations, strict=True))


@dataclass(frozen=True)
class Patches:
    """``MatMulIntegerToFloat`` on gathered bytes."""

    def parts(self, name: str, shape: Sequence[int]) -> tuple[TensorSpec, ...]:
        """Specs of what carries the kernel ``name`` of shape [O, C, *kernel]."""
        out, *rest = shape
        return TensorSpec(name, "I8", (int(np.prod(rest)), out)), TensorSpec(f"{name}.scale", "F32", (out,)), TensorSpec(f"{name}.zero", "I8", (out,))

    def encode(self, name: str, w_OCS: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a kernel in any float dtype. NaN or infinity in a row shows in its scale."""
        w_OK = w_OCS.movedim(1, -1).flatten(1).contiguous()
        grid = quantize_affine(w_OK, w_OK.shape[1])
        codes_OK, zero_O = (codes.bitwise_xor_(128).view(torch.int8) for codes in (grid.codes[:, 0], grid.zero[:, 0]))
        return {name: codes_OK.T.contiguous(), f"{name}.scale": grid.scale[:, 0].contiguous(), f"{name}.zero": zero_O.contiguous()}

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """The kernel that the graph multiplies with, fp32 [O, C, *kernel]."""
        codes_KO, scale_O, zero_O = (parts[f"{name}{part}"].to(torch.float32) for part in ("", ".scale", ".zero"))
        w_OK = ((codes_KO - zero_O) * scale_O).T
        return w_OK.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()

    def convolve(self, nodes: Nodes, x_NCS: ir.Value, name: str, window: Window, bias_O: ir.Value | None = None) -> ir.Value:
        """Nodes for the convolution of fp32 ``x_NCS`` with ``name``: [N, C, *S] -> [N, O, *S']."""
        rank = len(window.kernel)
        byte, step, zero = nodes.once("bytes, channels last", x_NCS, lambda: _bytes(nodes, x_NCS, rank))
        (rows,) = nodes.once(f"patches {window}", byte, lambda: (_gather(nodes, byte, zero, window),))
        weight, scale, weight_zero = (nodes.stored(f"{name}{part}") for part in ("", ".scale", ".zero"))
        if nodes.target.standard:
            y_NSO = _standard(nodes, rows, weight, step, scale, zero, weight_zero, bias_O)
        else:
            y_NSO = nodes.contrib("MatMulIntegerToFloat", rows, weight, step, scale, zero, weight_zero, bias_O)
        return nodes.op("Transpose", y_NSO, perm=[0, rank + 1, *range(1, rank + 1)])


def _standard(
    nodes: Nodes, rows: ir.Value, weight: ir.Value, step: ir.Value, scale: ir.Value, zero: ir.Value, weight_zero: ir.Value, bias_O: ir.Value | None
) -> ir.Value:
    """The same product in plain ONNX, in the shape that ONNX Runtime fuses into the one node."""
    sums = nodes.op("Cast", nodes.op("MatMulInteger", rows, weight, zero, weight_zero), to=int(ir.DataType.FLOAT))
    y_NSO: ir.Value = nodes.op("Mul", sums, nodes.op("Mul", step, scale))
    return y_NSO if bias_O is None else nodes.op("Add", y_NSO, bias_O)


def _bytes(nodes: Nodes, x_NCS: ir.Value, rank: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(uint8 [N, *S, C], step, zero point). Transposed while still floats: the runtime moves a transposition through float operators only."""
    last = nodes.op("Transpose", x_NCS, perm=[0, *range(2, rank + 2), 1])
    byte, step, zero = nodes.op("DynamicQuantizeLinear", last, outputs=3)
    return byte, step, zero


def _gather(nodes: Nodes, x_NSC: ir.Value, zero: ir.Value, window: Window) -> ir.Value:
    """uint8 [N, *S', K]: under every output position the bytes that its kernel covers. What is padded is the zero point."""
    rank = len(window.kernel)
    if any(window.starts) or any(window.ends):
        x_NSC = nodes.op("Pad", x_NSC, nodes.constant([0, *window.starts, 0, 0, *window.ends, 0]), zero)
    if len(window.offsets) == 1 and set(window.strides) == {1}:
        return x_NSC
    axes, strides = nodes.constant(np.arange(1, rank + 1)), nodes.constant(window.strides)
    taps = []
    for offset in window.offsets:
        stops = [place - reach if place < reach else _END for place, reach in zip(offset, window.reach, strict=True)]
        taps.append(nodes.op("Slice", x_NSC, nodes.constant(offset), nodes.constant(stops), axes, strides))
    return taps[0] if len(taps) == 1 else nodes.op("Concat", *taps, axis=rank + 1)
