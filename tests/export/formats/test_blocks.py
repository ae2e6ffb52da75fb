"""Blocks in 16-bit graphs: scales in the graph's dtype, codes chosen under them, rows padded for CUDA's kernels."""

import numpy as np
import onnx
import pytest
import torch

from qlora_tools.errors import NonFiniteError
from qlora_tools.export.calibrated import Factors, encode_calibrated
from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.format import Moments
from qlora_tools.export.target import Target
from tests.export.formats_run import draw_format, run_format

F16 = Target("cuda", "F16")


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compute", ["F16", "BF16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_the_nearest_under_the_rounded_scale(bits, compute):
    form, w = Blocks(bits, compute=compute), gaussian(9, 96)
    parts = form.encode("w", w)
    assert parts["w.scale"].dtype == {"F16": torch.float16, "BF16": torch.bfloat16}[compute]
    carried = form.decode("w", parts, 96).double()
    scale = parts["w.scale"].double().repeat_interleave(32, 1)
    half = 1 << (bits - 1)
    grid = torch.arange(-half, half, dtype=torch.float64)
    best = (scale[..., None] * grid - w.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close((carried - w.double()).abs(), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_the_scales_costs_next_to_nothing(bits):
    w = gaussian(64, 256)
    errors = {
        compute: float((Blocks(bits, compute=compute).decode("w", Blocks(bits, compute=compute).encode("w", w), 256) - w).norm())
        for compute in ("F32", "F16", "BF16")
    }
    assert errors["F16"] < 1.005 * errors["F32"] and errors["BF16"] < 1.04 * errors["F32"]


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (33, 96), (7, 75), (1, 1)])
@pytest.mark.parametrize(("bits", "multiple"), [(4, 64), (8, 32)])
def test_a_padded_16_bit_product_is_that_of_the_decoded_weight(bits, multiple, rows, columns, tmp_path):
    form = Blocks(bits, compute="F16", multiple=multiple)
    x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float16)
    bias = np.arange(rows)
    found, carried = run_format(tmp_path, form, gaussian(rows, columns), x_TI=x, bias_O=bias, target=F16)
    expected = x.astype(np.float64) @ carried.numpy().astype(np.float64).T + bias
    assert found.shape == (5, rows) and found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=4e-3 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_padded_table_is_looked_up_in_16_bits(bits, tmp_path):
    ids = np.array([0, 32, 5, 5])
    found, carried = run_format(tmp_path, Blocks(bits, compute="F16", multiple=64), gaussian(33, 96), ids_T=ids, target=F16)
    np.testing.assert_allclose(found, carried.numpy()[ids], rtol=1e-3)


def test_nodes_for_cuda_have_the_shape_that_its_fast_kernels_take(tmp_path):
    draw_format(tmp_path, Blocks(4, compute="F16", multiple=64), gaussian(70, 128), bias_O=np.ones(70), target=F16)
    nodes = {node.op_type: node for node in onnx.load(tmp_path / "one.onnx").graph.node}
    assert list(nodes) == ["MatMulNBits", "Slice", "Add"]
    facts = {attribute.name: attribute.i for attribute in nodes["MatMulNBits"].attribute}
    assert facts == {"K": 128, "N": 128, "bits": 4, "block_size": 32, "accuracy_level": 0}
    assert len(nodes["MatMulNBits"].input) == 3  # no zero points, no g_idx, no bias


def test_whole_rows_are_neither_padded_nor_cut(tmp_path):
    form = Blocks(8, compute="F16", multiple=32)
    assert form.parts("w", 96, 64)[0].shape[0] == 96 and form.parts("w", 97, 64)[0].shape[0] == 128
    draw_format(tmp_path, form, gaussian(96, 64), target=F16)
    assert [node.op_type for node in onnx.load(tmp_path / "one.onnx").graph.node] == ["MatMulNBits"]


def test_what_does_not_fit_fp16_is_refused_and_fits_bf16():
    w = gaussian(4, 64)
    w[1, 5] = 7e4
    with pytest.raises(NonFiniteError, match="overflows in F16"):
        Blocks(4, compute="F16").encode("w", w)
    assert torch.isfinite(Blocks(4, compute="BF16").encode("w", w)["w.scale"]).all()


def test_zero_blocks_and_scales_below_fp16_are_zero_and_finite():
    w = torch.cat([torch.zeros(2, 32), gaussian(2, 32) * 1e-12])
    carried = Blocks(4, compute="F16").decode("w", Blocks(4, compute="F16").encode("w", w), 32)
    assert torch.equal(carried[:2], torch.zeros(2, 32)) and torch.isfinite(carried).all() and carried.abs().max() < 1e-6


@pytest.mark.parametrize("compute", ["F16", "BF16"])
def test_calibrated_codes_stay_on_scales_of_the_graphs_dtype(compute):
    form, w = Blocks(4, compute=compute), gaussian(16, 64)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    moments = x.T @ x / 200
    parts, choice = encode_calibrated(form, "w", "w", w, Moments(moments, moments, Factors().of("m", moments)))
    assert parts["w.scale"].dtype == form.encode("w", w)["w.scale"].dtype
    lost = w - form.decode("w", parts, 64)
    assert choice.error <= choice.plain_error
    np.testing.assert_allclose(choice.error, float((lost.double() @ moments.double() * lost.double()).sum()), rtol=1e-6)
