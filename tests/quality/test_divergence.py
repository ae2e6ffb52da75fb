import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.errors import IncompatibleError
from qlora_tools.quality import logits as logits_module
from qlora_tools.quality.corpus import Method, windows
from qlora_tools.quality.divergence import divergence, score_tokens


def models(vocabulary=31, noise=0.3, dtype=np.float32):
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((vocabulary, vocabulary)) * 3).astype(dtype)
    other = (table + noise * rng.standard_normal(table.shape)).astype(dtype)
    return (lambda ids: table[ids]), (lambda ids: other[ids])


WINDOWS = windows(np.random.default_rng(3).integers(0, 31, 200), Method(context=20))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_model_against_itself_diverges_by_exactly_nothing(dtype):
    model, _ = models(dtype=dtype)
    found = divergence(model, model, WINDOWS)
    assert (found.kl_mean, found.kl_p99, found.kl_max, found.rms_delta_p) == (0.0, 0.0, 0.0, 0.0)
    assert (found.top1_agreement, found.cosine_min, found.cosine_mean) == (1.0, 1.0, 1.0)
    assert found.ppl_candidate == found.ppl_reference


def test_one_token_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 ln 2 + 1/2 ln 2/3
    found = score_tokens(np.log([[1.0, 1.0]]), np.log([[1.0, 3.0]]), np.array([0]))
    assert found.kl[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-14)
    assert found.delta_p[0] == pytest.approx(-0.25, rel=1e-14)
    assert found.nll_candidate[0] == pytest.approx(math.log(4), rel=1e-14)
    assert not found.agrees[0]


def test_figures_match_torch_in_float64():
    reference, candidate = models()
    p, q, targets = [], [], []
    for window in WINDOWS:
        rows = slice(window.first_scored - 1, -1)
        p.append(torch.from_numpy(reference(window.ids)[rows]).double())
        q.append(torch.from_numpy(candidate(window.ids)[rows]).double())
        targets.append(torch.from_numpy(window.targets))
    p, q, targets = torch.cat(p), torch.cat(q), torch.cat(targets)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    cosine = torch.nn.functional.cosine_similarity(p, q, dim=-1)
    delta = (log_q.exp() - log_p.exp()).gather(1, targets[:, None])
    found = divergence(reference, candidate, WINDOWS)
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-12)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-12)
    assert found.kl_p99 == pytest.approx(torch.quantile(kl, 0.99, interpolation="higher").item(), rel=1e-12)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert (found.cosine_mean, found.cosine_min) == pytest.approx((cosine.mean().item(), cosine.min().item()), rel=1e-12)
    assert found.rms_delta_p == pytest.approx(delta.square().mean().sqrt().item(), rel=1e-12)
    assert found.ppl_candidate == pytest.approx(math.exp(torch.nn.functional.nll_loss(log_q, targets).item()), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(2, 40), st.floats(1e-6, 30), st.integers(0, 2**32 - 1))
def test_a_divergence_is_never_negative_and_ignores_a_shift_of_the_logits(n_tokens, vocabulary, scale, seed):
    rng = np.random.default_rng(seed)
    p, q = (rng.standard_normal((n_tokens, vocabulary)) * scale for _ in range(2))
    targets = rng.integers(0, vocabulary, n_tokens)
    found = score_tokens(p, q, targets)
    assert (found.kl >= 0).all()
    assert np.allclose(score_tokens(p, q + 5.0, targets).kl, found.kl, rtol=1e-9, atol=1e-12)


def test_slicing_rows_does_not_change_a_bit(monkeypatch):
    reference, candidate = models()
    whole = divergence(reference, candidate, WINDOWS)
    monkeypatch.setattr(logits_module, "_SLICE_BYTES", 8 * 31 * 4)
    assert divergence(reference, candidate, WINDOWS) == whole


def test_a_token_that_both_forbid_adds_nothing_and_one_that_only_the_candidate_forbids_is_infinite():
    both = score_tokens(np.array([[0.0, 1.0, -np.inf]]), np.array([[0.0, 1.0, -np.inf]]), np.array([0]))
    assert both.kl[0] == 0.0
    assert both.cosine[0] == 1.0
    only = score_tokens(np.array([[0.0, 1.0]]), np.array([[0.0, -np.inf]]), np.array([0]))
    assert only.kl[0] == np.inf


def test_vocabularies_of_different_size_are_refused():
    with pytest.raises(IncompatibleError, match="vocabulary has 5 entries, the reference's 4"):
        score_tokens(np.zeros((2, 4)), np.zeros((2, 5)), np.array([0, 1]))


def test_window_sums_add_up_to_the_figures():
    found = divergence(*models(), WINDOWS)
    assert sum(found.windows.tokens) == found.n_tokens == 190
    assert sum(found.windows.kl) / found.n_tokens == pytest.approx(found.kl_mean, rel=1e-14)
