"""Results on standard output, everything else on standard error, nothing drawn where nobody looks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_tools.cli.screen import Screen, _Bars
from qlora_tools.cli.words import megabytes, percent, plural


@dataclass(frozen=True)
class Record:
    output: Path
    size: int

    @property
    def double(self) -> int:
        return 2 * self.size


def test_json_holds_fields_and_derived_values_and_nothing_else_is_printed(capsys):
    screen = Screen(as_json=True)
    screen.say("words")
    screen.table("", ["a"], [["b"]])
    screen.result(Record(Path("x/y"), 3), "done")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"output": "x/y", "size": 3, "double": 6} and err == ""


def test_quiet_leaves_the_result_alone(capsys):
    screen = Screen(quiet=True)
    screen.say("words")
    screen.remark("note")
    screen.result(Record(Path("x"), 1), "wrote x")
    assert capsys.readouterr() == ("wrote x\n", "")


def test_remarks_go_to_standard_error(capsys):
    Screen().remark("using base b")
    assert capsys.readouterr() == ("", "using base b\n")


def test_no_bar_is_drawn_when_standard_error_is_no_terminal(capsys):
    with Screen().progress.task("work", 3, "B") as task:
        task.advance(3, "unit")
    Screen().progress.note("seen")
    assert capsys.readouterr() == ("", "seen\n")


@pytest.mark.parametrize("unit", ["B", "runs", "steps"])
def test_bars_draw_on_standard_error_only(capsys, unit):
    with _Bars().task("work", 3, unit) as task:
        task.advance(1, "one")
        task.advance(2, "two")
    assert capsys.readouterr().out == ""


def test_tables_fit_and_keep_their_cells(capsys):
    Screen().table("Title", ["name", "value"], [["a", "1"], ["b", "22"]])
    out = capsys.readouterr().out
    assert "Title" in out and "22" in out


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_500_000, "2.5 MB"), (3e9, "3.0 GB"), (5e12, "5000.0 GB")])
def test_sizes_are_decimal(size, text):
    assert megabytes(size) == text


def test_shares_and_counts_read_as_people_write_them():
    assert percent(0.12345) == "12.35 %" and percent(None) == "n/a" and plural(1, "tensor") == "1 tensor" and plural(2, "tensor") == "2 tensors"
