"""What goes along with weights is the folder's own; what a config holds is written as it was read."""

from __future__ import annotations

import json
import math
import os

import pytest

from qlora_tools.errors import CorruptError, StorageError
from qlora_tools.verbs.opening import config_json, copy_all, copy_side_files, given_paths, side_paths


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("vocab.txt", "tokenizer.json", "modeling.py", "optimizer.pt", "config.json", "model.safetensors.index.json"):
        (folder / name).write_text(name)
    return folder


def test_side_files_are_settings_and_never_code_or_weights(model):
    assert [path.name for path in side_paths(model)] == ["tokenizer.json", "vocab.txt"]


def test_a_side_file_that_is_a_link_out_of_the_folder_is_refused_and_not_copied(model, tmp_path):
    (tmp_path / "credentials").write_text("secret")
    (model / "merges.txt").symlink_to(tmp_path / "credentials")
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptError, match=r"merges\.txt is a link that leaves the folder"):
        copy_side_files(model, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_links_inside_the_folder_and_into_the_hubs_blobs_are_copied_as_files(model, tmp_path):
    (model / "merges.txt").symlink_to("vocab.txt")
    blobs, snapshot = tmp_path / "models--x--y/blobs", tmp_path / "models--x--y/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "01").write_text("from the hub")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/01")
    for source, name, text in ((model, "merges.txt", "vocab.txt"), (snapshot, "tokenizer.json", "from the hub")):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        copy_side_files(source, out)
        assert not (out / name).is_symlink() and (out / name).read_text() == text


def test_a_copy_of_all_has_subfolders_and_keeps_links_links(model, tmp_path):
    (model / "checkpoint-1").mkdir()
    (model / "checkpoint-1/vocab.txt").write_text("inner")
    (tmp_path / "credentials").write_text("secret")
    (model / "link.txt").symlink_to(tmp_path / "credentials")
    (tmp_path / "out").mkdir()
    copy_all(model, tmp_path / "out", but=("vocab.txt", "config.json"))
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if not path.is_dir()}
    assert found == {"checkpoint-1/vocab.txt", "link.txt", "tokenizer.json", "modeling.py", "optimizer.pt", "model.safetensors.index.json"}
    assert (tmp_path / "out/link.txt").is_symlink() and (tmp_path / "out/link.txt").readlink() == tmp_path / "credentials"


def test_what_cannot_be_copied_is_named(model, tmp_path):
    os.mkfifo(model / "pipe")
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match="pipe could not be copied: .*named pipe"):
        copy_all(model, tmp_path / "out", but=())


def test_words_and_what_is_not_there_are_no_paths(model, monkeypatch):
    monkeypatch.chdir(model)
    assert [str(path) for path in given_paths("self", None, "", "org/name", "vocab.txt", model)] == ["vocab.txt", str(model)]


def test_a_config_with_infinity_is_written_as_transformers_reads_it():
    config = {"time_step_limit": [0.0, math.inf], "a": -math.inf, "name": "é"}
    assert json.loads(config_json(config)) == config
    assert math.isnan(json.loads(config_json({"x": math.nan}))["x"])
    assert config_json({"b": 1, "a": 2}) == b'{\n  "a": 2,\n  "b": 1\n}\n'
