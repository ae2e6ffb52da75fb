import numpy as np
import pytest
from scipy.stats import bootstrap

from qlora_tools.errors import IncompatibleError
from qlora_tools.quality.corpus import Method, windows
from qlora_tools.quality.divergence import divergence
from qlora_tools.quality.intervals import (
    FEWEST_WINDOWS,
    Interval,
    compare,
    mean_interval,
    perplexity_ratio,
    ratio_interval,
    resample_counts,
    retention_interval,
)


def judged(noise, seed=1, n=600):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((40, 40)) * 2
    other = table + noise * np.random.default_rng(seed).standard_normal(table.shape)
    found = windows(np.random.default_rng(5).integers(0, 40, n), Method(context=20))
    return divergence(lambda ids: table[ids], lambda ids: other[ids], found)


def test_every_resample_draws_as_many_windows_as_there_are():
    counts = resample_counts(13)
    assert counts.shape == (10_000, 13)
    assert (counts.sum(axis=1) == 13).all()
    assert counts is resample_counts(13)


def test_nine_in_ten_intervals_or_more_hold_the_truth():
    rng = np.random.default_rng(7)
    tokens = np.full(25, 10)
    hits = 0
    for _ in range(400):
        found = mean_interval(rng.gamma(2.0, 0.5, 25) * 10, tokens)  # true mean per token: 1
        hits += found.low <= 1.0 <= found.high
    assert 0.90 <= hits / 400 <= 0.985


def test_the_interval_is_near_scipys():
    values = np.random.default_rng(2).exponential(1.0, 60)
    ours = mean_interval(values, np.ones(60, int))
    theirs = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_too_few_windows_give_a_value_and_no_interval():
    found = mean_interval([1.0] * (FEWEST_WINDOWS - 1), [2] * (FEWEST_WINDOWS - 1))
    assert found == Interval(0.5, None, None)
    assert found.bounds is None


def test_pairing_removes_the_difficulty_of_the_text():
    rng = np.random.default_rng(1)
    hard = rng.gamma(2, 100, 50)
    a, b, tokens = hard * 1.01, hard, np.full(50, 100)
    ratio = perplexity_ratio(a, b, tokens)
    alone = mean_interval(a, tokens)
    assert ratio.low > 1.0
    assert (ratio.high - ratio.low) < 0.05 * (alone.high - alone.low)


def test_a_setting_against_itself_is_a_tie_of_exactly_one():
    found = compare("x", judged(0.2), "x again", judged(0.2))
    assert found.effect == Interval(1.0, 1.0, 1.0)
    assert found.verdict == "tie"


@pytest.mark.parametrize("metric", ["kl", "top1"])
def test_a_clear_difference_has_a_winner_on_either_side(metric):
    small, large = judged(0.1), judged(0.8)
    assert compare("s", small, "l", large, metric).verdict == "a"
    assert compare("l", large, "s", small, metric).verdict == "b"


def test_equal_noise_of_another_draw_is_a_tie():
    assert compare("x", judged(0.2, seed=1, n=240), "y", judged(0.2, seed=2, n=240)).verdict == "tie"


def test_perfect_against_perfect_is_one_and_anything_against_perfect_is_unbounded():
    assert ratio_interval([0.0] * 9, [0.0] * 9) == Interval(1.0, 1.0, 1.0)
    assert ratio_interval([1.0] * 9, [0.0] * 9) == Interval(float("inf"), None, None)


def test_other_windows_cannot_be_compared():
    with pytest.raises(IncompatibleError, match="same windows"):
        compare("x", judged(0.2, n=600), "y", judged(0.2, n=400))


def test_many_windows_are_joined_into_blocks_and_keep_their_mean():
    values = np.random.default_rng(0).standard_normal(2000) + 3
    found = mean_interval(values, np.ones(2000, int))
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.1)


def test_retention_of_halfway_is_a_half():
    base, tuned = np.full(20, 4.0) + np.arange(20) / 50, np.full(20, 2.0) + np.arange(20) / 50
    found = retention_interval(base, tuned, (base + tuned) / 2)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
