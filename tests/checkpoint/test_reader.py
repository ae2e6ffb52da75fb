"""A folder is read only when its index, its shards and its names agree and stay inside it."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from qlora_tools.checkpoint.reader import CheckpointReader, tensor_sha256
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError

A = {"a.weight": torch.arange(6.0).reshape(2, 3)}
B = {"b.weight": torch.arange(4.0).to(torch.bfloat16), "scalar": torch.tensor(3)}


@pytest.fixture
def folder(tmp_path):
    save_file(A, tmp_path / "model-00001-of-00002.safetensors")
    save_file(B, tmp_path / "model-00002-of-00002.safetensors")
    index(
        tmp_path, {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors", "scalar": "model-00002-of-00002.safetensors"}
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_tensors_read_by_name(folder):
    reader = CheckpointReader(folder)
    assert list(reader.specs) == ["a.weight", "b.weight", "scalar"] and reader.config["model_type"] == "llama"
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in {**A, **B}.items())
    assert torch.equal(reader.read("a.weight", (1, 2)), A["a.weight"][1:2])


def test_the_hash_is_that_of_the_stored_bytes(folder):
    reader = CheckpointReader(folder)
    for name, tensor in {**A, **B}.items():
        expected = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        assert reader.sha256(name) == tensor_sha256(tensor) == expected


def test_headers_tell_two_models_apart_and_equal_models_together(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_file({"a.weight": torch.zeros(3, 2)}, other / "model.safetensors")
    assert CheckpointReader(folder).headers_sha256() != CheckpointReader(other).headers_sha256() == CheckpointReader(other).headers_sha256()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..",
        "",
        "C:\\x.safetensors",
        "\\\\host\\x.safetensors",
        "a\0.safetensors",
        "weights.bin",
        "~/x.safetensors",
        ".safetensors",
        "x.safetensors/../../y",
    ],
)
def test_shard_names_that_leave_the_folder_are_refused(folder, name):
    index(folder, {"a.weight": name})
    with pytest.raises(CorruptError, match="names the file"):
        CheckpointReader(folder)


def test_a_link_out_of_the_folder_is_refused_and_a_hub_cache_is_read(tmp_path):
    blobs, snapshot = tmp_path / "models--x--y/blobs", tmp_path / "models--x--y/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(A, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert torch.equal(CheckpointReader(snapshot).read("a.weight"), A["a.weight"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").symlink_to(blobs / "0123")
    with pytest.raises(CorruptError, match="leaves the folder"):
        CheckpointReader(elsewhere)


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match="model-00002-of-00002"):
        CheckpointReader(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(folder):
    index(folder, {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(CorruptError, match="disagree on 1 tensors: scalar"):
        CheckpointReader(folder)


def test_a_stale_single_file_beside_an_index_is_refused(folder):
    save_file(A, folder / "model.safetensors")
    with pytest.raises(CorruptError, match="holds both"):
        CheckpointReader(folder)


@pytest.mark.parametrize("content", ["[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_the_wrong_form_is_refused(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CorruptError):
        CheckpointReader(folder)


def test_pickle_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UnsupportedError, match="pickle") as caught:
        CheckpointReader(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_an_adapter_folder_is_not_mistaken_for_a_model(tmp_path):
    save_file(A, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedError, match="is an adapter"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_weights_says_what_is_missing(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError):
        CheckpointReader(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_config_or_an_index_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory, name):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / name
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(CorruptError, match=rf"{name} is a link that leaves the folder"):
        CheckpointReader(folder)


def test_a_config_in_a_hub_cache_is_read_through_its_link(tmp_path):
    blobs, snapshot = tmp_path / "models--x--y/blobs", tmp_path / "models--x--y/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "4567").write_text('{"model_type": "llama"}')
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    save_file(A, snapshot / "model.safetensors")
    assert CheckpointReader(snapshot).config == {"model_type": "llama"}


@pytest.mark.parametrize("text", [r'{"fine": 1, "note": "\ud800"}', r'{"fine": 1, "note": {"a": ["\uDFFF\ud83d"]}}', r'{"note\udc00": 1}'])
def test_half_a_character_is_refused_by_its_key(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CorruptError, match=r"config\.json: 'note.*half of a character"):
        CheckpointReader(folder)


def test_a_whole_character_spelt_in_halves_is_read(folder):
    (folder / "config.json").write_text(r'{"note": "\ud83d\ude00", "path": "C:\\udata"}')
    assert CheckpointReader(folder).config == {"note": "\U0001f600", "path": "C:\\udata"}
