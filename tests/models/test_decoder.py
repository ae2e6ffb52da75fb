"""Decoder descriptions from config.json: right for what is known, refused by name for the rest."""

import pytest
import torch

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.decoder import decoder_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def test_a_llama_config_becomes_sizes_and_names():
    decoder = decoder_of(LLAMA)
    assert (decoder.head_size, decoder.query_size, decoder.kv_size, decoder.tied, decoder.windows) == (16, 64, 32, True, (None, None, None))
    assert decoder.module("query", 2) == "model.layers.2.self_attn.q_proj" and decoder.linear_shape("key") == (32, 64)
    shapes = decoder.expected_shapes()
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 96) and "lm_head.weight" not in shapes and len(shapes) == 3 * 9 + 2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_expected_tensors_are_exactly_those_of_the_transformers_model(family, tied):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type", "tie_word_embeddings")}
    for biased in (False, True):
        options = {"attention_bias": biased} if family in ("llama", "qwen3") else {}
        config = CONFIG_MAPPING[family](**sizes, **options, tie_word_embeddings=tied)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert decoder_of({**config.to_dict(), "architectures": [type(model).__name__]}).expected_shapes() == expected


ROPES = [
    {"rope_type": "default", "rope_theta": 50000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "beta_fast": 20,
        "truncate": False,
    },
]


@pytest.mark.parametrize("entry", ROPES, ids=lambda entry: entry["rope_type"])
def test_rotation_is_that_of_transformers(entry):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**{**LLAMA, "rope_parameters": entry})
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, 1), torch.arange(128)[None])
    found_cos, found_sin = decoder_of({**LLAMA, "rope_parameters": entry}).rope.caches(0, 128)
    torch.testing.assert_close(found_cos, cos[0, :, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_sin, sin[0, :, :8], rtol=1e-5, atol=1e-5)


def test_the_older_rope_layout_means_the_same():
    new = decoder_of({**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}})
    old = decoder_of({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert new.rope == old.rope


def test_rotary_rows_in_pieces_are_the_whole():
    rope = decoder_of(LLAMA).rope
    whole = rope.caches(0, 100)
    pieces = [torch.cat(pair) for pair in zip(rope.caches(0, 37), rope.caches(37, 100), strict=True)]
    assert all(torch.equal(piece, part) for piece, part in zip(pieces, whole, strict=True))


def test_windows_follow_the_families_rules():
    qwen2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}
    assert decoder_of(qwen2).windows == (None, None, None)
    assert decoder_of({**qwen2, "use_sliding_window": True, "max_window_layers": 1}).windows == (None, 8, 8)
    assert decoder_of({**qwen2, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}).windows == (
        8,
        None,
        None,
    )
    mistral = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert decoder_of(mistral).windows == (4096,) * 3
    assert decoder_of({**mistral, "sliding_window": None}).windows == (None,) * 3


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "mamba"}, "model_type `mamba`"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture `LlamaForSequenceClassification`"),
        ({"hidden_act": "relu2"}, "activation `relu2`"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type `longrope`"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type `dynamic`"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types holds linear_attention"),
        ({"model_type": "bert"}, "model_type `bert`"),
    ],
)
def test_what_has_no_graph_is_refused_by_name(changes, found):
    with pytest.raises(UnsupportedError, match=found):
        decoder_of({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"head_dim": 15}, "head size 15 is odd"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rope_scaling": {"type": "linear"}}, "`factor` is None"),
        ({"layer_types": ["full_attention"]}, "1 entries for 3 layers"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, found):
    with pytest.raises(IncompatibleError, match=found):
        decoder_of({**LLAMA, **changes})
