import gc
import time

import pytest

from qlora_tools.bench.repeats import is_steady, time_repeats

WORK = {"warmup": 2, "most_warmup": 5, "repeats": 3}


def counter(times):
    return lambda: {"total_s": next(times), "tag": gc.isenabled()}


def test_warm_up_goes_on_until_three_runs_agree():
    found = time_repeats(counter(iter([9.0, 5.0, 1.0, 1.01, 1.02, 7.0, 8.0, 9.0])), WORK)
    assert (found["warmup_s"], found["is_steady"]) == ([9.0, 5.0, 1.0, 1.01, 1.02], True)
    assert [run["total_s"] for run in found["runs"]] == [7.0, 8.0, 9.0]
    assert "energy" not in found


def test_warm_up_ends_at_its_limit_and_says_so():
    found = time_repeats(counter(iter(map(float, range(1, 99)))), WORK)
    assert (len(found["warmup_s"]), found["is_steady"]) == (5, False)


@pytest.mark.parametrize(("last", "steady"), [([1.0, 1.049, 1.02], True), ([1.0, 1.06, 1.02], False), ([1.0, 1.0], False), ([5.0, 1.0, 1.0, 1.0], True)])
def test_steady_is_three_runs_within_five_percent(last, steady):
    assert is_steady(last) == steady


def test_the_collector_rests_while_runs_are_timed_and_comes_back():
    found = time_repeats(counter(iter([1.0] * 9)), WORK)
    assert {run["tag"] for run in found["runs"]} == {False}
    assert gc.isenabled()
    with pytest.raises(StopIteration):
        time_repeats(counter(iter([1.0] * 4)), WORK)
    assert gc.isenabled()


def test_energy_is_read_around_the_timed_runs_and_as_many_more_as_the_counter_needs():
    def once():
        time.sleep(0.005)
        return {"total_s": 1.0}

    looks = iter([{"energy_mj": 100}, {"energy_mj": 900}])
    found = time_repeats(once, {**WORK, "energy_s": 0.1}, lambda: next(looks))
    energy = found["energy"]
    assert (energy["before"], energy["after"]) == ({"energy_mj": 100}, {"energy_mj": 900})
    assert energy["seconds"] >= 0.1
    assert 3 < energy["runs"] <= 21
    assert len(found["runs"]) == 3


def test_a_device_without_a_counter_costs_no_further_runs():
    found = time_repeats(counter(iter([1.0] * 6)), {**WORK, "energy_s": 60.0}, lambda: {"energy_mj": None})
    assert found["energy"]["runs"] == 3
