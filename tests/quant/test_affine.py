"""The affine grid: by hand, against its plain twin and a float64 reference, and on values that try to break it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.quant.affine import REST_STEP, quantize_affine, quantize_affine_plain


def decoded(grid, columns):
    dense = (grid.codes.double() - grid.zero.double()[..., None]) * grid.scale.double()[..., None]
    looked_up = dense if grid.rest is None else dense + grid.rest.double() * (REST_STEP * grid.scale.double())[..., None]
    return dense.flatten(1)[:, :columns], looked_up.flatten(1)[:, :columns]


def test_levels_run_from_the_smallest_to_the_largest_value():
    grid = quantize_affine(torch.tensor([[-1.0, 0.0, 0.5, 1.55]]), 4)
    assert grid.scale.item() == pytest.approx(0.01) and grid.zero.item() == 100
    assert grid.codes.tolist() == [[[0, 100, 150, 255]]]


def test_one_sided_blocks_still_hold_zero():
    grid = quantize_affine(torch.tensor([[2.55, 0.01], [-2.55, -0.01]]), 2)
    assert grid.zero.flatten().tolist() == [0, 255] and grid.codes.flatten().tolist() == [255, 1, 0, 254]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "block"), [(3, 64, 32), (5, 75, 16), (1, 1, 32), (7, 200, 200), (2, 33, 64)])
def test_kernel_and_plain_rule_agree_bit_for_bit(dtype, rows, columns, block):
    w = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * 0.1).to(dtype)
    found, plain = quantize_affine(w, block, rest=True), quantize_affine_plain(w, block)
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale) and torch.equal(found.zero, plain.zero)
    assert torch.equal(found.rest, plain.rest)


def test_columns_are_a_window_on_the_tensor():
    w = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    window, cut = quantize_affine(w, 40, (30, 70)), quantize_affine(w[:, 30:70].contiguous(), 40)
    assert torch.equal(window.codes, cut.codes) and torch.equal(window.scale, cut.scale)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 90),
    block=st.sampled_from([16, 32, 90]),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e30]),
)
def test_rounding_is_within_half_a_step_and_the_rest_within_a_508th(rows, columns, block, seed, scale):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    grid = quantize_affine(w, block, rest=True)
    dense, looked_up = decoded(grid, columns)
    step = grid.scale.double().repeat_interleave(block, dim=1)[:, :columns]
    # Ends of the range may move by up to half a step, as zero itself is rounded to a level.
    assert bool(((dense - w.double()).abs() <= step * 1.001).all())
    inside = (dense - w.double()).abs() <= step * 0.5
    assert bool(((looked_up - w.double()).abs() <= step * (REST_STEP / 2 + 1e-4))[inside].all())


def test_zero_and_vanishing_blocks_decode_to_zero():
    for value in (0.0, 1e-40, -1e-41):
        dense, _ = decoded(quantize_affine(torch.full((2, 32), value), 32), 32)
        assert bool((dense.abs() <= 1e-36).all())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_show_in_the_scale_of_their_block_only(wrong, dtype):
    w = torch.ones(2, 64, dtype=dtype)
    w[1, 40] = wrong
    assert torch.isfinite(quantize_affine(w, 32).scale).tolist() == [[True, True], [True, False]]
