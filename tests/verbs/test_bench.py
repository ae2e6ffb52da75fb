"""Names in a benchmark's table: unique, and no longer than they must be."""

from __future__ import annotations

from pathlib import Path

from qlora_tools.verbs.bench import next_run, short_labels, unique_names


def names(function, *paths):
    return list(function([Path(path) for path in paths]).values())


def test_folders_are_called_by_their_last_part_where_that_is_enough():
    assert names(unique_names, "/x/a", "/y/b") == ["a", "b"]


def test_equal_last_parts_get_one_more_part():
    assert names(unique_names, "/run1/int8", "/run2/int8") == ["run1/int8", "run2/int8"]


def test_labels_drop_the_words_that_all_begin_with():
    assert names(short_labels, "/e/base-r16-fp32", "/e/base-r16-int8") == ["fp32", "int8"]
    assert names(short_labels, "/e/base", "/e/base-nf4") == ["base", "base-nf4"]
    assert names(short_labels, "/e/base-nf4") == ["base-nf4"]


def test_runs_are_numbered_from_the_first_free(tmp_path):
    (tmp_path / "bench-001").mkdir()
    assert next_run(tmp_path) == tmp_path / "bench-002"
