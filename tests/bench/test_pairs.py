import random
from dataclasses import replace

import pytest
from bench_records import attempt, make_record

from qlora_tools.bench.pairs import FEWEST_ROUNDS, agreement, compare, latency_comparisons, round_ratios
from qlora_tools.bench.record import Case, Setting, Workload
from qlora_tools.bench.rows import summarise_row
from qlora_tools.errors import IncompatibleError


def row(name, steps_s, case=None):
    return summarise_row(Setting(name, "x:y"), case or Case(), [attempt(number, step_s) for number, step_s in enumerate(steps_s)])


def noisy(seed, rounds, scale=1.0):
    drawn = random.Random(seed)
    return [scale * 1e-3 * (1 + 0.05 * drawn.gauss(0, 1)) for _ in range(rounds)]


def test_the_same_setting_measured_twice_is_a_tie():
    verdicts = [found["verdict"] for seed in range(20) for found in latency_comparisons([row("a", noisy(seed, 6)), row("b", noisy(seed + 99, 6))], "a")]
    assert verdicts.count("tie") >= 18  # 5 % of A/A pairs may be told apart by chance


def test_who_is_faster_follows_from_ratios_of_one_round():
    drift = [1.0, 3.0, 0.5, 2.0, 8.0]  # the machine changes far more than the settings differ
    found = latency_comparisons([row("a", [1e-3 * d for d in drift]), row("b", [0.8e-3 * d for d in drift])], "a")
    assert [(item["a"], item["b"], item["metric"], item["verdict"]) for item in found] == [("b", "a", "prefill", "a"), ("b", "a", "decode", "a")]
    assert found[1]["effect"] == pytest.approx(0.8, rel=1e-3)
    assert found[1]["ci95"] == pytest.approx([0.8, 0.8], rel=1e-2)
    assert (found[1]["case"], found[1]["n_pairs"]) == ([1, 128, 65], 5)
    slower = latency_comparisons([row("a", [1e-3] * 5), row("b", [2e-3] * 5)], "a")
    assert [item["verdict"] for item in slower] == ["b", "b"]


def test_too_few_rounds_rank_nobody():
    found = compare([0.5] * (FEWEST_ROUNDS - 1))
    assert (found["verdict"], found["ci95"], found["effect"]) == ("tie", None, 0.5)
    assert found["reason"] == "a verdict takes 5 rounds, there are 4"


def test_the_interval_follows_from_the_rounds_alone():
    ratios = noisy(1, 9, 900.0)
    assert compare(ratios) == compare(list(ratios))
    low, high = compare(ratios)["ci95"]
    assert min(ratios) <= low < compare(ratios)["effect"] < high <= max(ratios)


def test_only_rounds_that_both_went_through_are_paired():
    a, b = row("a", [1e-3, 2e-3, 4e-3]), row("b", [2e-3, 2e-3, 2e-3])
    lost = replace(b.attempts[1], status="timeout", reason="late")
    assert round_ratios(a.attempts, (b.attempts[0], lost, b.attempts[2]), "decode") == pytest.approx([0.5, 2.0], rel=5e-3)
    assert round_ratios(a.attempts, (lost,), "decode") == []


def test_rows_that_failed_and_a_first_that_failed_are_compared_with_nothing():
    record = make_record()
    assert {found["a"] for found in latency_comparisons(record.rows, "fp32")} == {"int8", "slow"}
    assert latency_comparisons(record.rows, "big") == []


def records(one, other, first="a"):
    def record(steps):
        rows = tuple(row(name, step_s) for name, step_s in steps.items())
        settings = tuple(Setting(name, "x:y") for name in steps)
        return make_record(settings=settings, rows=rows, workload=Workload())

    return record(one), record(other)


def test_agreement_is_the_largest_difference_of_a_ratio_however_fast_the_machine():
    one, other = records({"a": [1e-3] * 3, "b": [2e-3] * 3, "c": [1e-3] * 3}, {"a": [5e-3] * 3, "b": [10.4e-3] * 3, "c": [5e-3] * 3})
    found = agreement(one, other)
    assert found.largest == pytest.approx(0.04, rel=0.05)
    assert (found.ratios[0].setting, found.ratios[0].one, found.missing) == ("b", pytest.approx(2.0, rel=5e-3), ())
    assert agreement(other, one).largest == pytest.approx(found.largest)
    assert agreement(one, one).largest == 0.0


def test_what_only_one_of_two_records_has_is_named():
    one, other = records({"a": [1e-3] * 3, "b": [2e-3] * 3}, {"a": [1e-3] * 3, "c": [2e-3] * 3})
    found = agreement(one, other)
    assert found.largest is None
    assert found.missing == ("b, 1 x 128 + 65, prefill", "b, 1 x 128 + 65, decode", "c, 1 x 128 + 65, prefill", "c, 1 x 128 + 65, decode")


def test_records_that_do_not_belong_together_are_refused():
    one, other = records({"a": [1e-3], "b": [1e-3]}, {"b": [1e-3], "a": [1e-3]})
    with pytest.raises(IncompatibleError, match="first setting"):
        agreement(one, other)
    with pytest.raises(IncompatibleError, match="no case in common"):
        agreement(one, replace(one, workload=Workload((Case(9, 9),))))
