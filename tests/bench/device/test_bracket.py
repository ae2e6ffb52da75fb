"""Three readings of a device that may be somebody else's too."""

import pytest

from qlora_tools.bench.device import bracket, figure

MIB = 1 << 20


def readings(before, during, after, process=None):
    named = zip(("before", "during", "after"), (before, during, after), strict=True)
    return {name: {"used_bytes": value * MIB, "process_bytes": process if name == "during" else None, "energy_mj": None} for name, value in named}


def judged(*values):
    return bracket(*readings(*values).values())


@pytest.mark.parametrize("left", [0, 16, -16])
def test_what_comes_back_within_sixteen_mebibytes_counts(left):
    found = judged(100, 1100, 100 + left)
    assert (found.took_bytes, found.residual_bytes, found.reason) == (1000 * MIB, left * MIB, None)


def test_of_large_amounts_one_percent_counts():
    assert judged(0, 10_000, 100).reason is None
    assert "10000 MiB were taken and 9899 MiB came back" in judged(0, 10_000, 101).reason


@pytest.mark.parametrize("values", [(100, 1100, 117), (100, 1100, 83), (100, 100, 100), (100, 50, 100)])
def test_contention_is_a_reason_and_never_a_number(values):
    found = figure(readings(*values))
    assert found.bytes is None and found.reason.startswith("contended")


def test_the_drivers_figure_for_our_process_comes_first():
    found = figure(readings(100, 1100, 900, process=777))
    assert (found.bytes, found.method, found.residual_bytes) == (777, "process", None)


def test_a_bracket_keeps_its_residual():
    found = figure(readings(100, 1100, 104))
    assert (found.bytes, found.method, found.residual_bytes) == (1000 * MIB, "bracket", 4 * MIB)


def test_missing_readings_are_told():
    assert "not read while" in figure({}).reason
    assert "not read before and after" in figure({"during": {"used_bytes": 5, "process_bytes": None}}).reason
    assert figure({"during": {"used_bytes": 5, "process_bytes": 4}}).bytes == 4
