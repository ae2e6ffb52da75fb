"""An output folder is whole or absent, and nothing that was there before is lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qlora_tools.checkpoint import folder as folder_module
from qlora_tools.checkpoint.folder import output_folder, replace_file, seal
from qlora_tools.errors import OutputExistsError, StorageError, UsageError
from qlora_tools.manifest import Manifest, read_manifest, sha256_file


def make(dest, text="new", **options):
    with output_folder(dest, **options) as folder:
        (folder / "weights").write_text(text)
        seal(folder, Manifest("checkpoint", {"verb": "test"}))


def test_success_leaves_exactly_the_files_and_a_manifest_of_them(tmp_path):
    make(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["qlt-manifest.json", "weights"]
    assert read_manifest(tmp_path / "out").files == {"weights": {"sha256": sha256_file(tmp_path / "out/weights"), "bytes": 3}}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_any_failure_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), output_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_untouched(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(OutputExistsError):
        make(tmp_path / "out", "new")
    assert (tmp_path / "out/weights").read_text() == "old"


def test_force_replaces_our_own_output_and_leaves_no_rest(tmp_path):
    make(tmp_path / "out", "old")
    make(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out/weights").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old_output(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(RuntimeError), output_folder(tmp_path / "out", force=True):
        raise RuntimeError
    assert (tmp_path / "out/weights").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_does_not_replace_what_qlt_did_not_make(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="not made by qlt"):
        make(tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis/chapter1.tex").read_text() == "years of work"


def test_an_empty_folder_may_become_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out")
    assert (tmp_path / "out/weights").exists()


@pytest.mark.parametrize("output", ["in", "in/sub", "."])
def test_an_output_that_overlaps_an_input_is_refused(tmp_path, output):
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match="overlaps"):
        make(tmp_path / output, inputs=[tmp_path / "in"], force=True)


def test_an_output_reached_through_a_link_is_still_seen_as_the_input(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    with pytest.raises(UsageError, match="overlaps"):
        make(tmp_path / "alias", inputs=[tmp_path / "in"], force=True)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="posix only")
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be made"):
        make(tmp_path / "file" / "out")


def test_the_second_of_two_writers_loses_cleanly(tmp_path):
    with pytest.raises(OutputExistsError, match="meanwhile"), output_folder(tmp_path / "out") as folder:
        (folder / "weights").write_text("slow")
        make(tmp_path / "out", "fast")
    assert (tmp_path / "out/weights").read_text() == "fast" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_leaves_only_a_hidden_partial(tmp_path):
    script = f"""
        import os, pathlib, signal
        from qlora_tools.checkpoint.folder import output_folder
        with output_folder(pathlib.Path({str(tmp_path / "out")!r})) as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    for content in (b"old", b"new"):
        replace_file(path, content)
        assert path.read_bytes() == content

    def full(self, target):
        assert self.read_bytes() == b"newer"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match=r"run\.json failed: No space"):
        replace_file(path, b"newer")
    assert [(item.name, item.read_bytes()) for item in tmp_path.iterdir()] == [("run.json", b"new")]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_without_an_exchange_an_interruption_between_the_renames_brings_the_old_output_back(tmp_path, monkeypatch, stop):
    make(tmp_path / "out", "old")
    rename = Path.rename

    def interrupted(self, target):
        if self.suffix == ".partial" and not Path(target).exists():
            raise stop
        return rename(self, target)

    monkeypatch.setattr(folder_module, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(stop):
        make(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out/weights").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_an_exchange_the_new_output_takes_the_place_of_the_old(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_exchange", lambda first, second: False)
    make(tmp_path / "out", "old")
    make(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out/weights").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sealing_again_replaces_a_link_and_not_what_it_points_to_and_counts_neither(tmp_path):
    make(tmp_path / "out")
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    for name in ("qlt-manifest.json", "linked"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
        (tmp_path / "out" / name).symlink_to(mine)
    seal(tmp_path / "out", Manifest("checkpoint", {"verb": "test"}))
    sealed = seal(tmp_path / "out", Manifest("checkpoint", {"verb": "test"}))
    assert mine.read_text() == "{}" and set(sealed.files) == {"weights"} and read_manifest(tmp_path / "out").files == sealed.files


def test_a_link_to_nothing_does_not_keep_an_output_from_being_written(tmp_path):
    with output_folder(tmp_path / "out") as folder:
        (folder / "dangling").symlink_to("nowhere")
    assert (tmp_path / "out/dangling").is_symlink()
