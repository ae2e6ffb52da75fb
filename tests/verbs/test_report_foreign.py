"""``report`` of records that somebody else wrote: told as what they are, and never half drawn."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from qlora_tools import api
from qlora_tools.bench.record import Quality
from qlora_tools.errors import CorruptError
from qlora_tools.progress import SILENT
from qlora_tools.verbs.report import latest_run
from tests.bench.bench_records import make_record


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with a record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_tools.verbs.report.write_plots", lambda record, folder: None)
    return stored(tmp_path / "run", make_record())


def stored(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_bytes(record.to_json())
    return folder


def undrawable():
    """Judged, by a probe that does not say on what."""
    return replace(make_record(), quality=(Quality("fp32", "fp32", "ok", None, {"kl_mean": 0.0}),))


def test_figures_that_cannot_be_drawn_are_the_files_fault(run, tmp_path):
    stored(run, undrawable())
    for words in ({}, {"output": tmp_path / "pages"}, {"dry_run": True}):
        with pytest.raises(CorruptError, match=r"run/bench.json holds figures that cannot be drawn: KeyError"):
            api.report(runs=[run], **words)
    assert [path.name for path in run.iterdir()] == ["bench.json"] and not (tmp_path / "pages").exists()


def test_what_fails_while_pictures_are_drawn_is_the_files_fault_too(run, tmp_path, monkeypatch):
    def fail(record, folder):
        raise StopIteration

    monkeypatch.setattr("qlora_tools.verbs.report.write_plots", fail)
    with pytest.raises(CorruptError, match="bench.json holds figures"):
        api.report(runs=[run / "bench.json"], output=tmp_path / "pages")
    assert not (tmp_path / "pages").exists()


def test_a_baseline_that_cannot_be_read_is_named(run, tmp_path):
    other = json.loads(make_record().to_json())
    other["rows"].pop(1)
    (tmp_path / "old.json").write_text(json.dumps(other))
    with pytest.raises(CorruptError, match=r"old.json: `rows` lacks 'int8'"):
        api.report(runs=[run], compare=tmp_path / "old.json")


class Hearing:
    """Keeps the notes."""

    def __init__(self):
        self.notes = []

    @contextmanager
    def task(self, *words):
        with SILENT.task(*words) as task:
            yield task

    def note(self, message):
        self.notes.append(message)


def test_a_run_that_cannot_be_read_is_named_and_hides_no_other(run, tmp_path):
    runs, hearing = tmp_path / "runs", Hearing()
    last = stored(runs / "bench-001", make_record())
    (runs / "bench-002").mkdir()
    (runs / "bench-002/bench.json").write_text("[" * 100_000)
    (runs / "bench-003/bench.json").mkdir(parents=True)
    assert latest_run(runs, hearing) == last
    assert len(hearing.notes) == 2 and all(note.startswith("left out: ") for note in hearing.notes) and "bench-002" in "".join(hearing.notes)
    (last / "bench.json").unlink()
    (runs / "bench-003/bench.json").rmdir()
    with pytest.raises(CorruptError, match="bench-002"):
        latest_run(runs)
