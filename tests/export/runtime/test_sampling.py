"""Choices of tokens: transformers' definitions, a seed that decides, and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from qlora_tools.errors import NonFiniteError, UsageError
from qlora_tools.export.runtime.sampling import GREEDY, Sampler, Sampling, highest, likely_enough, narrowed, nucleus, penalised, probabilities


def logits(seed=0, size=50, spread=3.0):
    return (spread * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def theirs(processor, scores, ids=(0,)):
    return processor(torch.tensor([list(ids)]), torch.from_numpy(scores.copy())[None])[0].numpy()


@pytest.mark.parametrize("count", [1, 2, 7, 49, 50, 90])
def test_top_k_is_transformers(count):
    np.testing.assert_array_equal(highest(logits(), count), theirs(logits_process.TopKLogitsWarper(count), logits()))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_top_p_is_transformers(share, spread):
    np.testing.assert_array_equal(nucleus(logits(spread=spread), share), theirs(logits_process.TopPLogitsWarper(share), logits(spread=spread)))


@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_min_p_is_transformers(share):
    np.testing.assert_array_equal(likely_enough(logits(), share), theirs(logits_process.MinPLogitsWarper(share), logits()))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_is_transformers(penalty):
    seen = np.array([3, 8, 20, 49])
    np.testing.assert_array_equal(
        penalised(logits(), seen, penalty), theirs(logits_process.RepetitionPenaltyLogitsProcessor(penalty), logits(), [8, 3, 3, 20, 49])
    )


def test_all_together_are_what_generate_of_transformers_draws_from():
    from tests.export.tiny_decoders import build, tokens

    tiny = build("llama")
    ids = tokens(tiny, 1, 9)
    settings = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4}
    done = tiny.model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.ones(1, 9),
        do_sample=True,
        max_new_tokens=1,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    raw = penalised(done.logits[0][0].numpy(), np.unique(ids), 1.4)
    found = narrowed(raw, Sampling(**settings))
    np.testing.assert_allclose(found, done.scores[0][0].numpy(), rtol=1e-6)
    assert 1 < np.isfinite(found).sum() < 40


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30),
    st.integers(0, 35),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.floats(0.05, 4),
)
def test_the_likeliest_always_stays(scores, top_k, top_p, min_p, temperature):
    scores = np.array(scores, np.float32)
    left = narrowed(scores, Sampling(temperature, top_k, top_p, min_p))
    tempered = scores / np.float32(temperature)  # which makes equals of the very small
    assert np.isfinite(left[tempered == tempered.max()]).any()
    assert np.isclose(probabilities(left).sum(), 1)


def draws(sampling, count=20_000, scores=None):
    sampler = Sampler(sampling, [np.array([0])])
    scores = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32)) if scores is None else scores
    return np.array([sampler.choose(scores)[0] for _ in range(count)])


def test_tokens_are_drawn_as_often_as_they_are_likely():
    shares = np.bincount(draws(Sampling(temperature=1)), minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.012)
    assert set(draws(Sampling(temperature=1, top_k=2), 500)) == {0, 1}


def test_the_seed_decides():
    first, again, other = (draws(Sampling(temperature=1, seed=seed), 50).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_draws_are_the_same_on_every_machine():
    assert draws(Sampling(temperature=1, seed=7), 12).tolist() == [1, 2, 1, 0, 0, 2, 0, 2, 1, 0, 0, 0]


def test_greedy_takes_the_likeliest_and_the_penalty_still_counts():
    scores = np.array([[1.0, 3.0, 2.9]], np.float32)
    assert Sampler(GREEDY, [np.array([0])]).choose(scores).tolist() == [1]
    sampler = Sampler(Sampling(repetition_penalty=1.2), [np.array([0])])
    assert [sampler.choose(scores)[0] for _ in range(3)] == [1, 2, 1]


def test_sequences_of_a_batch_have_their_own_past():
    scores = np.array([[1.0, 3.0, 2.9]] * 2, np.float32)
    assert Sampler(Sampling(repetition_penalty=1.2), [np.array([1]), np.array([0])]).choose(scores).tolist() == [2, 1]


def test_sixteen_bit_logits_are_widened_first():
    assert Sampler(Sampling(temperature=0.5), [np.array([0])]).choose(np.full((1, 4), -65504, np.float16)).shape == (1,)


def test_a_models_own_settings_fill_what_was_left_open():
    found = Sampling().with_defaults({"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "max_length": 9})
    assert found == Sampling(temperature=0.6, top_k=20) and Sampling().with_defaults({}) == Sampling(temperature=1.0)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"])
def test_values_out_of_range_are_named(name):
    with pytest.raises(UsageError, match=f"{name} is -1, expected"):
        Sampling(**{name: -1})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    with pytest.raises(NonFiniteError, match="not numbers"):
        Sampler(GREEDY, [np.array([0])]).choose(np.array([[1.0, bad]]))
