"""Tiled sums equal the full product, and are exactly symmetric whatever the tiling."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.calibrate import moments as module
from qlora_tools.calibrate.moments import Moments


@pytest.mark.parametrize("size", [1, 5, 8, 21])
def test_tiles_hold_the_whole_second_moment(monkeypatch, size):
    monkeypatch.setattr(module, "_TILE_ROWS", 8)
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    sums = Moments(size)
    for part in x.split(7):
        sums.add(part)
    found, expected = torch.cat(list(sums.rows())), x.double().T @ x.double() / 40
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert found.dtype == torch.float32 and torch.equal(found, found.T)
    torch.testing.assert_close(sums.mean().double(), x.double().mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sums.diagonal(), expected.diagonal(), rtol=1e-6, atol=1e-6)
    rank = float(expected.trace() ** 2 / expected.square().sum())
    assert sums.effective_rank() == pytest.approx(rank, rel=1e-5) and sums.tokens == 40


def test_small_additions_are_not_lost_beside_a_large_sum():
    sums = Moments(1)
    sums.add(torch.full((1, 1), 1e5))
    for _ in range(1000):
        sums.add(torch.full((1, 1), 1.0))
    assert float(sums.diagonal()) * sums.tokens == 1e10 + 1000


def test_nothing_heard_has_no_rank():
    sums = Moments(3)
    sums.add(torch.zeros(4, 3))
    assert sums.effective_rank() == 0.0 and torch.equal(next(sums.rows()), torch.zeros(3, 3))
