"""Which rows a batch takes: a stateless shuffle, so that a run may start anywhere without replaying what came before.

An epoch's order is a function of (rows, seed, epoch) alone. It sorts raw Philox words, whose stream numpy keeps fixed
across versions and platforms (what ``Generator.permutation`` makes of them is not fixed). Epochs follow each other
without a seam: every batch is full, and one at an epoch's edge takes its last rows from the next epoch. So the place in
the data is one number, the rows taken since the start of the run, and the processes of a run take every n-th row of the
same batches. Left out: sorting by length, which would tie the order of the data to its content.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


def order(n: int, seed: int, epoch: int) -> Numbers:
    """The order i64[n] of rows ``0..n-1`` in one epoch: equal on every platform, unrelated between seeds and epochs."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:16], "little")
    words: NDArray[np.uint64] = np.random.Philox(key=key).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


def batches(n: int, batch: int, seed: int, *, start: int = 0) -> Iterator[Numbers]:
    """Row numbers i64[batch], batch after batch, without end. ``start``: rows taken before the first of them."""
    assert n > 0 and batch > 0 and start >= 0, (n, batch, start)
    epoch, row = divmod(start, n)
    rows = order(n, seed, epoch)
    while True:
        picked: list[Numbers] = []
        missing = batch
        while missing:
            part = rows[row : row + missing]
            picked.append(part)
            missing -= len(part)
            row += len(part)
            if row == n:
                epoch, row = epoch + 1, 0
                rows = order(n, seed, epoch)
        yield np.concatenate(picked)


def steps_in(epochs: float, n: int, batch: int) -> int:
    """Steps of ``batch`` rows (all processes and accumulations together) that cover ``epochs`` epochs: at least one."""
    return max(1, math.ceil(Fraction(str(epochs)) * n / batch))
