"""Error feedback against a float64 GPTQ written column by column, as its authors state it. Axes as in qlora_tools/quant/gptq.py."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.errors import NonFiniteError
from qlora_tools.quant import gptq
from qlora_tools.quant.gptq import StepGrid, TableGrid, descend, descend_block_plain, feedback, output_error, sweep, sweep_block_plain
from qlora_tools.quant.kernels import NF4_LEVELS


def moments(inputs: int, seed: int = 0, tokens: int | None = None, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """Second moments of correlated inputs whose scales span a decade and a half."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x_NI = torch.randn(tokens or 8 * inputs, inputs, generator=generator, dtype=torch.float64) @ mix
    x_NI = x_NI * torch.logspace(0, -1.5, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=generator)]
    x_NI[:, list(dead)] = 0
    return (x_NI.T @ x_NI / len(x_NI)).float()


def weight(outputs: int, inputs: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def table(w_OI: torch.Tensor, seed: int = 2) -> TableGrid:
    """NF4's levels with a scale of its own for every run of 16 inputs, some of them negative."""
    signs = torch.randint(0, 2, (len(w_OI), -(-w_OI.shape[1] // 16)), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    absmax = torch.stack([part.abs().amax(1) for part in w_OI.split(16, 1)], 1)
    return TableGrid(torch.from_numpy(NF4_LEVELS.copy()), (signs * absmax).repeat_interleave(16, 1)[:, : w_OI.shape[1]])


def steps(w_OI: torch.Tensor) -> StepGrid:
    """Four bits per row, as views that take no memory."""
    scale_O1 = w_OI.abs().amax(1, keepdim=True) / 7
    return StepGrid(0, 15, scale_O1.expand(w_OI.shape), torch.tensor(8.0).expand(w_OI.shape))


def nearest(w_OI: torch.Tensor, grid: TableGrid | StepGrid) -> torch.Tensor:
    """Plain rounding: the code of the nearest value of every element."""
    highest = len(grid.levels_K) if isinstance(grid, TableGrid) else grid.highest + 1
    all_codes = torch.arange(highest, dtype=torch.uint8)[:, None, None].expand(-1, *w_OI.shape)
    distance = torch.stack([(w_OI.double() - grid.values(codes).double()).abs() for codes in all_codes])
    return distance.argmin(0).to(torch.uint8)


def textbook_gptq(w_OI: torch.Tensor, r_II: torch.Tensor, grid: TableGrid | StepGrid, damp: float, act_order: bool) -> torch.Tensor:
    """Frantar et al. 2022, algorithm 1 without its blocks, in float64: columns left to right, the inverse's Cholesky factor, updates of all that follows."""
    h_II = r_II.double().clone()
    dead_I = h_II.diagonal() == 0
    h_II.diagonal().add_(damp * h_II.diagonal()[~dead_I].mean())
    h_II[dead_I, dead_I] = 1
    order = torch.argsort(r_II.diagonal().double(), descending=True, stable=True) if act_order else torch.arange(len(h_II))
    upper = torch.linalg.cholesky(torch.linalg.inv(h_II[order][:, order]), upper=True)
    work, codes = w_OI.double()[:, order].clone(), torch.zeros(w_OI.shape, dtype=torch.uint8)
    for position, column in enumerate(order.tolist()):
        one = slice(column, column + 1)
        part = type(grid)(grid.levels_K, grid.scale_OI[:, one]) if isinstance(grid, TableGrid) else type(grid)(grid.lowest, grid.highest, *_columns(grid, one))
        codes[:, one] = nearest(work[:, position : position + 1], part)
        error = (work[:, position] - part.values(codes[:, one])[:, 0].double()) / upper[position, position]
        work[:, position + 1 :] -= error[:, None] * upper[position, position + 1 :]
    return codes


def _columns(grid: StepGrid, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    return grid.scale_OI[:, columns], grid.zero_OI[:, columns]


@pytest.mark.parametrize("make", [table, steps])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("outputs", "inputs", "block"), [(5, 7, 128), (33, 48, 16), (20, 65, 64), (1, 1, 1), (3, 130, 128)])
def test_codes_are_those_of_a_textbook_float64_gptq(make, act_order, outputs, inputs, block):
    w_OI, r_II = weight(outputs, inputs), moments(inputs)
    grid = make(w_OI)
    assert torch.equal(sweep(w_OI, r_II, grid, act_order=act_order, block=block), textbook_gptq(w_OI, r_II, grid, 0.01, act_order))


def test_many_rows_follow_the_textbook_but_where_fp32_falls_on_the_other_side_of_a_bound():
    w_OI, r_II = weight(200, 150), moments(150)
    grid = table(w_OI)
    codes, expected = sweep(w_OI, r_II, grid, block=64), textbook_gptq(w_OI, r_II, grid, 0.01, True)
    assert (codes != expected).any(1).float().mean() <= 0.02
    assert output_error(w_OI - grid.values(codes), r_II) == pytest.approx(output_error(w_OI - grid.values(expected), r_II), rel=2e-3)


def test_feedback_agrees_with_the_inverse_factor_to_1e_6():
    r_II = moments(90)
    factored = feedback(r_II, damp=0.02)
    order, u_JJ = factored.order_J, factored.u_JJ
    h_II = r_II.double() + 0.02 * r_II.double().diagonal().mean() * torch.eye(90, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(h_II[order][:, order]), upper=True)
    unit = inverse / inverse.diagonal()[:, None]
    expected = torch.linalg.inv(unit)
    torch.testing.assert_close(u_JJ.double() + torch.eye(90, dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [table, steps])
def test_output_error_falls_well_below_plain_rounding(make):
    w_OI, r_II = weight(96, 128), moments(128)
    grid = make(w_OI)
    plain, swept = (output_error(w_OI - grid.values(codes), r_II) for codes in (nearest(w_OI, grid), sweep(w_OI, r_II, grid)))
    assert swept < 0.6 * plain


def textbook_descent(w_OI: torch.Tensor, codes_OI: torch.Tensor, r_II: torch.Tensor, grid: TableGrid | StepGrid, sweeps: int) -> torch.Tensor:
    """Cyclic coordinate descent in float64, column by column in falling order of the diagonal."""
    r_II = r_II.double() + 0.01 * r_II.double().diagonal().mean() * torch.eye(len(r_II), dtype=torch.float64)
    codes_OI = codes_OI.clone()
    for _ in range(sweeps):
        for column in torch.argsort(r_II.diagonal(), descending=True, stable=True).tolist():
            one = slice(column, column + 1)
            part = (
                type(grid)(grid.levels_K, grid.scale_OI[:, one]) if isinstance(grid, TableGrid) else type(grid)(grid.lowest, grid.highest, *_columns(grid, one))
            )
            values_OI = grid.values(codes_OI).double()
            wanted = values_OI[:, one] + ((w_OI.double() - values_OI) @ r_II[:, one]) / r_II[column, column]
            codes_OI[:, one] = nearest(wanted, part)
    return codes_OI


@pytest.mark.parametrize("make", [table, steps])
@pytest.mark.parametrize(("outputs", "inputs", "block"), [(5, 7, 128), (33, 48, 16), (3, 130, 128), (1, 1, 1)])
def test_descent_follows_a_textbook_float64_coordinate_descent(make, outputs, inputs, block):
    w_OI, r_II = weight(outputs, inputs), moments(inputs)
    grid = make(w_OI)
    codes = nearest(w_OI, grid)
    assert torch.equal(descend(w_OI, codes, r_II, grid, block=block), textbook_descent(w_OI, codes, r_II, grid, 2))


@pytest.mark.parametrize("make", [table, steps])
def test_descent_after_the_sweep_lowers_the_error_with_every_round(make):
    w_OI, r_II = weight(70, 128), moments(128)
    grid = make(w_OI)
    codes = sweep(w_OI, r_II, grid)
    errors = [output_error(w_OI - grid.values(descend(w_OI, codes, r_II, grid, sweeps=sweeps, damp=0)), r_II) for sweeps in range(4)]
    assert errors[0] == output_error(w_OI - grid.values(codes), r_II)
    assert errors[1] < 0.99 * errors[0] and all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))


def test_descent_leaves_weights_of_silent_inputs_alone():
    w_OI = weight(8, 20)
    grid = table(w_OI)
    codes = nearest(w_OI, grid)
    assert torch.equal(descend(w_OI, codes, torch.zeros(20, 20), grid), codes)


def test_output_error_is_the_trace_of_a_float64_reference():
    difference, r_II = weight(700, 30), moments(30)
    expected = float(torch.trace(difference.double() @ r_II.double() @ difference.double().T))
    assert output_error(difference, r_II) == pytest.approx(expected, rel=1e-7)
    assert output_error(difference.bfloat16(), r_II) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("make", [table, steps])
def test_uncorrelated_inputs_are_rounded_to_nearest(make):
    w_OI = weight(20, 33)
    grid = make(w_OI)
    codes = sweep(w_OI, torch.diag(torch.rand(33) + 0.1), grid)
    torch.testing.assert_close((w_OI - grid.values(codes)).abs(), (w_OI - grid.values(nearest(w_OI, grid))).abs())


def test_factored_moments_serve_several_sweeps():
    w_OI, r_II = weight(12, 40), moments(40)
    factored = feedback(r_II, damp=0.05, act_order=False)
    for grid in (table(w_OI), steps(w_OI)):
        assert torch.equal(sweep(w_OI, factored, grid), sweep(w_OI, r_II, grid, damp=0.05, act_order=False))


def test_dead_inputs_are_rounded_to_nearest_and_disturb_nothing():
    w_OI, dead = weight(12, 40), (0, 17, 39)
    alive = [column for column in range(40) if column not in dead]
    grid, r_II = steps(w_OI), moments(40, dead=dead)
    codes = sweep(w_OI, r_II, grid)
    assert torch.equal(codes[:, list(dead)], nearest(w_OI, grid)[:, list(dead)])
    part = StepGrid(0, 15, grid.scale_OI[:, alive], grid.zero_OI[:, alive])
    assert torch.equal(codes[:, alive], sweep(w_OI[:, alive], r_II[alive][:, alive], part))
    assert torch.equal(sweep(w_OI, torch.zeros(40, 40), grid), nearest(w_OI, grid))


@pytest.mark.parametrize("damp", [0.01, 1e-9, 0.0])
def test_fewer_tokens_than_inputs_still_lower_the_error(damp):
    w_OI, r_II = weight(40, 96), moments(96, tokens=30)
    grid = table(w_OI)
    codes = sweep(w_OI, r_II, grid, damp=damp)
    assert output_error(w_OI - grid.values(codes), r_II) < 0.5 * output_error(w_OI - grid.values(nearest(w_OI, grid)), r_II)


def test_moments_that_are_not_positive_definite_take_the_eigenvalue_way():
    r_II = moments(50)
    r_II -= 1.001 * torch.linalg.eigvalsh(r_II)[0] * torch.eye(50) + 1e-4 * torch.eye(50)
    assert torch.isfinite(feedback(r_II, damp=0.0).u_JJ).all()
    codes = sweep(weight(9, 50), r_II, table(weight(9, 50)), damp=0.0)
    assert int(codes.max()) <= 15


def test_scales_of_zero_store_zeros_and_pass_the_error_on():
    w_OI, r_II = weight(8, 20), moments(20)
    grid = table(w_OI)
    grid.scale_OI[:, 3:6] = 0
    codes = sweep(w_OI, r_II, grid)
    assert (grid.values(codes)[:, 3:6] == 0).all()
    assert output_error(w_OI - grid.values(codes), r_II) <= output_error(w_OI - grid.values(nearest(w_OI, grid)), r_II)


def test_moments_with_nan_are_refused():
    r_II = moments(10)
    r_II[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="moments"):
        sweep(weight(3, 10), r_II, steps(weight(3, 10)))


@given(st.integers(1, 150), st.integers(1, 90), st.sampled_from([1, 16, 128]), st.booleans(), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_kernel_and_plain_twin_agree_for_any_shape_block_and_thread_count(outputs, inputs, block, tabled, threads):
    w_OI, r_II = weight(outputs, inputs, outputs), moments(inputs, inputs)
    grid = table(w_OI) if tabled else steps(w_OI)
    codes = sweep(w_OI, r_II, grid, block=block, threads=threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "_sweep_block", sweep_block_plain)
        plain = sweep(w_OI, r_II, grid, block=block)
        patch.setattr(gptq, "_descend_block", descend_block_plain)
        plain_better = descend(w_OI, codes, r_II, grid, block=block)
    assert (codes != plain).float().mean() <= 0.002  # a value within rounding of a bound may fall on either side
    assert (descend(w_OI, codes, r_II, grid, block=block, threads=threads) != plain_better).float().mean() <= 0.002


def test_result_depends_neither_on_tiles_nor_on_dtype(monkeypatch):
    w_OI, r_II = weight(130, 64).bfloat16(), moments(64)
    grid = table(w_OI.float())
    whole = sweep(w_OI, r_II, grid)
    assert torch.equal(whole, sweep(w_OI.double(), r_II.double(), grid))
    monkeypatch.setattr(gptq, "_TILE_ROWS", 64)
    assert (whole != sweep(w_OI, r_II, grid)).float().mean() <= 0.002


def test_steps_round_half_to_even_like_numpy():
    values = torch.tensor([[0.5, 1.5, 2.5, -0.5, 30.0, -30.0]])
    grid = StepGrid(0, 15, torch.ones(1, 6), torch.full((1, 6), 8.0))
    codes = sweep(values, torch.eye(6), grid, damp=0.0)
    assert codes[0].tolist() == np.clip(np.round(values[0].numpy()) + 8, 0, 15).astype(int).tolist()
