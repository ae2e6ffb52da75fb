"""LLM.int8() weights in bitsandbytes' bytes: one scale per output row.

Format (Dettmers et al. 2022; bitsandbytes 0.50). Weights go through fp16 first, as bitsandbytes does. ``SCB[out]`` is the row's largest
magnitude, fp32; ``code = round(w * 127 / SCB)`` half to even, int8; ``w = code * SCB / 127``. ``SCB`` and ``weight_format`` (0: rows)
lie beside ``weight`` in the module, not under it. Splitting activations into int8 and outliers happens at inference, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from qlora_tools.errors import CorruptError, NonFiniteError, UnsupportedError
from qlora_tools.finite import refuse_non_finite
from qlora_tools.names import split_tensor
from qlora_tools.quant.floats import TILE_ELEMENTS, bit_patterns, in_threads, refuse_non_float, tiles
from qlora_tools.quant.kernels import quantize_rows
from qlora_tools.specs import TensorSpec

_FP16_MAX = 65504.0
_PER_CODE = 7.874015718698502e-3  # 1/127 as bitsandbytes writes it


@dataclass(frozen=True)
class Int8:
    """The codec. ``threads`` may work on one tensor (the engine already spreads tensors)."""

    threads: int = field(default=1, compare=False)
    name: ClassVar[str] = "int8"

    def part_specs(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The stored tensors of ``spec``, a matrix [out, in] named ``<module>.weight``."""
        module, leaf = split_tensor(spec.name)
        if leaf != "weight" or len(spec.shape) != 2 or not spec.numel:
            raise UnsupportedError(f"{spec}: int8 stores matrices named `<module>.weight`", hint="keep this tensor dense, or use nf4")
        return (TensorSpec(spec.name, "I8", spec.shape), TensorSpec(f"{module}.SCB", "F32", spec.shape[:1]), TensorSpec(f"{module}.weight_format", "U8", ()))

    def encode(self, spec: TensorSpec, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize ``dense`` [out, in], any float dtype.

        Raises:
            NonFiniteError: NaN or infinity, or a magnitude that fp16 cannot hold.
        """
        assert tuple(dense.shape) == spec.shape, f"{spec} was given {list(dense.shape)}"
        refuse_non_float(dense)  # before the cast to fp16 hides it
        weight, scales, layout = (part.name for part in self.part_specs(spec))
        codes = torch.empty(spec.shape, dtype=torch.int8)
        absmax = torch.empty(spec.shape[0], dtype=torch.float32)
        source = dense.detach().cpu()

        def quantize(low: int, high: int) -> None:
            for a, b in tiles(low, high, max(1, TILE_ELEMENTS // spec.shape[1])):
                bits, kind = bit_patterns(source[a:b].to(torch.float16))
                quantize_rows(bits, kind, np.float32(127), codes[a:b].numpy(), absmax[a:b].numpy())

        in_threads(quantize, spec.shape[0], 1, self.threads)
        if not bool(torch.isfinite(absmax).all()):
            refuse_non_finite(spec.name, source)
            raise NonFiniteError(
                f"{spec.name}: {int((source.abs() > _FP16_MAX).sum())} values are beyond fp16's largest, {_FP16_MAX:.0f}, and int8 goes through fp16",
                hint="quantize this model to nf4, which does not go through fp16, or leave this tensor dense",
            )
        return {weight: codes, scales: absmax, layout: torch.tensor(0, dtype=torch.uint8)}

    def decode(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The dense rows ``rows`` (half-open; ``None``: all) in ``spec``'s dtype: code * SCB * (1/127) in fp32, rounded once."""
        weight, scales, _ = (part.name for part in self.part_specs(spec))
        codes, absmax = parts[weight], parts[scales].float()
        if tuple(codes.shape) != spec.shape or absmax.shape != codes.shape[:1] or codes.dtype != torch.int8:
            raise CorruptError(f"{spec}: int8 codes are {codes.dtype} {list(codes.shape)} and SCB {list(absmax.shape)}")
        low, high = rows if rows is not None else (0, spec.shape[0])
        assert 0 <= low <= high <= spec.shape[0], f"rows {rows} of {spec}"
        out = torch.empty((high - low, spec.shape[1]), dtype=spec.torch_dtype, device=codes.device)
        for a, b in tiles(low, high, max(1, TILE_ELEMENTS // spec.shape[1])):
            out[a - low : b - low] = codes[a:b] * absmax[a:b].unsqueeze(1) * _PER_CODE
        return out

    def describe(self) -> dict[str, object]:
        """``quantization_config`` of config.json, so that transformers loads the parts."""
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}


def quantize_rows_plain(values_RC: torch.Tensor, limit: float = 127.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [R, C], absmax fp32 [R]) in plain torch: the rule that tests hold the kernel to."""
    values = values_RC.float()
    absmax = values.abs().amax(1)
    scale = (1 / absmax * limit).nan_to_num(0.0, posinf=0.0)
    return torch.round(values * scale.unsqueeze(1)).to(torch.int8), absmax
