"""Passes run in step, one at a time; errors and early ends leave no thread behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from qlora_tools.live.relay import Passage, end, intercept, release


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x) + 1) * 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Two()
    originals = {path: intercept(model.get_submodule(path), path) for path in ("first", "second")}
    yield model, originals
    for path in originals:
        release(model.get_submodule(path))


def test_the_driver_computes_what_the_model_asks_for(model):
    model, originals = model
    inputs = [torch.randn(1, 2) for _ in range(4)]
    passages = [Passage(number, lambda x=x: model(x)) for number, x in enumerate(inputs)]
    for passage in passages:
        passage.start()
    for path in ("first", "second"):
        for passage in passages:
            assert passage.call.path == path
            passage.resume(originals[path](*passage.call.args))
    with torch.no_grad():
        for passage, x in zip(passages, inputs, strict=True):
            assert passage.call is None and torch.equal(passage.result, model(x))


def test_an_error_of_the_model_is_raised_where_the_driver_waits(model):
    model, _ = model
    passages = [Passage(number, lambda: model(torch.ones(1, 2))) for number in range(3)]
    for passage in passages:
        passage.start()
    with pytest.raises(TypeError):
        passages[1].resume("no tensor")
    end(passages)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pass-")]


def test_a_stopped_pass_gives_nothing(model):
    model, _ = model
    passage = Passage(0, lambda: model(torch.ones(1, 2)))
    passage.start()
    passage.stop()
    assert passage.call is None and passage.result is None
