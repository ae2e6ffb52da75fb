from __future__ import annotations

import math

import pytest
import torch

from qlora_tools.lowrank.certificate import certificate_of, certify, error_curve, noise_edge, noise_energy, residual_energy, total_of
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import truncated_svd


def weights(rows: int = 192, columns: int = 320, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * std


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_rounded_factors_in_float64(dtype: torch.dtype) -> None:
    delta = weights()
    found = truncated_svd(delta, 8, seed=0)
    stored = found.factors.to(dtype)
    certificate = certify(delta, found, stored)
    rest = delta.double() - stored.b_OR.double() @ stored.a_RI.double()
    assert certificate.error == pytest.approx(float(rest.norm() / delta.double().norm()), abs=1e-7)
    assert certificate.delta_norm == pytest.approx(float(delta.double().norm()), rel=1e-6)
    assert certificate.kept_energy == pytest.approx(1 - certificate.error**2)


@pytest.mark.parametrize("rank", [1, 8, 40, 192])
def test_optimum_is_never_above_what_lapack_says(rank: int) -> None:
    delta = weights()
    found = truncated_svd(delta, rank, seed=0)
    certificate = certify(delta, found, found.factors)
    values = torch.linalg.svdvals(delta.double()).square()
    best = float((values[rank:].sum() / values.sum()).sqrt())
    assert certificate.optimum <= best + 1e-6
    assert certificate.optimum > best - 2e-4
    if certificate.optimum_is_exact:
        assert certificate.optimum == pytest.approx(best, abs=1e-6)


def test_an_estimated_optimum_lies_below_the_true_one_by_less_than_its_gap() -> None:
    delta = weights(500, 700)
    found = truncated_svd(delta, 2, seed=0)
    certificate = certify(delta, found, found.factors)
    values = torch.linalg.svdvals(delta.double()).square()
    best = float((values[2:].sum() / values.sum()).sqrt())
    assert not certificate.optimum_is_exact and certificate.gap > 1e-6
    assert best - certificate.gap <= certificate.optimum < best <= certificate.error + 1e-7


def test_a_smaller_cut_has_its_own_error_and_optimum() -> None:
    delta = weights()
    found = truncated_svd(delta, 16, seed=0)
    cut = certify(delta, found, found.factors.cut(5))
    values = torch.linalg.svdvals(delta.double()).square()
    assert cut.rank == 5 and cut.error == pytest.approx(float((values[5:].sum() / values.sum()).sqrt()), abs=1e-4)
    assert cut.optimum <= cut.error


def test_errors_far_below_fp32_are_still_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = (torch.randn(200, 4, generator=generator) @ torch.randn(4, 220, generator=generator)) + 1e-6 * torch.randn(200, 220, generator=generator)
    found = truncated_svd(delta, 4, seed=0)
    certificate = certify(delta, found, found.factors)
    exact = float((delta.double() - found.factors.b_OR.double() @ found.factors.a_RI.double()).norm() / delta.double().norm())
    assert certificate.error == pytest.approx(exact, rel=1e-3)
    assert certificate.optimum <= certificate.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_curve_is_the_residual_of_every_cut(dtype: torch.dtype) -> None:
    delta = weights(300, 200)
    found = truncated_svd(delta, 24, seed=0)
    stored = found.factors.to(dtype)
    curve = error_curve(delta, stored)
    assert curve.numel() == 25
    for rank in (0, 1, 7, 24):
        cut = stored.cut(rank)
        expected = float((delta.double() - cut.b_OR.double() @ cut.a_RI.double()).square().sum())
        assert float(curve[rank]) == pytest.approx(expected, rel=1e-10)
        if rank:
            whole, from_curve = certify(delta, found, cut), certificate_of(found, rank, float(curve[rank]))
            assert from_curve.error == pytest.approx(whole.error, abs=1e-6) and from_curve.optimum == pytest.approx(whole.optimum, abs=1e-6)


def test_zero_delta_has_no_error() -> None:
    found = truncated_svd(torch.zeros(64, 64), 2, seed=0)
    certificate = certify(torch.zeros(64, 64), found, found.factors)
    assert certificate.error == certificate.optimum == certificate.delta_norm == 0.0 and certificate.kept_signal == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noise_energy_predicts_the_real_rounding_error(dtype: torch.dtype) -> None:
    ideal = weights(400, 500).double()
    stored = ideal.to(dtype)
    measured = float((stored.double() - ideal).square().sum())
    assert noise_energy(stored) == pytest.approx(measured, rel=0.03)


def test_noise_energy_by_hand() -> None:
    assert noise_energy(torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.bfloat16)) == pytest.approx((4.0**-7 + 4.0**-8) / 12)
    assert noise_energy(torch.tensor([[1]], dtype=torch.int8)) == 0.0


def test_noise_edge_bounds_white_noise() -> None:
    noise = weights(300, 500, std=1e-4)
    energy = float(noise.double().square().sum())
    largest = float(torch.linalg.matrix_norm(noise.double(), 2))
    assert largest == pytest.approx(noise_edge(energy, (300, 500)), rel=0.03)


def test_residual_energy_over_many_row_tiles() -> None:
    delta, factors = weights(3000, 400), LowRank(weights(3, 400), weights(3000, 3))
    expected = float((delta.double() - factors.b_OR.double() @ factors.a_RI.double()).square().sum())
    assert residual_energy(delta, factors) == pytest.approx(expected, rel=1e-5)
    assert residual_energy(delta, factors, wide=True) == pytest.approx(expected, rel=1e-12)


def test_totals_are_those_of_one_long_vector() -> None:
    deltas = [weights(seed=1), weights(seed=2) * 3]
    found = [truncated_svd(delta, 4, seed=0) for delta in deltas]
    certificates = [certify(delta, one, one.factors, weight_norm=2.0, noise=0.25) for delta, one in zip(deltas, found, strict=True)]
    total = total_of(certificates)
    assert total.delta_norm == pytest.approx(math.hypot(*(float(delta.double().norm()) for delta in deltas)))
    assert total.error == pytest.approx(math.hypot(*(c.error * c.delta_norm for c in certificates)) / total.delta_norm)
    assert total.weight_norm == pytest.approx(math.sqrt(8)) and total.noise_norm == pytest.approx(math.sqrt(0.5))
    assert total_of([]).error == 0.0
