"""A run drawn again in its own folder: every file whole, and nothing written through a link."""

from __future__ import annotations

import pytest

from qlora_tools import api
from qlora_tools.checkpoint.folder import output_folder
from qlora_tools.errors import OutputExistsError
from qlora_tools.manifest import read_manifest
from qlora_tools.verbs import report as verb
from tests.bench.bench_records import make_record


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose one plot is quick to draw."""
    monkeypatch.setattr(verb, "write_plots", lambda record, folder: (folder / "decode.png").write_bytes(b"drawn"))
    with output_folder(tmp_path / "bench-001") as folder:
        verb.write_report(make_record(), folder)
    return tmp_path / "bench-001"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_plots_that_are_no_folder_of_the_run_are_refused_before_anything_is_drawn(run, tmp_path, kind):
    (run / "plots/decode.png").unlink()
    (run / "plots").rmdir()
    (tmp_path / "mine").mkdir()
    if kind == "link":
        (run / "plots").symlink_to(tmp_path / "mine")
    else:
        (run / "plots").write_text("mine")
    (run / "report.html").write_text("before")
    with pytest.raises(OutputExistsError, match="plots is not the run's own folder"):
        api.report(runs=[run])
    assert list((tmp_path / "mine").iterdir()) == [] and (run / "report.html").read_text() == "before"


def test_files_of_the_run_that_became_links_are_replaced_and_not_followed(run, tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes((run / "qlt-manifest.json").read_bytes() + b"\n")
    before = mine.read_bytes()
    for name in ("report.html", "report.md", "qlt-manifest.json"):
        (run / name).unlink()
        (run / name).symlink_to(mine)
    api.report(runs=[run])
    assert mine.read_bytes() == before and not any(path.is_symlink() for path in run.iterdir())
    assert "<html" in (run / "report.html").read_text()


def test_a_redrawn_run_is_sealed_as_a_new_one(run):
    first = read_manifest(run).files
    api.report(runs=[run])
    assert read_manifest(run).files == first and "qlt-manifest.json" not in first
