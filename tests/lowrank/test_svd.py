"""Truncated SVD against float64 LAPACK, over spectra from steep to perfectly flat."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.lowrank.svd import seed_of, squared_norm, truncated_svd

SPECTRA = ("gaussian", "signal + noise", "weak signal", "slow", "harmonic", "steep", "exponential", "flat", "rank 3", "one value")


def matrix(kind: str, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    side = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, side, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, side, generator=generator, dtype=torch.float64)).Q
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    i = torch.arange(1, side + 1, dtype=torch.float64)
    if kind == "gaussian":
        return noise.float()
    if kind in ("signal + noise", "weak signal"):
        signal = torch.randn(rows, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, columns, generator=generator, dtype=torch.float64)
        return (signal + noise * (0.3 if kind == "signal + noise" else 10.0)).float()
    if kind == "rank 3":
        i[3:] = torch.inf
    values = {
        "slow": i**-0.25,
        "harmonic": 1 / i,
        "steep": i**-2.0,
        "exponential": (-i / 30).exp(),
        "flat": torch.ones_like(i),
        "rank 3": 1 / i,
        "one value": 1.0 * (i == 1),
    }
    return ((u * values[kind]) @ v.T * 1e-3).float()


def relative_error(delta: torch.Tensor, approximation: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(delta.double() - approximation.double()) / torch.linalg.vector_norm(delta.double()))


def best_error(delta: torch.Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(delta.double()).square()
    return float((values[rank:].sum() / values.sum()).sqrt())


@pytest.mark.parametrize("shape", [(256, 401), (401, 256), (300, 300)])
@pytest.mark.parametrize("kind", SPECTRA)
def test_error_is_within_1e_4_of_the_optimum_and_the_stated_gap_covers_it(kind: str, shape: tuple[int, int]) -> None:
    delta = matrix(kind, *shape)
    for rank in (1, 3, 16, 48):
        found = truncated_svd(delta, rank, seed=7)
        reached, best = relative_error(delta, found.factors.b_OR.double() @ found.factors.a_RI.double()), best_error(delta, rank)
        assert reached - best < 1e-4, (rank, found.passes)
        assert reached**2 - found.gap / found.energy <= best**2 + 1e-6


@pytest.mark.parametrize("shape", [(5, 300), (300, 5), (17, 17), (1, 40), (40, 1), (1, 1)])
def test_small_sides_take_the_exact_route_and_reach_the_whole_matrix(shape: tuple[int, int]) -> None:
    delta = matrix("gaussian", *shape)
    found = truncated_svd(delta, min(shape), seed=0)
    assert found.exact and found.gap == 0.0
    torch.testing.assert_close(found.factors.dense(), delta, atol=2e-6, rtol=1e-5)


def test_exact_gives_the_whole_spectrum() -> None:
    delta = matrix("harmonic", 96, 130)
    found = truncated_svd(delta, 4, seed=0, exact=True)
    torch.testing.assert_close(found.spectrum, torch.linalg.svdvals(delta.double()), atol=1e-9, rtol=1e-6)


def test_singular_values_and_factors_are_balanced_and_sorted() -> None:
    found = truncated_svd(matrix("harmonic", 256, 300), 12, seed=0)
    values = found.factors.singular_values
    assert values is not None and bool((values.diff() <= 0).all())
    torch.testing.assert_close(found.factors.a_RI.double().square().sum(1), values, atol=0, rtol=1e-5)
    torch.testing.assert_close(found.factors.b_OR.double().square().sum(0), values, atol=0, rtol=1e-5)


def test_same_seed_gives_the_same_bytes() -> None:
    delta = matrix("weak signal", 256, 300)
    first, second = (truncated_svd(delta, 8, seed=3).factors for _ in range(2))
    assert torch.equal(first.a_RI, second.a_RI) and torch.equal(first.b_OR, second.b_OR)


def test_zero_matrix_gives_zero_factors() -> None:
    found = truncated_svd(torch.zeros(200, 210), 4, seed=0)
    assert found.energy == 0.0 and not found.factors.a_RI.any() and not found.factors.b_OR.any()


def test_rank_deficient_matrix_leaves_zero_error_and_finite_factors() -> None:
    delta = matrix("rank 3", 256, 300)
    found = truncated_svd(delta, 16, seed=0)
    assert bool(found.factors.a_RI.isfinite().all()) and relative_error(delta, found.factors.dense()) < 1e-6


def test_float64_input_stays_float64() -> None:
    delta = matrix("harmonic", 256, 300).double()
    found = truncated_svd(delta, 8, seed=0)
    assert found.factors.a_RI.dtype == torch.float64
    assert relative_error(delta, found.factors.dense()) - best_error(delta, 8) < 1e-4


def test_tiny_and_huge_scales_do_not_matter() -> None:
    delta = matrix("weak signal", 256, 300)
    errors = [relative_error(delta, truncated_svd(delta * scale, 8, seed=0).factors.dense() / scale) for scale in (1e-12, 1.0, 1e12)]
    assert max(errors) - min(errors) < 1e-5


def test_squared_norm_is_float64_across_rows_and_shows_non_finite_values() -> None:
    wide = torch.full((2000, 1500), 1e-3)
    assert squared_norm(wide) == pytest.approx(3.0, rel=1e-5)
    assert squared_norm(torch.zeros(0, 4)) == 0.0
    assert squared_norm(torch.tensor([[1.0, float("nan")]])) != squared_norm(torch.tensor([[1.0, float("nan")]]))
    assert squared_norm(torch.tensor([3.0, 4.0])) == pytest.approx(25.0)


def test_seed_depends_on_the_name_alone() -> None:
    assert (
        seed_of("model.layers.0.self_attn.q_proj.weight")
        == seed_of("model.layers.0.self_attn.q_proj.weight")
        != seed_of("model.layers.1.self_attn.q_proj.weight")
    )


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    delta = matrix("signal + noise", 512, 700)
    on_gpu = truncated_svd(delta.cuda(), 16, seed=0)
    assert on_gpu.factors.a_RI.is_cuda
    assert relative_error(delta, on_gpu.factors.dense().cpu()) - best_error(delta, 16) < 1e-4
