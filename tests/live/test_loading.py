"""Names of stored tensors against where transformers really puts them."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification, MixtralConfig, MixtralForSequenceClassification

from qlora_tools.live.loading import loaded_names

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def empty(owner, config):
    with torch.device("meta"):
        return owner(config)


def test_prefixes_and_older_names_are_told():
    model = empty(BertForSequenceClassification, BertConfig(**SIZES))
    expected = {
        "embeddings.LayerNorm.gamma": "bert.embeddings.LayerNorm.weight",
        "bert.embeddings.LayerNorm.beta": "bert.embeddings.LayerNorm.bias",
        "pooler.dense.weight": "bert.pooler.dense.weight",
        "classifier.weight": "classifier.weight",
    }
    found = loaded_names(model, expected)
    assert found == {stored: (loaded, False) for stored, loaded in expected.items()}
    assert all(loaded in model.state_dict() for loaded, _ in found.values())
    assert loaded_names(model, ["cls.predictions.bias"])["cls.predictions.bias"][0] not in model.state_dict()


def test_what_becomes_part_of_a_larger_tensor_is_told():
    model = empty(MixtralForSequenceClassification, MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2))
    loaded, gathered = loaded_names(model, ["model.layers.0.block_sparse_moe.experts.1.w1.weight"]).popitem()[1]
    assert gathered and loaded in model.state_dict()
