import pytest

from qlora_tools.errors import UsageError
from qlora_tools.quality.retention import retention


def test_the_ends_and_the_middle_of_the_scale():
    assert retention(190.0, 117.0, 117.0) == 1.0
    assert retention(190.0, 117.0, 190.0) == 0.0
    assert retention(100.0, 25.0, 50.0) == pytest.approx(0.5)
    assert retention(100.0, 50.0, 200.0) == pytest.approx(-1.0)


def test_a_fine_tune_that_gained_nothing_has_no_retention():
    assert retention(100.0, 100.0, 90.0) is None
    assert retention(100.0, 120.0, 110.0) is None


@pytest.mark.parametrize("bad", [0.5, float("nan"), float("inf")])
def test_impossible_perplexities_are_refused(bad):
    with pytest.raises(UsageError, match="perplexity of x"):
        retention(100.0, 50.0, bad)
