"""The working folder remembers; a broken memory is an empty one."""

from __future__ import annotations

import pytest

from qlora_tools.cli.session import Session
from qlora_tools.errors import UsageError


def test_what_was_remembered_is_recalled_and_added_to(tmp_path):
    Session(tmp_path).remember(base="b", adapters=[["a", 1.0]])
    Session(tmp_path).remember(exports=["e"])
    assert Session(tmp_path).recall() == {"base": "b", "adapters": [["a", 1.0]], "exports": ["e"]}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"base": 1', "\0"])
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
