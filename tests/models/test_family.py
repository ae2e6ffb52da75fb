"""Roles and target presets on the module paths of real model classes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_tools.errors import UsageError
from qlora_tools.models.family import TARGET_PRESETS, family_of, known_families

DECODER = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
ENCODER = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA_LIKE = {
    "minimal": {"q_proj", "v_proj"},
    "qkv": {"q_proj", "k_proj", "v_proj"},
    "attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
FUSED = {"minimal": {"query_key_value"}, "qkv": {"query_key_value"}, "attn": {"query_key_value", "dense"}, "mlp": {"dense_h_to_4h", "dense_4h_to_h"}}
#: (class, settings) -> what each preset takes, by the last part of the path. ``all`` is their union unless given.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, set[str]]]] = {
    "llama": ("LlamaForCausalLM", DECODER, LLAMA_LIKE),
    "mistral": ("MistralForCausalLM", DECODER, LLAMA_LIKE),
    "qwen2": ("Qwen2ForCausalLM", DECODER, LLAMA_LIKE),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8}, LLAMA_LIKE),
    "gemma": ("GemmaForCausalLM", {**DECODER, "head_dim": 8}, LLAMA_LIKE),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 8}, LLAMA_LIKE),
    "gemma3_text": ("Gemma3ForCausalLM", {**DECODER, "head_dim": 8}, LLAMA_LIKE),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": {**DECODER, "head_dim": 8}, "vision_config": {**ENCODER, "image_size": 32, "patch_size": 16}},
        {
            "minimal": {"q_proj", "v_proj"},
            "qkv": {"q_proj", "k_proj", "v_proj"},
            "attn": {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj"},
            "mlp": {"gate_proj", "up_proj", "down_proj", "fc1", "fc2"},
            "all": {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "patch_embedding"},
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 4},
        {"minimal": {"c_attn"}, "qkv": {"c_attn"}, "attn": {"c_attn", "c_proj"}, "mlp": {"c_fc", "c_proj"}},
    ),
    "bert": (
        "BertForSequenceClassification",
        ENCODER,
        {"minimal": {"query", "value"}, "qkv": {"query", "key", "value"}, "attn": {"query", "key", "value", "dense"}, "mlp": {"dense"}},
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        ENCODER,
        {"minimal": {"query", "value"}, "qkv": {"query", "key", "value"}, "attn": {"query", "key", "value", "dense"}, "mlp": {"dense"}},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4},
        {
            "minimal": {"q_lin", "v_lin"},
            "qkv": {"q_lin", "k_lin", "v_lin"},
            "attn": {"q_lin", "k_lin", "v_lin", "out_lin"},
            "mlp": {"lin1", "lin2"},
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 61, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 4},
        {"minimal": {"q", "v"}, "qkv": {"q", "k", "v"}, "attn": {"q", "k", "v", "o"}, "mlp": {"wi", "wo"}},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**ENCODER}, FUSED),
    "falcon": ("FalconForCausalLM", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}, FUSED),
    "phi3": (
        "Phi3ForCausalLM",
        {**DECODER, "pad_token_id": 0},
        {"minimal": {"qkv_proj"}, "qkv": {"qkv_proj"}, "attn": {"qkv_proj", "o_proj"}, "mlp": {"gate_up_proj", "down_proj"}},
    ),
    "modernbert": ("ModernBertModel", {**ENCODER, "pad_token_id": 0}, {"minimal": {"Wqkv"}, "qkv": {"Wqkv"}, "attn": {"Wqkv", "Wo"}, "mlp": {"Wi", "Wo"}}),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32},
        {
            "minimal": {"q_proj", "v_proj"},
            "qkv": {"q_proj", "k_proj", "v_proj"},
            "attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
            "mlp": {"fc1", "fc2"},
            "all": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"},
        },
    ),
    "resnet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, {"all": {"convolution"}}),
}


def layers(name: str) -> tuple[Any, list[str]]:
    """(config, paths of the layers that multiply) of a model without weights."""
    kind, settings, _ = CASES[name]
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**settings))
    return model.config, [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | Conv1D)]


@pytest.mark.parametrize("name", CASES)
def test_presets_take_the_projections_of_real_models(name: str) -> None:
    config, paths = layers(name)
    family = family_of(vars(config) | {"model_type": config.model_type})
    expected = CASES[name][2]
    everything = expected.get("all", set().union(*expected.values()))
    for preset in TARGET_PRESETS:
        wanted = everything if preset == "all" else expected.get(preset)
        if wanted is None:
            with pytest.raises(UsageError, match="matches none"):
                family.targets(preset, paths)
            continue
        assert {path.rpartition(".")[2] for path in family.targets(preset, paths)} == wanted, preset


@pytest.mark.parametrize("name", CASES)
def test_all_takes_every_layer_but_the_heads(name: str) -> None:
    config, paths = layers(name)
    left = set(paths) - set(family_of({"model_type": config.model_type}).targets("all", paths))
    assert all(re.search(r"lm_head|classifier|embed_out", path) for path in left), left


def test_gpt2_cross_attention_takes_part() -> None:
    family = family_of({"model_type": "gpt2"})
    paths = [f"transformer.h.0.crossattention.{leaf}" for leaf in ("c_attn", "q_attn", "c_proj")]
    assert family.targets("minimal", paths) == paths[:2]


@pytest.mark.parametrize(
    ("path", "projection"),
    [
        ("model.layers.0.self_attn.q_a_proj", "query"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "query"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v", "value"),
        ("blocks.3.attn.qkv", "fused"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa", "fused"),
        ("transformer.blocks.0.attn.Wqkv", "fused"),
        ("encoder.block.0.layer.0.SelfAttention.k", "key"),
        ("encoder.block.0.layer.0.SelfAttention.o", ""),
        ("model.layers.0.mlp.up_proj", ""),
    ],
)
def test_names_in_common_use_are_known(path: str, projection: str) -> None:
    assert family_of({"model_type": "something new"}).projection(path) == projection


def test_experts_belong_to_no_preset() -> None:
    family = family_of({"model_type": "mixtral"})
    paths = ["model.layers.0.block_sparse_moe.experts", "model.layers.0.self_attn.q_proj"]
    assert family.targets("all", paths) == paths[1:]


@pytest.mark.parametrize(("wanted", "nearby"), [("q_prj", "q_proj"), (r"layers\.0\.self_attn\.vproj", "v_proj")])
def test_a_choice_that_is_empty_names_the_nearest_and_all_leaves(wanted: str, nearby: str) -> None:
    config, paths = layers("llama")
    with pytest.raises(UsageError, match="matches none of 8 modules") as caught:
        family_of({"model_type": config.model_type}).targets(wanted, paths)
    assert nearby in str(caught.value.hint)
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value.hint)


def test_an_expression_that_is_none_names_the_presets() -> None:
    with pytest.raises(UsageError, match="not a preset") as caught:
        family_of({"model_type": "llama"}).targets("(", ["a"])
    assert all(preset in str(caught.value.hint) for preset in TARGET_PRESETS)


@pytest.mark.parametrize("name", [name for name in CASES if name in known_families()])
def test_a_silent_config_ties_what_transformers_ties(name: str) -> None:
    kind, settings, _ = CASES[name]
    if name == "bert":  # its masked language model, not the classifier, has a head to tie
        kind = "BertForMaskedLM"
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**settings))
    family, silent = family_of({"model_type": name}), {"model_type": name}
    assert family.is_tied(silent) == bool(model.config.tie_word_embeddings)
    tied = {key: value for key, value in model.all_tied_weights_keys.items() if key.endswith(".weight")}
    assert family.ties(silent) == (tied if family.is_tied(silent) else {})
    assert not family.ties(silent | {"tie_word_embeddings": False}) and family.is_tied(silent | {"tie_word_embeddings": True})


def test_every_family_file_is_read() -> None:
    for name in known_families():
        family = family_of({"model_type": name})
        assert family.model_type == name and family.projections
