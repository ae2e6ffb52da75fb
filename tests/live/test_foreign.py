"""Folders that somebody else made: what transformers would read of them, and what it raises about them, told before and in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_tools.errors import CorruptError, MissingError, UnsupportedError
from qlora_tools.live.foreign import check_weight_files, load_foreign


class Owner:
    """A class of a library that raises what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.words = error, dict[str, Any]()

    def from_pretrained(self, folder: Path, **words: Any) -> str:
        self.words = words
        if self.error is not None:
            raise self.error
        return "a model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


def index(folder: Path, *names: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"t{number}": name for number, name in enumerate(names)}}))


def test_words_reach_the_class_as_they_are(folder: Path) -> None:
    owner = Owner()
    assert load_foreign(owner, folder, {}, {"dtype": "auto"}) == "a model" and owner.words == {"dtype": "auto"}


@pytest.mark.parametrize("error", [ValueError("a"), OSError("b"), RuntimeError("c"), ZeroDivisionError("d"), StopIteration("e"), AttributeError("f")])
def test_whatever_a_library_raises_about_a_folder_is_one_refusal(folder: Path, error: Exception) -> None:
    with pytest.raises(UnsupportedError, match=f"transformers cannot load it: {error}") as raised:
        load_foreign(Owner(error), folder, {}, {})
    assert raised.value.hint
    with pytest.raises(UnsupportedError, match="diffusers cannot load it") as raised:
        load_foreign(Owner(error), folder, {"auto_map": {}}, {}, library="diffusers")
    assert "never run" in str(raised.value.hint)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("CUDA error: device-side assert"), ImportError("bitsandbytes")])
def test_what_the_machine_lacks_is_not_put_down_to_the_folder(folder: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        load_foreign(Owner(error), folder, {}, {})
    assert raised.value is error


def test_memory_that_runs_out_is_not_the_folders_fault(folder: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        load_foreign(Owner(torch.OutOfMemoryError("full")), folder, {}, {})


def test_a_folder_of_pickles_is_refused_and_one_without_weights_is_missing_them(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no weights in safetensors"):
        check_weight_files(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin: pickle files can run code"):
        check_weight_files(tmp_path, {})


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "pytorch_model-00001.bin", "a/b.safetensors"])
def test_an_index_that_names_another_place_or_a_pickle_is_refused(folder: Path, name: str) -> None:
    index(folder, "model.safetensors")
    check_weight_files(folder, {})
    index(folder, "model.safetensors", name)
    with pytest.raises(CorruptError, match="the index names the file"):
        check_weight_files(folder, {})


def test_a_config_that_names_a_pickle_as_its_weights_is_refused(folder: Path) -> None:
    check_weight_files(folder, {"transformers_weights": None})
    with pytest.raises(CorruptError, match=r"adapter_model\.bin"):
        check_weight_files(folder, {"transformers_weights": "adapter_model.bin"})


def test_an_adapter_inside_the_folder_needs_safetensors_too(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UnsupportedError, match=r"no adapter_model\.safetensors"):
        check_weight_files(folder, {})
