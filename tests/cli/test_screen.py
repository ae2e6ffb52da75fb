"""Results on standard output, everything else on standard error, nothing drawn where nobody looks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_tools.cli.run_screen import RunScreen
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


def test_names_in_brackets_and_colons_stay_as_they_are_in_tables(capsys):
    Screen().table("model[v2] [bold]", ["[/b]"], [["x[/b].weight"], ["a:smile:b"], ["[red]y"]])
    out = capsys.readouterr().out
    assert all(text in out for text in ("model[v2]", "[bold]", "[/b]", "x[/b].weight", "a:smile:b", "[red]y"))


def test_nothing_that_is_shown_steers_the_terminal(capsys):
    evil, spelt = "x\x1b[2J\x9b\u202e", "x\\x1b[2J\\x9b\\u202e"
    screen = Screen()
    screen.say(evil)
    screen.remark(evil)
    screen.result(None, evil)
    screen.table(evil, ["a"], [[evil]])
    screen.card("card", [(evil, evil)])
    screen.progress.note(evil)
    out, err = capsys.readouterr()
    assert out.count(spelt) == 6 and err.count(spelt) == 2 and not {"\x1b", "\x9b", "\u202e"} & {*out, *err}


def test_json_holds_the_very_characters(capsys):
    Screen(as_json=True).result({"name": "x\x1b[2J"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": "x\x1b[2J"} and "\x1b" not in out


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Standard error as rich draws it on a wide terminal; call it for what was drawn."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    return lambda: capsys.readouterr().err


def test_bars_draw_names_as_they_are(terminal):
    with _Bars().task("read m[/b]\x1b[2J", 3, "runs") as task:
        task.advance(1, "x[/i].weight\x1b]0;title\x07")
    drawn = terminal()
    assert "read m[/b]\\x1b[2J" in drawn and "x[/i].weight\\x1b]0;title\\x07" in drawn and "\x1b[2J" not in drawn and "\x1b]0" not in drawn


def test_the_run_s_bar_draws_names_as_they_are(terminal, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    screen = RunScreen(Screen())
    with screen.task("train", 2) as task:
        screen.note("note[/b]\x1b[2J")
        with screen.task("read m[/b]\x1b[2J", 3) as row:
            row.advance(3)
        task.advance(2)
    drawn = terminal()
    assert "note[/b]\\x1b[2J" in drawn and "read m[/b]\\x1b[2J" in drawn and "\x1b[2J" not in drawn


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_500_000, "2.5 MB"), (3e9, "3.0 GB"), (5e12, "5000.0 GB")])
def test_sizes_are_decimal(size, text):
    assert megabytes(size) == text


def test_shares_and_counts_read_as_people_write_them():
    assert percent(0.12345) == "12.35 %" and percent(None) == "n/a" and plural(1, "tensor") == "1 tensor" and plural(2, "tensor") == "2 tensors"
