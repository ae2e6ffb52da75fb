"""A checkpoint under other names gives the same values, whatever they are stored in, and knows what they are called in its folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.checkpoint.renamed import RenamedCheckpoint, as_stored, stored_name
from qlora_tools.errors import MissingError
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import spec_of

NAMES = {"layer.query.weight": "bert.layer.query.weight", "norm.gamma": "bert.norm.weight"}


@pytest.fixture(params=[None, NF4(), Int8()], ids=["dense", "nf4", "int8"])
def opened(request, tmp_path):
    torch.manual_seed(0)
    dense = torch.randn(64, 64).bfloat16()
    parts = {"layer.query.weight": dense} if request.param is None else request.param.encode(spec_of("layer.query.weight", dense), dense)
    save_file({**parts, "norm.gamma": torch.ones(64), "cls.bias": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "dtype": "bfloat16"}))
    return open_checkpoint(tmp_path)


def test_values_are_the_same_and_what_is_not_named_is_left_out(opened):
    renamed = RenamedCheckpoint(opened, NAMES, {"model_type": "bert", "new": 1}, known=())
    assert set(renamed.specs) == set(NAMES.values()) and renamed.config == {"model_type": "bert", "new": 1} and renamed.folder == opened.folder
    for old, new in NAMES.items():
        assert renamed.specs[new].shape == opened.specs[old].shape and renamed.specs[new].name == new
        assert torch.equal(renamed.read(new), opened.read(old)) and torch.equal(renamed.read(new, (3, 5)), opened.read(old, (3, 5)))
        assert renamed.sha256(new) == opened.sha256(old) and stored_name(renamed, new) == old
    assert {f"bert.{part}" for item in opened.quantized.values() for part in item.parts} == {part for item in renamed.quantized.values() for part in item.parts}
    with pytest.raises(MissingError, match="cls.bias"):
        renamed.stored.read("cls.bias")


def test_the_checkpoint_in_the_folder_stays_at_hand(opened):
    renamed = RenamedCheckpoint(opened, NAMES, {}, known=())
    assert as_stored(renamed) is opened and as_stored(opened) is opened
    assert stored_name(renamed, "cls.bias") is None and stored_name(opened, "cls.bias") == "cls.bias"


def test_only_what_the_new_class_knows_is_tied(tmp_path):
    save_file({"bert.embeddings.word_embeddings.weight": torch.ones(4, 2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "bert"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened, name = open_checkpoint(tmp_path), "bert.embeddings.word_embeddings.weight"
    assert opened.ties == {"cls.predictions.decoder.weight": name}
    assert RenamedCheckpoint(opened, {name: name}, config, known={"cls.predictions.decoder.weight"}).ties == opened.ties
    assert RenamedCheckpoint(opened, {name: name}, config, known={name}).ties == {}
