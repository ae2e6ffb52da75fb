from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from qlora_tools.demo import training
from qlora_tools.demo.training import Schedule, next_token_loss, perplexity, train
from qlora_tools.errors import NonFiniteError, UsageError

SCHEDULE = Schedule(steps=25, batch=2, context=16, rate=1e-2)
PATTERN = [3, 1, 4, 1, 5, 9, 2, 6] * 40


class Heard:
    def __init__(self):
        self.titles, self.amount, self.labels = [], 0, []

    @contextmanager
    def task(self, title, total=None, unit=""):
        self.titles.append((title, total, unit))
        yield SimpleNamespace(advance=self.advance)

    def advance(self, amount=1, label=""):
        self.amount += amount
        self.labels.append(label)


def tiny_model(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True
        )
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeating_text_is_learned(kind, dtype):
    model = tiny_model()
    before = perplexity(model, PATTERN, context=16, windows=4)
    train(model, PATTERN, Schedule(steps=40, batch=2, context=16, rate=1e-2, kind=kind, matrix_rate=2e-2), seed=0, title="training", dtype=dtype)
    assert perplexity(model, PATTERN, context=16, windows=4) < before / 3
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_same_seed_gives_the_same_bits_and_another_seed_does_not():
    def trained(seed):
        model = tiny_model()
        train(model, PATTERN, Schedule(steps=5, batch=2, context=16, rate=1e-2), seed=seed, title="training", dtype=torch.float32)
        return model.model.embed_tokens.weight.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_number_of_threads_does_not_change_a_bit(monkeypatch):
    class OneWorker(training.ThreadPoolExecutor):
        def __init__(self, workers, **options):
            super().__init__(1, **options)

    def trained():
        model = tiny_model()
        train(model, PATTERN, Schedule(steps=5, batch=3, context=16, rate=1e-2, kind="muon", matrix_rate=1e-2), seed=1, title="training", dtype=torch.float32)
        return model.model.embed_tokens.weight.detach()

    two = trained()
    monkeypatch.setattr(training, "ThreadPoolExecutor", OneWorker)
    torch.testing.assert_close(trained(), two, rtol=0, atol=0)


def test_shards_of_a_batch_give_the_gradient_of_the_whole(monkeypatch):
    def trained(shards):
        monkeypatch.setattr(training, "_SHARDS", shards)
        model = tiny_model()
        train(model, PATTERN, Schedule(steps=3, batch=5, context=16, rate=1e-3), seed=1, title="training", dtype=torch.float32)
        return model.model.embed_tokens.weight.detach()

    torch.testing.assert_close(trained(2), trained(1), rtol=0, atol=2e-5)


def test_global_random_state_is_left_alone():
    torch.manual_seed(7)
    model = tiny_model()
    torch.manual_seed(7)
    train(model, PATTERN, Schedule(steps=2, batch=2, context=16, rate=1e-2), seed=0, title="training", dtype=torch.float32)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))


def test_progress_hears_every_step_and_the_perplexity():
    heard = Heard()
    train(tiny_model(), PATTERN, SCHEDULE, seed=0, title="training base", progress=heard, dtype=torch.float32)
    assert heard.titles == [("training base", 25, "steps")]
    assert heard.amount == 25 and heard.labels[-1].startswith("perplexity ")


def test_loss_is_the_float64_cross_entropy_of_the_next_token():
    model = tiny_model()
    window = torch.tensor([PATTERN[:16]])
    with torch.no_grad():
        logits = model(input_ids=window).logits.double()[0, :-1]
        expected = -(logits.log_softmax(-1)[torch.arange(15), window[0, 1:]]).mean().item()
        assert next_token_loss(model, window).item() == pytest.approx(expected, abs=1e-5)
    assert perplexity(model, PATTERN[:16], context=16, windows=9) == pytest.approx(math.exp(expected), rel=1e-5)


def test_factor_rises_to_one_and_falls_towards_zero():
    schedule = Schedule(steps=100, batch=1, context=8, rate=1e-3, warmup=0.1)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[:11] == pytest.approx([*[(step + 1) / 10 for step in range(10)], 1.0])
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 0.02
    assert [Schedule(steps=1, batch=1, context=8, rate=1e-3).factor(0)] == [1.0]


def test_loss_that_is_no_number_stops_the_run_and_names_the_step():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="step 1"):
        train(model, PATTERN, SCHEDULE, seed=0, title="training", dtype=torch.float32)


def test_too_little_text_is_refused():
    with pytest.raises(UsageError, match="one window needs 17"):
        train(tiny_model(), [1, 2, 3], SCHEDULE, seed=0, title="training")
    with pytest.raises(UsageError, match="held-out"):
        perplexity(tiny_model(), [1, 2, 3], context=16, windows=1)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"context": 1}, {"kind": "sgd"}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(UsageError):
        Schedule(**{"steps": 1, "batch": 1, "context": 8, "rate": 1e-3} | wrong)
