"""NF4 as it is: ``MatMulBnb4``, whose packed bytes are those of a bitsandbytes checkpoint.

CUDA has the operator in fp16 and bf16, with a kernel for single tokens; several tokens at once dequantize the whole matrix first, so
this is the format for carrying a checkpoint's very codes and not for speed. The operator knows no double quantization: scales are
restored and stored in the dtype the graph computes in. There is no lookup, so tables are carried in another format.

Parts: ``name`` U8 [O, I / 2] (the even element in the high half), ``name.absmax`` [O, I / 64] in ``compute``; w = level * absmax. Rows are
whole blocks: I must be a multiple of 64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qlora_tools.errors import NonFiniteError
from qlora_tools.export.formats.format import Moments
from qlora_tools.export.nodes import Nodes
from qlora_tools.quant.codec import Stored
from qlora_tools.quant.gptq import TableGrid, sweep
from qlora_tools.quant.kernels import NF4_LEVELS
from qlora_tools.quant.nf4 import NF4, dequantize_blocks, pack_codes, quantize_blocks
from qlora_tools.specs import TensorSpec, dtype

BLOCK = 64
_NF4_LEVELS = 1  # the operator's quant_type; 0 is FP4


@dataclass(frozen=True)
class NormalFloats:
    """``compute`` is the dtype of activations and scales."""

    compute: str = "F16"

    @staticmethod
    def fits(columns: int) -> bool:
        """Whether blocks of 64 do not straddle rows of so many columns."""
        return columns % BLOCK == 0

    @property
    def carried(self) -> str:
        return "nf4"

    def parts(self, name: str, rows: int, columns: int) -> tuple[TensorSpec, ...]:
        assert self.fits(columns), f"{name}: {columns} columns are not whole blocks"
        return TensorSpec(name, "U8", (rows, columns // 2)), TensorSpec(f"{name}.absmax", self.compute, (rows, columns // BLOCK))

    def encode(self, name: str, w_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, absmax = quantize_blocks(w_OI.contiguous(), BLOCK)
        return self._parts(name, packed, absmax, len(w_OI))

    def adopts(self, stored: Stored, rows: int, columns: int) -> bool:
        """Whether the parts of a checkpoint's tensor can be taken over as they are."""
        return isinstance(stored.codec, NF4) and stored.codec.block_size == BLOCK and stored.spec.shape == (rows, columns) and self.fits(columns)

    def adopt(self, name: str, stored: Stored, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint's own codes, and its scales with double quantization undone."""
        assert isinstance(stored.codec, NF4)
        packed, absmax = stored.codec.blocks(stored.spec, parts)
        return self._parts(name, packed, absmax, stored.spec.shape[0])

    def candidates(self, name: str, w_OI: torch.Tensor, moments: Moments) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        plain = self.encode(name, w_OI)
        yield "plain", plain
        scale_OI = plain[f"{name}.absmax"].float().repeat_interleave(BLOCK, 1)
        codes_OI = sweep(w_OI, moments.feedback, TableGrid(torch.from_numpy(NF4_LEVELS.copy()), scale_OI))
        yield "feedback", plain | {name: pack_codes(codes_OI.reshape(-1)).view(len(w_OI), -1)}

    def decode(self, name: str, parts: Mapping[str, torch.Tensor], columns: int, *, looked_up: bool = False) -> torch.Tensor:
        assert not looked_up, "MatMulBnb4 has no lookup"
        rows = len(parts[name])
        out = torch.empty(rows * columns, dtype=torch.float32)
        dequantize_blocks(parts[name].reshape(-1), parts[f"{name}.absmax"].float().reshape(-1), BLOCK, 0, len(out), out)
        return out.view(rows, columns)

    def multiply(self, nodes: Nodes, x_TI: ir.Value, name: str, rows: int, columns: int, bias: ir.Value | None = None) -> ir.Value:
        """Codes and scales are named again as the flat tensors that the operator wants; their bytes are the same."""
        weight = nodes.stored(name, (rows * columns // 2,)), nodes.stored(f"{name}.absmax", (rows * columns // BLOCK,))
        y = nodes.contrib("MatMulBnb4", x_TI, *weight, K=columns, N=rows, block_size=BLOCK, quant_type=_NF4_LEVELS)
        return y if bias is None else nodes.op("Add", y, bias)

    def gather(self, nodes: Nodes, ids_T: ir.Value, name: str, columns: int) -> ir.Value:
        raise AssertionError("MatMulBnb4 has no lookup")

    def _parts(self, name: str, packed: torch.Tensor, absmax: torch.Tensor, rows: int) -> dict[str, torch.Tensor]:
        kind = dtype(self.compute).torch
        if float(absmax.abs().max()) > torch.finfo(kind).max:  # and where it is NaN, the part itself shows it
            raise NonFiniteError(f"`{name}` overflows in {self.compute}", hint="export it in bf16")
        return {name: packed.view(rows, -1), f"{name}.absmax": absmax.to(kind).view(rows, -1)}
