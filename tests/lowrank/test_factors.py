from __future__ import annotations

import torch

from qlora_tools.lowrank.factors import LowRank, balanced, compress, weighted_sum


def random_factors(rank: int, rows: int = 37, columns: int = 53, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))


def test_weighted_sum_equals_the_sum_of_the_dense_matrices() -> None:
    first, second = random_factors(4), random_factors(7, seed=1)
    total = weighted_sum([(first, 0.5), (second, -2.0)])
    assert total.rank == 11
    torch.testing.assert_close(total.dense(), 0.5 * first.dense() - 2.0 * second.dense(), atol=1e-4, rtol=1e-5)


def test_compress_at_full_rank_returns_the_same_matrix_sorted() -> None:
    term = random_factors(6)
    small = compress(term)
    torch.testing.assert_close(small.dense(), term.dense(), atol=1e-4, rtol=1e-5)
    assert small.singular_values is not None
    torch.testing.assert_close(small.singular_values, torch.linalg.svdvals(term.b_OR.double() @ term.a_RI.double())[:6])


def test_compress_to_a_lower_rank_is_the_optimum() -> None:
    term = random_factors(20)
    small = compress(term, 5)
    dense = term.b_OR.double() @ term.a_RI.double()
    best = torch.linalg.svdvals(dense)[5:].square().sum().sqrt()
    assert small.rank == 5
    torch.testing.assert_close(torch.linalg.vector_norm(dense - small.dense().double()), best, atol=0, rtol=1e-5)


def test_compress_when_the_rank_exceeds_a_side() -> None:
    term = random_factors(12, rows=5, columns=30)
    small = compress(term)
    assert small.rank == 5
    torch.testing.assert_close(small.dense(), term.dense(), atol=1e-4, rtol=1e-5)


def test_cut_keeps_the_leading_components() -> None:
    small = compress(random_factors(9))
    cut = small.cut(4)
    torch.testing.assert_close(cut.dense(), small.b_OR[:, :4] @ small.a_RI[:4])
    assert cut.singular_values is not None and cut.singular_values.numel() == 4
    assert small.cut(0).dense().abs().max() == 0


def test_signs_are_canonical() -> None:
    u = torch.linalg.qr(torch.randn(30, 3, generator=torch.Generator().manual_seed(0))).Q
    sv = torch.tensor([[3.0], [2.0], [1.0]]) * torch.linalg.qr(torch.randn(40, 3, generator=torch.Generator().manual_seed(1))).Q.T
    flips = torch.tensor([1.0, -1.0, -1.0])
    first, second = balanced(u, sv), balanced(u * flips, sv * flips[:, None])
    assert torch.equal(first.a_RI, second.a_RI) and torch.equal(first.b_OR, second.b_OR)


def test_dense_of_rows_is_the_slice_of_the_dense_matrix() -> None:
    term = random_factors(4)
    torch.testing.assert_close(term.dense((3, 11)), term.dense()[3:11])


def test_half_precision_factors_multiply_in_fp32() -> None:
    term = random_factors(4).to(torch.bfloat16)
    torch.testing.assert_close(term.dense(), term.b_OR.float() @ term.a_RI.float(), atol=0, rtol=0)
