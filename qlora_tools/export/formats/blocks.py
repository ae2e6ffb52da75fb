"""4- and 8-bit codes with one scale per block of consecutive inputs: ``MatMulNBits`` and ``GatherBlockQuantized``.

Accuracy level 4 (activations in int8 per block) is always asked for: at the operator's default the CPU has no
kernel for 8 bits and dequantizes the whole matrix on every call.

Parts: ``name`` U8 [O, blocks, bytes per block] (4 bits: the even input in the low half), ``name.scale`` F32
[O, blocks]; w = scale * (code - 2**(bits-1)). Inputs beyond the last whole block are padded with the code for 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qlora_tools.export.nodes import Nodes
from qlora_tools.specs import TensorSpec

_ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Blocks:
    """``bits`` is 4 or 8; ``block`` a power of two from 16."""

    bits: int
    block: int = 32
    compute: str = "F32"

    def count(self, columns: int) -> int:
        return -(-columns // self.block)

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        blocks = self.count(columns)
        return TensorSpec(name, "U8", (rows, blocks, self.block * self.bits // 8)), TensorSpec(f"{name}.scale", self.compute, (rows, blocks))

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = w_OI.shape
        blocks = self.count(columns)
        padded = torch.nn.functional.pad(w_OI, (0, blocks * self.block - columns)).reshape(rows, blocks, self.block)
        half = 1 << (self.bits - 1)
        low, high = padded.amin(-1), padded.amax(-1)
        extreme = torch.where(high > -low, high, low)
        scale = extreme / (-half if self.bits == 4 else half - 1)
        scale = torch.where(scale != 0, scale, torch.ones_like(scale))
        codes = (padded / scale[..., None]).round_().add_(half).clamp_(0, 2 * half - 1).to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return {name: codes, f"{name}.scale": scale}

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        codes = parts[name]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        dense = (codes.to(torch.float32) - (1 << (self.bits - 1))) * parts[f"{name}.scale"].to(torch.float32)[..., None]
        return dense.flatten(1)[:, :columns]

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        weight = (nodes.stored(name), nodes.stored(f"{name}.scale"))
        options = {"K": columns, "N": rows, "bits": self.bits, "block_size": self.block, "accuracy_level": _ACCURACY_LEVEL}
        return nodes.contrib("MatMulNBits", x_TI, *weight, None, None, bias, **options)

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        """The scales are named a second time with a third axis, which this operator wants; their bytes are the same."""
        rows, blocks = nodes.shape(f"{name}.scale")
        scale = nodes.stored(f"{name}.scale", (rows, blocks, 1))
        options = {"bits": self.bits, "block_size": self.block, "gather_axis": 0, "quantize_axis": 2}
        found = nodes.contrib("GatherBlockQuantized", nodes.stored(name), ids_T, scale, **options)
        flat = nodes.op("Reshape", found, nodes.constant([-1, blocks * self.block]))
        return flat if columns == blocks * self.block else nodes.op("Slice", flat, nodes.constant([0]), nodes.constant([columns]), nodes.constant([1]))
