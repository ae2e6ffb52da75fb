"""Text that a model writes itself."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import NonFiniteError, UsageError
from qlora_tools.live.base import load_base
from qlora_tools.live.self_text import draw, self_windows, start_ids, windows_at_once
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.quant.nf4 import NF4


@pytest.fixture(scope="module")
def model(llama):
    return load_base(open_checkpoint(llama), "language", None, dtype=torch.float32).model


def test_same_seed_same_text_and_another_seed_another(model):
    made = [self_windows(model, start_ids=torch.tensor([0, 5]), windows=5, length=12, seed=seed) for seed in (3, 3, 4)]
    assert made[0].shape == (5, 12)
    assert made[0].dtype == torch.int64
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_every_token_is_the_one_its_share_of_the_full_forward_pass_picks(model):
    windows_NL = self_windows(model, start_ids=torch.tensor([[0, 7]]), windows=3, length=10, seed=1, temperature=0.7)
    assert torch.equal(windows_NL[:, :2], torch.tensor([[0, 7]]).expand(3, 2))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        torch.randperm(1, generator=generator)
    shares_NL = torch.rand(3, 10, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=windows_NL).logits.double() / 0.7
    cumulated = torch.softmax(logits, -1).cumsum(-1)
    for row in range(3):
        for column in range(2, 10):
            picked = int(windows_NL[row, column])
            below = float(cumulated[row, column - 1, picked - 1]) if picked else 0.0
            assert below - 1e-5 <= float(shares_NL[row, column]) <= float(cumulated[row, column - 1, picked]) + 1e-5


def test_how_many_are_written_at_once_does_not_matter(model, monkeypatch):
    options = {"start_ids": torch.arange(4), "windows": 7, "length": 9, "seed": 0}
    together = self_windows(model, **options)
    monkeypatch.setattr("qlora_tools.live.self_text.MOST_AT_ONCE", 3)
    assert torch.equal(self_windows(model, **options), together)


def test_starts_take_turns(model):
    windows_NL = self_windows(model, start_ids=torch.tensor([3, 4, 5]), windows=7, length=3, seed=0)
    counts = torch.bincount(windows_NL[:, 0], minlength=6)[3:]
    assert sorted(counts.tolist()) == [2, 2, 3]


def test_draw_never_picks_a_token_without_probability():
    logits = torch.full((4, 5), float("-inf"))
    logits[:, 1], logits[:, 3] = 0.0, 0.0
    shares = torch.tensor([0.0, 0.4999, 0.5, 1.0 - 2**-53], dtype=torch.float64)
    assert draw(logits, shares, 1.0).tolist() == [1, 1, 3, 3]


def test_frequencies_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0])
    shares = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    found = torch.bincount(draw(logits.expand(3000, 3), shares, 2.0)) / 3000
    assert torch.allclose(found, torch.softmax(logits / 2.0, 0), atol=1e-3)


def test_a_low_temperature_is_greedy(model):
    windows_NL = self_windows(model, start_ids=torch.tensor([0]), windows=1, length=8, seed=0, temperature=1e-6)
    greedy = model.generate(torch.tensor([[0]]), max_new_tokens=7, min_new_tokens=7, do_sample=False, eos_token_id=None)
    assert torch.equal(windows_NL, greedy)


def test_a_quantized_model_writes_too(llama):
    model = load_base(open_checkpoint(llama), "language", NF4(), dtype=torch.bfloat16).model
    windows_NL = self_windows(model, start_ids=torch.tensor([0]), windows=2, length=5, seed=0)
    assert int(windows_NL.max()) < model.config.vocab_size


def test_nan_is_refused():
    with pytest.raises(NonFiniteError, match="NaN"):
        draw(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5], dtype=torch.float64), 1.0)


@pytest.mark.parametrize("starts", [torch.empty(0, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)])
def test_starts_that_leave_nothing_to_write_are_refused(model, starts):
    with pytest.raises(UsageError, match="starts of"):
        self_windows(model, start_ids=starts, windows=2, length=4, seed=0)


def test_texts_start_as_the_tokenizer_starts_them_or_with_any_ordinary_token(model, llama):
    tokenizer = open_tokenizer(llama)
    starts = start_ids(model, tokenizer)
    assert len(starts) > 50
    assert not {0, 1, 2} & set(starts.tolist())  # ends of texts begin none
    tokenizer.add_bos_token = True
    before = tokenizer("a")["input_ids"]
    expected = [0] if before[0] == 0 else starts.tolist()
    assert start_ids(model, tokenizer).tolist() == expected


def test_memory_bounds_how_many_are_written_at_once(model):
    assert windows_at_once(model, 1 << 20) < windows_at_once(model, 8) <= 128
