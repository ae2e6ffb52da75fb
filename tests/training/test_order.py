"""The order of the data: fixed numbers, permutations, and starting anywhere."""

from __future__ import annotations

import hashlib
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.training.order import batches, order, steps_in


def test_the_order_of_ten_rows_is_these_numbers_on_every_machine():
    """Written down once: a change here breaks the resuming of every run that exists."""
    assert order(10, 0, 0).tolist() == [5, 1, 9, 4, 2, 0, 6, 7, 3, 8]
    assert order(10, 0, 1).tolist() == [1, 3, 6, 8, 9, 2, 4, 7, 0, 5]
    assert order(10, 1, 0).tolist() == [3, 4, 9, 2, 0, 8, 1, 5, 6, 7]


def philox(key: int, count: int) -> list[int]:
    """Philox 4x64-10 as its paper defines it (Salmon et al. 2011), in plain integers; the counter starts at 1."""
    whole = 2**64
    words: list[int] = []
    for block in range(1, -(-count // 4) + 1):
        x = [block, 0, 0, 0]
        low, high = key % whole, key // whole
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [second // whole ^ x[1] ^ low, second % whole, first // whole ^ x[3] ^ high, first % whole]
            low, high = (low + 0x9E3779B97F4A7C15) % whole, (high + 0xBB67AE8584CAA73B) % whole
        words += x
    return words[:count]


@pytest.mark.parametrize(("n", "seed", "epoch"), [(1, 0, 0), (13, 5, 2), (64, -3, 10**6)])
def test_the_order_sorts_the_published_philox_stream(n, seed, epoch):
    words = philox(int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:16], "little"), n)
    assert order(n, seed, epoch).tolist() == sorted(range(n), key=words.__getitem__)


@given(n=st.integers(1, 300), seed=st.integers(-(2**40), 2**40), epoch=st.integers(-1, 10**6))
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_row_once(n, seed, epoch):
    found = order(n, seed, epoch)
    assert found.dtype == np.int64 and sorted(found.tolist()) == list(range(n))
    assert np.array_equal(found, order(n, seed, epoch))


def test_the_global_random_state_is_neither_read_nor_moved():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = order(50, 3, 2)
    assert np.array_equal(before, np.random.get_state()[1])
    np.random.seed(2)
    assert np.array_equal(first, order(50, 3, 2))


def test_seeds_and_epochs_do_not_repeat_each_other():
    """Seed 1 epoch 23 and seed 12 epoch 3 must not meet, nor neighbours."""
    seen = {tuple(order(40, seed, epoch).tolist()) for seed in range(20) for epoch in range(30)}
    assert len(seen) == 600


def test_first_rows_are_spread_evenly():
    """Of 4000 epochs of 8 rows each row comes first about 500 times (5 sigma: 105)."""
    counts = np.bincount([order(8, 5, epoch)[0] for epoch in range(4000)], minlength=8)
    assert abs(counts - 500).max() < 105


def test_batches_follow_the_epochs_and_cross_their_edge():
    first, second = order(5, 7, 0).tolist(), order(5, 7, 1).tolist()
    found = [one.tolist() for one in islice(batches(5, 3, 7), 3)]
    assert found == [first[:3], first[3:] + second[:1], second[1:4]]


def test_a_batch_larger_than_the_data_goes_round():
    found = next(batches(3, 8, 0)).tolist()
    assert found == [*order(3, 0, 0).tolist(), *order(3, 0, 1).tolist(), *order(3, 0, 2).tolist()[:2]]


@given(n=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 99), done=st.integers(0, 12))
@settings(max_examples=80, deadline=None)
def test_starting_after_some_batches_equals_going_on(n, batch, seed, done):
    straight = list(islice(batches(n, batch, seed), done + 3))
    resumed = list(islice(batches(n, batch, seed, start=done * batch), 3))
    assert all(np.array_equal(left, right) for left, right in zip(straight[done:], resumed, strict=True))
    assert all(len(one) == batch for one in straight)


@given(n=st.integers(1, 40), batch=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rows_are_used_equally_often(n, batch, seed):
    taken = np.concatenate(list(islice(batches(n, batch, seed), n)))
    assert np.bincount(taken, minlength=n).tolist() == [batch] * n


def test_starting_far_into_a_run_costs_no_replay():
    assert len(next(batches(1000, 4, 0, start=10**15 + 17))) == 4


@pytest.mark.parametrize(
    ("epochs", "n", "batch", "steps"),
    [(1, 8, 4, 2), (1, 9, 4, 3), (0.5, 8, 4, 1), (1, 1, 64, 1), (0.001, 8, 4, 1), (3, 7, 7, 3), (0.1, 30, 3, 1), (1.1, 10, 1, 11)],
)
def test_steps_cover_the_epochs(epochs, n, batch, steps):
    assert steps_in(epochs, n, batch) == steps
