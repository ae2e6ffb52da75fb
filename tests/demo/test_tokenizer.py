from __future__ import annotations

import json

import pytest

from qlora_tools.demo.corpus import Document
from qlora_tools.demo.tokenizer import BOS_ID, EOS_ID, PAD_ID, pack, save_tokenizer, train_tokenizer

DOCUMENTS = [Document(f"d{index}", f"def function_{index}(value):\n    return value + {index}\n" * 20) for index in range(10)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, vocab_size=320)


@pytest.mark.parametrize("text", ["", "def f(x):\n\treturn x\n", "naïve – 日本語 🙂\r\n", "    indented", "\x00\x7f"])
def test_every_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_have_the_ids_the_config_states(tokenizer):
    assert [tokenizer.token_to_id(token) for token in ("<|bos|>", "<|eos|>", "<|pad|>")] == [BOS_ID, EOS_ID, PAD_ID]


def test_transformers_loads_what_is_saved_and_encodes_alike(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def g(y):\n    return y * 2  # é\n"
    assert loaded(text).input_ids == tokenizer.encode(text).ids
    assert loaded.decode(loaded(text).input_ids) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)


def test_same_text_gives_the_same_file(tmp_path, tokenizer):
    again = train_tokenizer(DOCUMENTS, vocab_size=320)
    assert json.loads(again.to_str()) == json.loads(tokenizer.to_str())


def test_packed_documents_come_in_order_and_each_ends_with_eos(tokenizer):
    expected = [token for document in DOCUMENTS[:3] for token in [*tokenizer.encode(document.text).ids, EOS_ID]]
    assert pack(tokenizer, DOCUMENTS[:3]) == expected
