"""The working folder remembers; a broken memory is an empty one."""

from __future__ import annotations

import json

import click
import pytest

from qlora_tools.cli.session import Session
from qlora_tools.errors import UsageError

EXPORT = {"path": "e", "scheme": "int8", "model": "m", "base": None, "target": None, "adapters": [["a", 0.5]]}


def test_what_was_remembered_is_recalled_and_added_to(tmp_path):
    Session(tmp_path).remember(base="b", adapters=[["a", 1.0]])
    Session(tmp_path).remember(exports=[EXPORT])
    assert Session(tmp_path).recall() == {"base": "b", "adapters": [["a", 1.0]], "exports": [EXPORT]}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"base": 1', "\0", "[" * 100_000, '{"base": NaN}', '{"a": ' * 200 + "1" + "}" * 200])
def test_a_broken_file_is_an_empty_memory(tmp_path, content):
    (tmp_path / ".qlt").mkdir()
    (tmp_path / ".qlt/last.json").write_text(content)
    assert Session(tmp_path).recall() == {}


def test_unknown_fields_are_dropped(tmp_path):
    (tmp_path / ".qlt").mkdir()
    (tmp_path / ".qlt/last.json").write_text('{"base": "b", "evil": "x"}')
    assert Session(tmp_path).recall() == {"base": "b"}


def test_nothing_remembered_names_the_flag(tmp_path):
    with pytest.raises(UsageError) as caught:
        Session(tmp_path).pick("base", "--base")
    assert "--base" in caught.value.hint


def test_none_forgets(tmp_path):
    Session(tmp_path).remember(base="b", text="t")
    Session(tmp_path).remember(text=None)
    assert Session(tmp_path).recall() == {"base": "b"}


def test_paths_are_shown_as_typed_from_the_folder(tmp_path):
    session = Session(tmp_path)
    assert session.relative(tmp_path / "a/b") == "a/b" and session.relative("/elsewhere") == "/elsewhere"


@pytest.mark.parametrize(
    "fields",
    [
        {"base": 3},
        {"run": ["r"]},
        {"adapters": [3]},
        {"adapters": {"a": 1.0}},
        {"adapters": [["a"]]},
        {"adapters": [["a", "x"]]},
        {"adapters": [["a", True]]},
        {"adapters": [[3, 1.0]]},
        {"exports": [1]},
        {"exports": "e"},
        {"exports": [{"path": "e"}]},
        {"exports": [{**EXPORT, "path": 3}]},
        {"exports": [{**EXPORT, "model": []}]},
        {"exports": [{**EXPORT, "adapters": [["a"]]}]},
        {"exports": [EXPORT, {**EXPORT, "adapters": None}]},
    ],
)
def test_what_was_never_written_so_is_forgotten_alone(tmp_path, fields):
    (tmp_path / ".qlt").mkdir()
    (tmp_path / ".qlt/last.json").write_text(json.dumps({"model": "m", **fields}))
    assert Session(tmp_path).recall() == {"model": "m"}
    Session(tmp_path).add_export(EXPORT)
    assert Session(tmp_path).recall() == {"model": "m", "exports": [EXPORT]}


def unwritable(folder):
    """A session whose folder of memory cannot be: a file is in its place. Permissions do not bind everybody who runs tests."""
    (folder / ".qlt").write_text("mine")
    return Session(folder)


def test_a_folder_that_cannot_be_written_costs_one_remark(tmp_path, capsys):
    session = unwritable(tmp_path)
    session.remember(base="b")
    session.add_export(EXPORT)
    out, err = capsys.readouterr()
    assert out == "" and err.count("cannot be written") == err.count("\n") == 1 and (tmp_path / ".qlt").read_text() == "mine"


def test_a_full_disk_leaves_the_memory_as_it_was(tmp_path, monkeypatch, capsys):
    Session(tmp_path).remember(base="b")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    Session(tmp_path).remember(base="c")
    assert Session(tmp_path).recall() == {"base": "b"} and [path.name for path in (tmp_path / ".qlt").iterdir()] == ["last.json"]
    assert "No space left on device" in capsys.readouterr().err


def test_a_quiet_command_does_not_hear_of_it(tmp_path, capsys):
    with click.Context(click.Command("x")) as context:
        context.params["quiet"] = True
        unwritable(tmp_path).remember(base="b")
    assert capsys.readouterr() == ("", "")


def test_a_manifest_that_is_none_tells_no_scheme(tmp_path):
    (tmp_path / "qlt-manifest.json").write_text("[" * 100_000)
    assert Session(tmp_path).scheme_of(str(tmp_path)) is None
