"""What `qlt report` says of changes."""

from __future__ import annotations

from qlora_tools.bench.compare import Change, Compared
from qlora_tools.bench.record import Case
from qlora_tools.cli.commands.report import tell_judgements


class Heard:
    """A screen that keeps what is said."""

    def __init__(self):
        self.said, self.rows = [], []

    def say(self, text=""):
        self.said.append(text)

    def table(self, title, heads, rows, left=1):
        self.rows += rows


def heard(*changes):
    screen = Heard()
    tell_judgements(screen, None, Compared("old", 0.05, changes, (), (), ()))
    return screen


def test_why_nothing_can_be_told_is_said_beside_a_ratio_too():
    screen = heard(Change("a", "a", Case(), "decode", "s", 2e-3, 3e-3, 1.5, None, "unknown", "one round has no interval"))
    assert "a, decode: unknown: one round has no interval" in screen.said and "nothing is worse" in screen.said


def test_a_tie_of_rounding_noise_is_not_explained():
    screen = heard(Change("a", "a", None, "KL", "nats", 1e-13, 2e-13, 1.0, None, "tie", "both are rounding noise"))
    assert screen.said == ["", "nothing is worse"]


def test_errors_are_written_as_shares():
    screen = heard(Change("a", "a", None, "error", "share", 0.02, None, None, None, "worse", "was ok, is oom: no room"))
    assert screen.rows == [["a", "", "error", "2 %", "n/a", "n/a", "", "worse"]]
    assert "a, error: worse: was ok, is oom: no room" in screen.said and "1 figures are worse" in screen.said
