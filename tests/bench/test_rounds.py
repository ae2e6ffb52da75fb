from types import SimpleNamespace

import pytest

from qlora_tools.bench.record import Attempt, Case, Setting
from qlora_tools.bench.rounds import impossible, in_turn, is_disturbed, is_hopeless, run_rounds

SETTINGS = [Setting(name, "x:y") for name in "abc"]
ONE, TWO = Case(4, 4, 1), Case(4, 4, 2)
TASK = SimpleNamespace(advance=lambda amount=1, label="": None)


def attempt(number, status="ok", stall=0.0):
    return Attempt(number, status, None if status == "ok" else status, 1.0, 1.0, stall)


def run(take, rounds=3, settings=SETTINGS, cases=(ONE,)):
    order = []

    def one(setting, case, number, is_extra):
        order.append((setting.id, case.batch, number, is_extra))
        return take(setting, case, number, is_extra)

    return run_rounds(settings, cases, rounds, stall_limit=0.1, attempt=one, task=TASK), order


def test_rounds_go_forwards_then_backwards_then_start_one_further_along():
    turns = ["".join(setting.id for setting, _ in in_turn(SETTINGS, (ONE,), number)) for number in range(6)]
    assert turns == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert ["".join(setting.id for setting, _ in in_turn(SETTINGS[:2], (ONE,), number)) for number in range(4)] == ["ab", "ba", "ba", "ab"]
    assert [f"{setting.id}{case.batch}" for setting, case in in_turn(SETTINGS, (ONE, TWO), 1)] == ["c2", "b2", "a2", "c1", "b1", "a1"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_nobody_always_follows_the_same_one(count):
    settings = [Setting(name, "x:y") for name in "abcd"[:count]]
    for name in "abcd"[:count]:
        before = set()
        for number in range(4):
            order = [setting.id for setting, _ in in_turn(settings, (ONE,), number)]
            before.add(order[order.index(name) - 1] if order.index(name) else None)
        assert len(before) > 1


def test_what_was_disturbed_is_taken_once_more_at_the_end_of_its_round():
    found, order = run(lambda setting, case, number, is_extra: attempt(number, stall=0.5 if setting.id == "b" and not is_extra else 0.0), rounds=2)
    assert [f"{name}{'+' * is_extra}" for name, _, _, is_extra in order] == ["a", "b", "c", "b+", "c", "b", "a", "b+"]
    assert [taken.round for taken in found["b", ONE]] == [0, 0, 1, 1]
    assert [taken.round for taken in found["a", ONE]] == [0, 1]


def test_a_machine_that_is_busy_for_good_is_not_waited_for_in_every_round():
    found, order = run(lambda setting, case, number, is_extra: attempt(number, stall=0.9), rounds=3)
    assert [len(taken) for taken in found.values()] == [4, 4, 4]
    assert [number for _, _, number, is_extra in order if is_extra] == [0, 0, 0]


@pytest.mark.parametrize(
    ("status", "stall", "again"), [("ok", 0.2, True), ("ok", 0.1, False), ("ok", None, False), ("timeout", 0.2, True), ("oom", 0.2, False)]
)
def test_only_what_the_machine_may_have_disturbed_deserves_another(status, stall, again):
    assert is_disturbed(attempt(0, status, stall), 0.1) == again


@pytest.mark.parametrize(("status", "tries"), [("unsupported", 1), ("oom", 2), ("timeout", 2), ("error", 4)])
def test_what_never_worked_is_not_tried_for_ever(status, tries):
    found, _ = run(lambda setting, case, number, is_extra: attempt(number, status if setting.id == "b" else "ok"), rounds=4)
    assert len(found["b", ONE]) == tries
    assert len(found["a", ONE]) == 4


def test_a_setting_that_cannot_do_one_case_still_does_the_others():
    found, _ = run(lambda setting, case, number, is_extra: attempt(number, "unsupported" if (setting.id, case) == ("b", TWO) else "ok"), cases=(ONE, TWO))
    assert [len(found[key]) for key in (("b", ONE), ("b", TWO), ("a", TWO))] == [3, 1, 3]


def test_what_worked_once_is_tried_in_every_round():
    statuses = iter(["oom", "ok", "oom", "oom", "ok"])
    found, _ = run(lambda setting, case, number, is_extra: attempt(number, next(statuses)), rounds=5, settings=SETTINGS[:1])
    assert len(found["a", ONE]) == 5


def test_an_unavailable_setting_has_one_attempt():
    gone = Setting("gone", "x:y", unavailable="the export failed")
    assert is_hopeless(gone, [impossible("the export failed", "error")])
    assert not is_hopeless(gone, [])
