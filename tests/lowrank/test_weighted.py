"""Weighted approximation against float64 references with other square roots, and what it does where moments lack rank."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.lowrank.certificate import certify
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import truncated_svd
from qlora_tools.lowrank.weighted import Metric, eigen_root, square_root, weighted_svd


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(side: int, seed: int, tokens: int = 4000) -> torch.Tensor:
    """Of correlated inputs with a few loud channels, in fp32 as they are stored."""
    x = matrix(tokens, side, seed) @ (torch.eye(side, dtype=torch.float64) + 0.3 * matrix(side, side, seed + 1) / side**0.5)
    x[:, ::7] *= 8
    return (x.T @ x / tokens).float()


def reference(m: torch.Tensor, p: torch.Tensor | None, g: torch.Tensor | None, rank: int) -> torch.Tensor:
    """The optimum through symmetric roots, in float64."""

    def root(moment: torch.Tensor | None, side: int) -> torch.Tensor:
        if moment is None:
            return torch.eye(side, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(moment.double())
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    left, right = root(g, m.shape[0]), root(p, m.shape[1])
    u, s, vh = torch.linalg.svd(left @ m @ right, full_matrices=False)
    return torch.linalg.solve(left, (u[:, :rank] * s[:rank]) @ vh[:rank]) @ torch.linalg.inv(right)


def weighted_norm(m: torch.Tensor, p: torch.Tensor | None, g: torch.Tensor | None) -> float:
    left = m if g is None else g.double() @ m
    right = m if p is None else m @ p.double()
    return float((left * right).sum()) ** 0.5


@pytest.mark.parametrize("shape", [(33, 20), (20, 33), (150, 131)])
@pytest.mark.parametrize("sided", ["input", "output", "both"])
def test_product_and_error_are_those_of_the_float64_reference(shape: tuple[int, int], sided: str) -> None:
    m = matrix(*shape)
    p = moments(shape[1], 3) if sided != "output" else None
    g = moments(shape[0], 4) if sided != "input" else None
    metric = Metric(square_root(p) if p is not None else None, square_root(g) if g is not None else None)
    for rank in (1, 5, 12):
        found = weighted_svd(m, metric, rank, seed=1).factors
        product, best = found.b_OR.double() @ found.a_RI.double(), reference(m, p, g, rank)
        optimum = weighted_norm(m - best, p, g)
        assert weighted_norm(m - product, p, g) <= optimum * (1 + 1e-6)
        exact = weighted_svd(m, metric, rank, seed=1, exact=True).factors
        assert torch.linalg.norm(exact.b_OR.double() @ exact.a_RI.double() - best) <= 1e-6 * torch.linalg.norm(best)


def test_any_square_root_gives_the_same_product() -> None:
    m, p, g = matrix(40, 48), moments(48, 5), moments(40, 6)
    by_cholesky = weighted_svd(m, Metric(square_root(p), square_root(g)), 6, seed=0, exact=True).factors
    by_vectors = weighted_svd(m, Metric(eigen_root(p), eigen_root(g)), 6, seed=0, exact=True).factors
    assert square_root(p).scale_K is None and eigen_root(p).scale_K is not None
    assert torch.linalg.norm(by_cholesky.dense() - by_vectors.dense()) <= 1e-6 * by_vectors.dense().norm()


def test_without_moments_it_is_the_plain_svd() -> None:
    m = matrix(30, 24)
    assert torch.allclose(weighted_svd(m, Metric(), 5, seed=0).factors.dense(), truncated_svd(m, 5, seed=0, exact=True).factors.dense().float(), atol=1e-5)


@pytest.mark.parametrize("root", [square_root, eigen_root])
def test_a_root_times_itself_is_the_moments_and_undo_undoes(root) -> None:
    p = moments(31, 8)
    found = root(p)
    assert torch.allclose(found.root_NK @ found.root_NK.T, p.double(), rtol=0, atol=1e-6 * float(p.max()))
    y = matrix(4, 31)
    assert torch.allclose(found.undo(y @ found.root_NK), y, atol=1e-6)


def test_dead_inputs_get_no_column_and_cost_nothing() -> None:
    p = moments(24, 9)
    p[[3, 17]] = 0
    p[:, [3, 17]] = 0
    m = matrix(20, 24)
    m[:, 3] = 1e6
    found = weighted_svd(m, Metric(square_root(p)), 4, seed=0).factors
    assert not found.a_RI[:, [3, 17]].any() and found.a_RI[:, :3].any() and bool(torch.isfinite(found.b_OR).all())
    alive = [column for column in range(24) if column not in (3, 17)]
    rest = weighted_svd(m[:, alive], Metric(square_root(p[alive][:, alive])), 4, seed=0).factors
    assert torch.allclose(found.dense()[:, alive], rest.dense(), atol=1e-4)


def test_fewer_tokens_than_inputs_leave_unseen_directions_alone() -> None:
    x = matrix(10, 24, 2)
    p = (x.T @ x / 10).float()
    m = matrix(16, 24)
    root = square_root(p)
    assert root.scale_K is not None and root.root_NK.shape == (24, 10)
    found = weighted_svd(m, Metric(root), 4, seed=0).factors.dense().double()
    unseen = torch.linalg.qr(x.T, mode="complete").Q[:, 10:]
    assert torch.linalg.norm(found @ unseen) <= 1e-5 * torch.linalg.norm(found)
    u, s, vh = torch.linalg.svd(x @ m.T, full_matrices=False)
    assert torch.allclose(x @ found.T, (u[:, :4] * s[:4]) @ vh[:4], atol=1e-4)


def test_more_rank_than_seen_directions_leaves_zero_components() -> None:
    x = matrix(3, 24, 2)
    found = weighted_svd(matrix(16, 24), Metric(square_root((x.T @ x).float())), 8, seed=0).factors
    assert found.rank == 8 and not found.a_RI[3:].any() and not found.b_OR[:, 3:].any()


def test_moments_that_are_all_zero_say_nothing() -> None:
    assert square_root(torch.zeros(5, 5)) is None


def test_components_are_balanced_and_ordered_by_worth() -> None:
    m, p = matrix(40, 48), moments(48, 5)
    metric = Metric(square_root(p))
    found = weighted_svd(m, metric, 12, seed=0)
    assert torch.allclose(found.factors.a_RI.norm(dim=1), found.factors.b_OR.norm(dim=0), rtol=1e-5)
    cut, direct = found.factors.cut(4).dense().double(), weighted_svd(m, metric, 4, seed=0).factors.dense().double()
    assert weighted_norm(m - cut, p, None) == pytest.approx(weighted_norm(m - direct, p, None), rel=1e-6)


def test_the_certificate_of_the_image_is_that_of_the_weighted_error() -> None:
    m, p, g = matrix(40, 48), moments(48, 5), moments(40, 6)
    metric = Metric(square_root(p), square_root(g))
    found = weighted_svd(m, metric, 5, seed=0, exact=True)
    stored = found.factors.to(torch.bfloat16)
    certificate = certify(metric.image(m), found.found, metric.image_of(stored))
    whole = weighted_norm(m, p, g)
    assert certificate.delta_norm == pytest.approx(whole, rel=1e-5)
    assert certificate.error == pytest.approx(weighted_norm(m - stored.dense().double(), p, g) / whole, rel=1e-4)
    assert certificate.optimum == pytest.approx(weighted_norm(m - reference(m, p, g, 5), p, g) / whole, rel=1e-5)
    assert certificate.optimum <= certificate.error
    plain = LowRank(*(getattr(truncated_svd(m, 5, seed=0, exact=True).factors.to(torch.bfloat16), name) for name in ("a_RI", "b_OR")))
    assert certify(metric.image(m), found.found, metric.image_of(plain)).error > certificate.error
