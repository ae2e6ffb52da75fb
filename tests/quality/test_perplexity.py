import math

import numpy as np
import pytest
import torch

from qlora_tools.errors import IncompatibleError, NonFiniteError, UsageError
from qlora_tools.quality import logits as logits_module
from qlora_tools.quality.corpus import Method, windows
from qlora_tools.quality.perplexity import negative_log_likelihoods, perplexity


def table_model(seed=0, vocabulary=23, scale=2.0):
    table = np.random.default_rng(seed).standard_normal((vocabulary, vocabulary)) * scale
    return lambda ids: table[ids]


def test_a_uniform_model_is_as_perplexed_as_its_vocabulary_is_large():
    found = perplexity(lambda ids: np.zeros((len(ids), 7), np.float32), windows(np.arange(30) % 7, Method(context=6)))
    assert found.value == pytest.approx(7.0, rel=1e-14)
    assert found.n_tokens == 25


def test_two_tokens_by_hand():
    # p = (1/4, 3/4) at both rows: nll = ln 4 and ln 4/3
    rows = np.log([[1.0, 3.0], [1.0, 3.0]])
    nll = negative_log_likelihoods(rows, np.array([0, 1]))
    assert nll.tolist() == pytest.approx([math.log(4), math.log(4 / 3)], rel=1e-15)


@pytest.mark.parametrize("method", [Method(context=8), Method(context=8, stride=3), Method(context=8, bos=2)])
def test_perplexity_matches_a_float64_reference_token_by_token(method):
    model, ids = table_model(), np.random.default_rng(1).integers(0, 23, 50)
    found = windows(ids, method)
    expected = []
    for window in found:
        log_p = torch.log_softmax(torch.from_numpy(model(window.ids)), -1)
        expected += [-float(log_p[t - 1, window.ids[t]]) for t in range(window.first_scored, len(window.ids))]
    result = perplexity(model, found)
    assert result.value == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-13)
    assert result.n_tokens == len(expected)


def test_torch_bf16_logits_and_a_batch_axis_are_taken():
    model, ids = table_model(), np.arange(20) % 23
    found = windows(ids, Method(context=5))
    as_bf16 = perplexity(lambda x: torch.from_numpy(model(x)).to(torch.bfloat16)[None], found)
    assert as_bf16.value == perplexity(lambda x: torch.from_numpy(model(x)).to(torch.bfloat16).double().numpy(), found).value


def test_slicing_rows_does_not_change_a_bit(monkeypatch):
    model, found = table_model(), windows(np.arange(60) % 23, Method(context=20))
    whole = perplexity(model, found)
    monkeypatch.setattr(logits_module, "_SLICE_BYTES", 8 * 23 * 3)
    assert perplexity(model, found) == whole


def test_a_forbidden_token_costs_nothing_unless_it_comes():
    rows = np.array([[0.0, -np.inf, 0.0]])
    assert negative_log_likelihoods(rows, np.array([0]))[0] == pytest.approx(math.log(2))
    assert negative_log_likelihoods(rows, np.array([1]))[0] == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error_that_names_the_window(bad):
    with pytest.raises(NonFiniteError, match="window 0"):
        perplexity(lambda ids: np.full((len(ids), 4), bad), windows([1, 2, 3], Method(context=3)))


def test_logits_for_the_last_position_only_are_refused():
    with pytest.raises(IncompatibleError, match=r"\[1, 4\], expected \[3, vocabulary\]"):
        perplexity(lambda ids: np.zeros((1, 4)), windows([1, 2, 3], Method(context=3)))


def test_no_windows_is_refused():
    with pytest.raises(UsageError):
        perplexity(table_model(), [])
