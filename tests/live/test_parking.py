"""Parked tensors keep their values; space in files is used again once nothing refers to it."""

from __future__ import annotations

import gc

import torch

from qlora_tools.live.parking import Parking, map_tensors, tensors_in


def test_beyond_the_budget_tensors_go_to_files_and_come_back_the_same(tmp_path):
    parking = Parking(tmp_path, budget_bytes=1 << 20)
    tensors = [
        torch.randn(256, 256 + number, generator=torch.Generator().manual_seed(number)).to(dtype)
        for number, dtype in enumerate([torch.float32, torch.bfloat16] * 6)
    ]
    parked = [parking.park(tensor) for tensor in tensors]
    assert all(torch.equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in zip(tensors, parked, strict=True))
    assert parking.in_memory <= 1 << 20 and parking.in_files > 0
    assert list(tmp_path.iterdir()) == []


def test_space_of_the_dead_is_used_again_and_that_of_views_is_not(tmp_path):
    parking = Parking(tmp_path, budget_bytes=0)
    view = parking.park(torch.full((64, 1024), 7.0))[3]
    gc.collect()
    for number in range(50):
        parking.park(torch.full((64, 1024), float(number)))
    gc.collect()
    assert torch.equal(view, torch.full((1024,), 7.0))
    assert parking.peak_bytes <= 3 * 64 * 1024 * 4
    del view
    gc.collect()
    assert parking.in_files == 0


def test_memory_counts_only_what_lives(tmp_path):
    parking = Parking(tmp_path)
    parking.park(torch.zeros(1 << 18))
    gc.collect()
    assert parking.in_memory == 0 and parking.peak_bytes == 1 << 20


def test_nests_are_mapped_in_order():
    first, second = torch.zeros(1), torch.ones(2)
    nest = {"a": (first, None, [second, "word"])}
    assert tensors_in(nest) == [first, second]
    doubled = map_tensors(lambda tensor: tensor * 2, nest)
    assert torch.equal(doubled["a"][2][0], second * 2) and doubled["a"][2][1] == "word" and doubled["a"][1] is None
