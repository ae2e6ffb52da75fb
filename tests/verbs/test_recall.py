"""What an export was made of, found again: nothing is downloaded for a manifest's word, and what lies where it says must be what it says."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest

from qlora_tools.checkpoint import hub
from qlora_tools.errors import MissingError
from qlora_tools.manifest import Manifest
from qlora_tools.progress import SILENT
from qlora_tools.verbs.recall import recall

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of a hub that must not be asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "_download", lambda *words: pytest.fail("asked the hub"))
    return tmp_path / "hub"


def made_of(**inputs):
    return Manifest("export", {"verb": "export", "scheme": "int8"}, inputs=inputs)


def found(manifest, folder, against=None, adapters=()):
    return recall(manifest, folder, against, adapters, SILENT)


def test_a_base_on_the_hub_is_named_and_not_downloaded(cache, tmp_path):
    with pytest.raises(MissingError, match="made of `big`, which is not in this machine's cache") as refused:
        found(made_of(model={"name": "big", "hub": "evil/300GB"}), tmp_path)
    assert "--against evil/300GB" in refused.value.hint


def test_a_base_in_the_cache_is_taken(cache, tmp_path, llama):
    snapshot = shutil.copytree(llama, cache / f"models--org--name/snapshots/{COMMIT}")
    assert found(made_of(model={"name": "org-name", "hub": f"org/name@{COMMIT}"}), tmp_path).checkpoint == snapshot


def test_adapters_on_the_hub_and_folders_that_hold_none_are_missing(cache, tmp_path, llama):
    (tmp_path / "empty").mkdir()
    inputs = {"model": {"name": "base"}, "adapter": {"name": "a", "hub": "evil/300GB"}, "adapter1": {"name": "b", "path": "../empty"}}
    again = found(made_of(**inputs, branch={"name": "c", "path": "../empty"}), tmp_path / "e", against=llama)
    assert again.missing == ("`a`", "`b`") and again.changed == () and again.parts == ()


def test_a_calibration_that_is_no_file_is_not_read(cache, tmp_path, llama):
    (tmp_path / "empty").mkdir()
    again = found(made_of(model={"name": "base"}, calibration={"name": "x", "path": "../empty"}), tmp_path / "e", against=llama)
    assert again.statistics is None and again.changed == ()


def test_a_given_adapter_without_weights_is_named(cache, tmp_path, llama):
    (tmp_path / "half").mkdir()
    (tmp_path / "half/adapter_config.json").write_text("{}")
    with pytest.raises(MissingError, match="adapter_model.safetensors"):
        found(made_of(model={"name": "base"}), tmp_path / "e", against=llama, adapters=[(tmp_path / "half", 1.0)])
