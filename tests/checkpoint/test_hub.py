"""Model arguments resolve to folders; what is neither a folder nor a hub id says so at once."""

from __future__ import annotations

import pytest

from qlora_tools.checkpoint import hub
from qlora_tools.errors import MissingError


def test_a_folder_is_itself(tmp_path):
    assert hub.resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./not/here", "/not/here", "a/b/c", "with space", "../x"])
def test_paths_that_are_not_there_are_not_looked_up_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(MissingError):
        hub.resolve_model(name)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MissingError, match="is a file"):
        hub.resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(("name", "asked"), [("org/name", ("org/name", None)), ("org/name@v1.0", ("org/name", "v1.0")), ("gpt2", ("gpt2", None))])
def test_hub_ids_are_downloaded_at_their_revision(monkeypatch, tmp_path, name, asked):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(hub, "_download", lambda *arguments: seen.append(arguments) or tmp_path)
    assert hub.resolve_model(name) == tmp_path and [arguments[:2] for arguments in seen] == [asked]


def test_only_data_files_are_fetched(monkeypatch, tmp_path):
    import huggingface_hub

    seen = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **options: seen.update(options) or str(tmp_path))
    assert hub.resolve_model("org/name") == tmp_path
    assert not {"*.py", "*.bin", "*.pt"} & set(seen["allow_patterns"])


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_, **__):
        raise LocalEntryNotFoundError("no network\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(MissingError, match="neither a folder here nor a repository.*no network$"):
        hub.resolve_model("org/name")


def test_of_a_hub_id_only_the_config_is_fetched_where_it_is_enough(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(hub, "_download", lambda *arguments: seen.append(arguments) or tmp_path)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_config("org/name@v1") == tmp_path / "config.json"
    assert seen == [("org/name", "v1", ["config.json"])]
    (tmp_path / "mine.json").write_text("{}")
    assert hub.resolve_config("mine.json").name == "mine.json"
    with pytest.raises(MissingError, match=r"no config\.json"):
        hub.resolve_config(str(tmp_path))


def test_a_snapshot_in_the_cache_is_found_without_asking_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("asked the hub"))
    commit = "c0ffee" + "0" * 34
    (tmp_path / f"models--org--name/snapshots/{commit}").mkdir(parents=True)
    (tmp_path / "models--org--name/refs").mkdir()
    (tmp_path / "models--org--name/refs/main").write_text(commit)
    assert hub.cached_model("org/name") is None, "an estimate fetches config.json alone"
    (tmp_path / f"models--org--name/snapshots/{commit}/model.safetensors").touch()
    assert hub.cached_model(f"org/name@{commit}") == hub.cached_model("org/name") == tmp_path / f"models--org--name/snapshots/{commit}"
    assert [hub.cached_model(name) for name in ("org/other", "org/name@other", "org/name@../../x", "../x", "a/b/c", "", "/etc")] == [None] * 7
