"""Tiles, threads and bit patterns."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_tools.errors import UnsupportedError
from qlora_tools.quant.floats import bit_patterns, in_threads, tiles


@given(start=st.integers(0, 500), length=st.integers(0, 500), step=st.integers(1, 100))
def test_tiles_cover_everything_once_and_cut_at_multiples(start, length, step):
    pieces = list(tiles(start, start + length, step))
    assert [i for low, high in pieces for i in range(low, high)] == list(range(start, start + length))
    assert all(low % step == 0 for low, _ in pieces[1:])


@given(start=st.integers(0, 100), stop=st.integers(0, 500), step=st.integers(1, 60), threads=st.integers(0, 5))
def test_pieces_for_threads_cover_everything_once(start, stop, step, threads):
    done, lock = [], threading.Lock()

    def work(low, high):
        assert low % step == 0 or low == start
        with lock:
            done.extend(range(low, high))

    in_threads(work, stop, step, threads, start)
    assert sorted(done) == list(range(start, stop))


def test_an_error_in_a_thread_reaches_the_caller():
    def work(low, high):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_threads(work, 100, 1, 3)


def test_contiguous_floats_are_viewed_not_copied():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensor = torch.zeros(4, dtype=dtype)
        bits, _ = bit_patterns(tensor)
        bits[0] = 1
        assert float(tensor[0]) != 0


def test_fp64_is_narrowed_and_whole_numbers_are_refused():
    assert bit_patterns(torch.ones(2, dtype=torch.float64))[0].view("float32").tolist() == [1, 1]
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(UnsupportedError):
            bit_patterns(torch.zeros(2, dtype=dtype))
