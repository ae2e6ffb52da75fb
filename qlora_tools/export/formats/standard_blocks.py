"""Integer blocks in plain ONNX: ``DequantizeLinear`` along the inputs, then ``MatMul``.

ONNX Runtime fuses the pair into ``MatMulNBits`` on the CPU and on CUDA, if weights lie [inputs, outputs], the scale's axis is 0 and both are
constants with no second reader: any other arrangement dequantizes the matrix on every call. Other runtimes have their own patterns
for the same pair. Grid and scales are those of :mod:`.blocks` without zero points, so both forms carry the same values.

Parts: ``name`` the codes of [I, O], I8 or two to a byte along the flattened tensor (the even element in the low half), flat because no dtype of
checkpoints names 4-bit integers; ``name.scale`` [blocks, O] in ``compute``; w = scale * code. I is padded to whole blocks with 0, and so are the activations.

Because rows of the parts are inputs, a weight cannot be written in pieces of its outputs: ``by_rows`` is the format to encode rows in, :meth:`assemble`
turns the whole of them round, and memory follows the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.format import Moments
from qlora_tools.export.nodes import Nodes
from qlora_tools.specs import TensorSpec


@dataclass(frozen=True)
class StandardBlocks:
    """``bits`` 4 or 8; ``block`` inputs share a scale; ``compute`` F32 or F16."""

    bits: int
    block: int = 32
    compute: str = "F32"

    @property
    def by_rows(self) -> Blocks:
        """The same codes and scales, output by output."""
        return Blocks(self.bits, self.block, compute=self.compute)

    @property
    def carried(self) -> str:
        return f"int{self.bits}"

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        inputs = self.by_rows.count(columns) * self.block
        codes = TensorSpec(name, "I8", (inputs, rows)) if self.bits == 8 else TensorSpec(name, "U8", (-(-inputs * rows // 2),))
        return codes, TensorSpec(f"{name}.scale", self.compute, (inputs // self.block, rows))

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.assemble(name, self.by_rows.encode(name, w_OI))

    def candidates(self, name: str, w_OI: torch.Tensor, moments: Moments) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for label, parts in self.by_rows.candidates(name, w_OI, moments):
            yield label, self.assemble(name, parts)

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int, *, looked_up: bool = False) -> torch.Tensor:
        scale_BO = parts[f"{name}.scale"].to(torch.float32)
        codes = parts[name]
        if self.bits == 4:
            low, high = codes & 15, codes >> 4
            codes = torch.stack([low, high], -1).to(torch.int8)
            codes = torch.where(codes > 7, codes - 16, codes)
        codes_IO = codes.reshape(-1, scale_BO.shape[1])
        return (codes_IO.to(torch.float32) * scale_BO.repeat_interleave(self.block, 0)).T[:, :columns].contiguous()

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        codes, scale = self._stored(nodes, name, rows, columns)
        weight = nodes.op("DequantizeLinear", codes, scale, axis=0, block_size=self.block)
        padding = -columns % self.block
        if padding:
            (x_TI,) = nodes.once(f"padded by {padding}", x_TI, lambda: (nodes.op("Pad", x_TI, nodes.constant([0, 0, 0, padding])),))
        y = nodes.op("MatMul", x_TI, weight)
        return y if bias is None else nodes.op("Add", y, bias)

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        """Columns of codes and of scales, dequantized after the lookup and turned round. The same bytes under names of their own: with a second reader, the
        pair of a product that shares them would not fuse."""
        assert self.bits == 8, "ONNX looks no 4-bit values up"
        rows = nodes.shape(f"{name}.scale")[1]
        codes, scale = (nodes.op("Gather", part, ids_T, axis=1) for part in self._stored(nodes, name, rows, columns, "to look up"))
        found = nodes.op("Transpose", nodes.op("DequantizeLinear", codes, scale, axis=0, block_size=self.block), perm=[1, 0])
        if columns % self.block == 0:
            return found
        return nodes.op("Slice", found, nodes.constant([0]), nodes.constant([columns]), nodes.constant([1]))

    def _stored(self, nodes: Nodes, name: str, rows: int, columns: int, use: str = "") -> tuple[ir.Value, ir.Value]:
        inputs = self.by_rows.count(columns) * self.block
        kind = ir.DataType.INT8 if self.bits == 8 else ir.DataType.INT4
        return nodes.stored(name, (inputs, rows), kind, use), nodes.stored(f"{name}.scale", use=use)

    def assemble(self, name: str, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parts of :attr:`by_rows`, all rows of them, as parts of this format."""
        packed_OBJ, scale_OB = parts[name], parts[f"{name}.scale"]
        codes = packed_OBJ if self.bits == 8 else torch.stack([packed_OBJ & 15, packed_OBJ >> 4], -1)
        codes_IO = (codes.reshape(len(scale_OB), -1).to(torch.int16) - (1 << (self.bits - 1))).to(torch.int8).T.contiguous()
        return {name: codes_IO if self.bits == 8 else _paired(codes_IO), f"{name}.scale": scale_OB.T.contiguous()}


def _paired(codes: torch.Tensor) -> torch.Tensor:
    """Signed 4-bit codes, two to a byte in flat order."""
    flat = codes.reshape(-1).view(torch.uint8) & 15
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[::2] | (flat[1::2] << 4)
