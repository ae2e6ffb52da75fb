"""A tokenizer from somewhere is opened, or refused by the name of its file."""

from __future__ import annotations

import json

import pytest

from qlora_tools.errors import CorruptError, MissingError
from qlora_tools.live.tokenizer import open_tokenizer
from tests.conftest import write_tokenizer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_tokenizer(tmp_path, 160)
    return tmp_path


def test_a_tokenizer_opens(folder):
    assert open_tokenizer(folder)("ab")["input_ids"]


@pytest.mark.parametrize("model", [{"type": "Wordy", "vocab": {}}, 3, None])
def test_a_tokenizer_json_that_the_library_does_not_know_is_corrupt(folder, model):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "model": model}))
    with pytest.raises(CorruptError, match=r"tokenizer\.json is no tokenizer"):
        open_tokenizer(folder)


@pytest.mark.parametrize("content", ["[]", "3", '{"added_tokens_decoder": 3}', '{"tokenizer_class": 3}'])
def test_settings_of_another_kind_are_a_user_s_error(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(MissingError, match="holds no tokenizer that transformers can load"):
        open_tokenizer(folder)
