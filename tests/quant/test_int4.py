"""Whole-number blocks as a codec."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.errors import UnsupportedError
from qlora_tools.quant.blockwise import Grid, dequantize_blocks, quantize_blocks
from qlora_tools.quant.int4 import Int4
from qlora_tools.specs import TensorSpec


@pytest.mark.parametrize("shape", [(5, 64), (3, 50), (1, 32)])
def test_what_it_decodes_to_is_what_the_exported_graph_multiplies_with(shape):
    codec, spec = Int4(), TensorSpec("x.weight", "F32", shape)
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parts = codec.encode(spec, dense)
    assert [(part.name, part.dtype, part.shape) for part in codec.part_specs(spec)] == [
        ("x.weight", "U8", tuple(parts["x.weight"].shape)),
        ("x.weight.scales", "F32", tuple(parts["x.weight.scales"].shape)),
    ]
    expected = dequantize_blocks(*quantize_blocks(dense, Grid(search=True)), Grid(search=True), shape[1])
    assert torch.equal(codec.decode(spec, parts), expected)
    assert torch.equal(codec.decode(spec, parts, (0, 1)), expected[:1])


def test_it_is_no_storage_format():
    with pytest.raises(UnsupportedError):
        Int4().describe()
    with pytest.raises(UnsupportedError, match="matrices"):
        Int4().encode(TensorSpec("x", "F32", (2, 2, 2)), torch.zeros(2, 2, 2))
