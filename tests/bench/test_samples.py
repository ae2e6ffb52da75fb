import pytest

from qlora_tools.bench.samples import median_interval, nearest_rank, samples_needed, summarise


def test_the_sample_counts_are_the_known_ones():
    assert [samples_needed(q) for q in (0.90, 0.95, 0.99)] == [29, 59, 299]


@pytest.mark.parametrize(("n", "has_p95", "has_p99"), [(58, False, False), (59, True, False), (298, True, False), (299, True, True)])
def test_a_tail_is_claimed_only_from_enough_samples(n, has_p95, has_p99):
    found = summarise([[float(i) for i in range(n)]])
    assert (found.p95_s is not None, found.p99_s is not None) == (has_p95, has_p99)
    assert ("p95_s" in found.unknown, "p99_s" in found.unknown) == (not has_p95, not has_p99)
    if not has_p95:
        assert found.unknown["p95_s"] == "58 samples, 59 needed"


def test_quantiles_are_samples_not_interpolations():
    assert nearest_rank([float(i) for i in range(1, 101)], 0.95) == 95.0
    assert nearest_rank([1.0], 0.99) == 1.0


def test_the_median_interval_follows_the_binomial_table():
    # n = 15: ranks 4 and 12 hold 96.5 %; n = 6: the extremes hold 96.9 %; n = 5 cannot reach 95 %
    assert median_interval(list(range(1, 16))) == (4, 12)
    assert median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    assert median_interval([1, 2, 3, 4, 5]) is None
    assert median_interval([]) is None


def test_samples_of_one_process_count_as_one_for_the_interval():
    found = summarise([[1.0, 2.0, 3.0]] * 5)
    assert found.ci95_p50_s is None
    assert found.unknown["ci95_p50_s"] == "5 processes, 6 needed"
    assert summarise([[1.0, 2.0]]).unknown["ci95_p50_s"] == "1 process, 6 needed"
    assert summarise([[float(i), i + 2.0] for i in range(6)]).ci95_p50_s == (1.0, 6.0)


def test_nothing_measured_is_nothing_claimed():
    found = summarise([[], []])
    assert (found.n, found.p50_s) == (0, None)
    assert found.unknown["p50_s"] == "nothing was measured"
