"""Live bytes are counted exactly, and a step traced without content keeps as much alive as the real step."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from qlora_tools.live.footprint import LiveBytes, empty_tensors, without_content
from qlora_tools.training.allocator import resident_bytes


def test_each_storage_counts_once_until_its_last_view_dies():
    with LiveBytes("a") as live:
        x = torch.zeros(1000)
        y = x.view(10, 100)[3]
        assert live.total == 4000
        z = x + 1
        assert live.total == 8000
        del x
        assert live.total == 8000, "a view keeps the storage"
        del y
        assert (live.total, live.peak) == (4000, 8000)
        z.mul_(2)
        assert live.total == 4000
        del z
    assert (live.total, live.peak, live.at_peak["a"]) == (0, 8000, 8000)


def test_labels_say_what_the_peak_was_made_of():
    with LiveBytes("a") as live:
        x = torch.zeros(100)
        with live.under("b"):
            y = torch.zeros(50)
        live.note(x, "c")
        z = torch.zeros(1)
        del y
        torch.zeros(10)
    assert dict(live.at_peak) == {"a": 4, "b": 200, "c": 400}
    del x, z


def test_backward_passes_are_seen():
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes("a") as live:
        y = x.exp().sum()  # exp is kept for the backward
        assert live.total == 4004
        y.backward()
    del y
    assert live.total == 4000 and x.grad is not None
    assert live.peak >= 8000


def test_what_follows_from_token_ids_has_its_real_shape():
    targets = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    with without_content(), LiveBytes("a"):
        hidden = torch.empty(2, 3, 8)
        assert isinstance(hidden, FakeTensor)
        assert hidden[targets != -100].shape == (3, 8)
        assert hidden[0, targets[0] != -100].shape == (2, 8)
        positions = torch.arange(3)[None] + 2
        assert not isinstance(positions, FakeTensor) and positions.tolist() == [[2, 3, 4]]
        grad = torch.zeros_like(hidden)
        grad[targets != -100] = 1.0
        assert hidden.sum().item() == 1.0 and torch.equal(hidden, hidden)


def test_random_states_are_as_before():
    before = torch.get_rng_state()
    with without_content(), LiveBytes("a"):
        nn.functional.dropout(torch.empty(10), 0.5)
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_is_emptied_in_place_and_ties_stay_tied():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    with without_content():
        empty_tensors(model, "cpu")
    assert isinstance(model[0].weight, FakeTensor) and model[1].weight is model[0].weight
    assert not model[0].weight.requires_grad and model[0].weight.shape == (10, 4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident sets are read from /proc")
def test_tensors_without_content_take_no_memory():
    before = resident_bytes()
    assert before > 0
    with without_content(), LiveBytes("a") as live:
        weight = torch.empty(1 << 15, 1 << 16, dtype=torch.bfloat16)
        out = torch.empty(8, 1 << 16, dtype=torch.bfloat16) @ weight.T
        assert live.peak > 4 << 30 and out.shape == (8, 1 << 15)
    gc.collect()
    assert resident_bytes() - before < 256 << 20
