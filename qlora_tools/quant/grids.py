"""What the codes of the stored formats mean, element by element: the grids that error feedback rounds onto.

Axes: O outputs, I inputs, B blocks.
"""

from __future__ import annotations

import torch

from qlora_tools.quant.gptq import StepGrid, TableGrid
from qlora_tools.quant.kernels import NF4_LEVELS

#: Largest magnitude of an int8 code.
INT8_LIMIT = 127
_ZERO = 128  # int8 codes are kept as uint8 while they are chosen


def nf4_grid(scale_B: torch.Tensor, block_size: int, shape: tuple[int, ...]) -> TableGrid:
    """NF4 under decoded fp32 scales, one for every ``block_size`` values of the flattened weight, wherever its rows end; ``shape``: [O, I]."""
    count = shape[0] * shape[1]
    levels_K = torch.from_numpy(NF4_LEVELS.copy()).to(scale_B.device)
    return TableGrid(levels_K, scale_B.repeat_interleave(block_size)[:count].view(shape))


def int8_grid(largest_O: torch.Tensor, shape: tuple[int, ...]) -> StepGrid:
    """LLM.int8() rows: the magnitude ``largest_O`` (any float) of a row is its code 127; ``shape``: [O, I]."""
    scale_O1 = (largest_O.float() / INT8_LIMIT).unsqueeze(1)
    zero = torch.full((1, 1), float(_ZERO), device=scale_O1.device)
    return StepGrid(_ZERO - INT8_LIMIT, _ZERO + INT8_LIMIT, scale_O1.expand(shape), zero.expand(shape))


def signed(codes_OI: torch.Tensor) -> torch.Tensor:
    """Codes of :func:`int8_grid` (uint8) as they are stored: int8 around 0."""
    return (codes_OI.to(torch.int16) - _ZERO).to(torch.int8)
