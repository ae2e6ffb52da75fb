"""Factored algebra against dense float64 references."""

from __future__ import annotations

import math

import pytest
import torch

from qlora_tools.lowrank.algebra import agreement, cut_error, decompose, distance, inner, norm
from qlora_tools.lowrank.factors import LowRank

SHAPES = [(7, 5, 2), (5, 9, 3), (4, 3, 6), (1, 8, 1), (33, 17, 4), (6, 6, 6)]


def term(outputs: int, inputs: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, inputs, generator=generator).to(dtype), torch.randn(outputs, rank, generator=generator).to(dtype))


def dense(x: LowRank) -> torch.Tensor:
    return x.b_OR.double() @ x.a_RI.double()


@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_those_of_the_dense_product(outputs: int, inputs: int, rank: int, dtype: torch.dtype) -> None:
    x = term(outputs, inputs, rank, dtype=dtype)
    found, expected = decompose(x), torch.linalg.svdvals(dense(x))
    torch.testing.assert_close(found.s_R, expected[: found.s_R.numel()], atol=1e-12, rtol=1e-12)
    assert float(expected[found.s_R.numel() :].sum()) < 1e-10
    torch.testing.assert_close(found.u_OR * found.s_R @ found.v_IR.T, dense(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
def test_inner_products_norms_and_distances_match_dense_ones(outputs: int, inputs: int, rank: int) -> None:
    x, y = term(outputs, inputs, rank), term(outputs, inputs, rank + 1, seed=1)
    assert inner(x, y) == pytest.approx(float((dense(x) * dense(y)).sum()), rel=1e-10, abs=1e-10)
    assert norm(x) == pytest.approx(float(dense(x).norm()), rel=1e-12)
    assert distance(x, y) == pytest.approx(float((dense(x) - dense(y)).norm()), rel=1e-12)


def test_the_distance_of_nearly_equal_factors_does_not_cancel() -> None:
    x = term(40, 30, 3)
    y = LowRank(x.a_RI, x.b_OR.double() * (1 + 1e-9))
    assert distance(x, y) == pytest.approx(1e-9 * norm(x), rel=1e-4)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), SHAPES)
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_cut_is_the_best_of_its_rank_and_its_error_is_the_measured_one(outputs: int, inputs: int, rank: int, kept: int) -> None:
    x = term(outputs, inputs, rank)
    found = decompose(x)
    cut = found.cut(kept)
    u, s, vh = torch.linalg.svd(dense(x), full_matrices=False)
    kept = cut.rank
    torch.testing.assert_close(dense(cut), u[:, :kept] * s[:kept] @ vh[:kept], atol=2e-6, rtol=1e-5)
    stored = cut.to(torch.bfloat16)
    error = cut_error(x, found, stored)
    assert error.optimum == pytest.approx(float(s[kept:].norm() / s.norm()), abs=1e-9)
    assert error.error == pytest.approx(float((dense(x) - dense(stored)).norm() / s.norm()), rel=1e-9)
    assert error.kept_energy == pytest.approx(1 - error.error**2)


def test_agreement_of_a_matrix_with_itself_its_negative_and_a_multiple() -> None:
    x = term(20, 15, 3)
    same = agreement(x, LowRank(x.a_RI, -2 * x.b_OR))
    assert (same.cosine, same.ratio) == (pytest.approx(-1.0), pytest.approx(2.0))
    assert (same.output_overlap, same.input_overlap) == (pytest.approx(1.0), pytest.approx(1.0)) and same.smallest_angle < 1e-4


def test_agreement_matches_dense_references() -> None:
    x, y = term(20, 15, 3), term(20, 15, 2, seed=1)
    found = agreement(x, y)
    qx, qy = torch.linalg.qr(x.b_OR.double()).Q, torch.linalg.qr(y.b_OR.double()).Q
    cosines = torch.linalg.svdvals(qx.T @ qy)
    assert found.cosine == pytest.approx(float((dense(x) * dense(y)).sum() / dense(x).norm() / dense(y).norm()), rel=1e-9)
    assert found.output_overlap == pytest.approx(float(cosines.square().mean()), rel=1e-9)
    assert found.smallest_angle == pytest.approx(math.degrees(math.acos(float(cosines[0]))), rel=1e-9)


def test_spans_that_share_nothing_have_no_overlap() -> None:
    eye = torch.eye(6)
    found = agreement(LowRank(eye[:2], eye[:, :2]), LowRank(eye[3:5], eye[:, 3:5]))
    assert (found.cosine, found.output_overlap, found.input_overlap, found.smallest_angle) == (0.0, 0.0, 0.0, 90.0)


def test_directions_without_weight_do_not_count_as_span() -> None:
    x, y = term(20, 15, 2), term(20, 15, 2, seed=1)
    padded = LowRank(torch.cat([x.a_RI, y.a_RI]), torch.cat([x.b_OR, 1e-9 * y.b_OR], dim=1))
    assert agreement(x, padded).output_overlap == pytest.approx(1.0) and decompose(padded).numerical_rank == 2


def test_a_zero_change_agrees_with_nothing() -> None:
    x = term(5, 4, 2)
    zero = LowRank(x.a_RI, 0 * x.b_OR)
    assert math.isnan(agreement(x, zero).cosine) and decompose(zero).numerical_rank == 0 and norm(zero) == 0.0
    assert cut_error(zero, decompose(zero), zero).error == 0.0
