"""Decoder descriptions from config.json: right for what is known, refused by name for the rest."""

import pytest
import torch

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.decoder import decoder_of
from tests.models.decoder_configs import FAMILIES, LLAMA, config_of, hf_config

#: Options that change which tensors a family has.
BIASES = {
    **{family: {"attention_bias": True} for family in ("qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "olmo3")},
    **{family: {"attention_bias": True, "mlp_bias": True} for family in ("llama", "granite", "smollm3")},
    "seed_oss": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    "starcoder2": {"use_bias": False},
    "gpt2": {"n_inner": 80},
}


def test_a_llama_config_becomes_sizes_and_names():
    decoder = decoder_of(LLAMA)
    assert (decoder.head_size, decoder.query_size, decoder.kv_size, decoder.tied, decoder.windows) == (16, 64, 32, True, (None, None, None))
    assert decoder.module("query", 2) == "model.layers.2.self_attn.q_proj" and decoder.linear_shape("key") == (32, 64)
    shapes = decoder.expected_shapes()
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (64, 96) and "lm_head.weight" not in shapes and len(shapes) == 3 * 9 + 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_expected_tensors_are_exactly_those_of_the_transformers_model(family, tied):
    from transformers import AutoModelForCausalLM

    for options in ({}, BIASES.get(family, {})):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config(family, tie_word_embeddings=tied, **options))
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found = decoder_of(config_of(family, tie_word_embeddings=tied, **options))
        assert found.expected_shapes() == expected


def test_pieces_of_a_fused_linear_follow_each_other():
    decoder = decoder_of(config_of("phi3"))
    query, key, value, up = (decoder.piece(role, 1) for role in ("query", "key", "value", "up"))
    assert query.module == key.module == value.module == "model.layers.1.self_attn.qkv_proj"
    assert [(piece.first, piece.rows, piece.of) for piece in (query, key, value, up)] == [(0, 64, 128), (64, 32, 128), (96, 32, 128), (96, 96, 192)]
    assert not query.whole and decoder.piece("output", 0).whole and not query.transposed


def test_gpt2_stores_inputs_first_and_drops_its_prefix_where_the_checkpoint_does():
    decoder = decoder_of(config_of("gpt2"))
    assert decoder.piece("query", 0).transposed and not decoder.gated and decoder.has("positions")
    bare = decoder.as_stored({"wte.weight", "h.0.ln_1.weight"})
    assert "h.0.attn.c_attn.weight" in bare.expected_shapes() and bare.module("final_norm") == "ln_f" and bare.module("positions") == "wpe"
    assert decoder.as_stored({"transformer.wte.weight"}) is decoder and decoder.as_stored(set()) is decoder


def test_a_decoder_that_is_cut_off_keeps_its_first_layers():
    decoder = decoder_of(config_of("gemma3_text", sliding_window=8)).first(2, 50)
    assert (decoder.layers, decoder.vocab, decoder.windows, decoder.rotary) == (2, 50, (8, 8), ("local", "local"))
    assert decoder.expected_shapes()["model.embed_tokens.weight"] == (50, 64)


#: What published config.json files hold beside the sizes, abridged: nothing in them is refused.
PUBLISHED = {
    "Llama 2": ("llama", {"pretraining_tp": 1, "rope_scaling": None, "attention_bias": False, "initializer_range": 0.02}),
    "SmolLM2": (
        "llama",
        {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 130000, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    ),
    "Llama 3.2": (
        "llama",
        {
            "head_dim": 16,
            "mlp_bias": False,
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32, "rope_type": "llama3"},
        },
    ),
    "Mistral 0.3": ("mistral", {"rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0}),
    "Qwen 2.5": ("qwen2", {"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "use_mrope": False, "rope_theta": 1000000.0}),
    "Qwen 3": ("qwen3", {"head_dim": 128, "attention_bias": False, "max_window_layers": 36, "sliding_window": None, "rope_scaling": None}),
    "Phi 3.5 mini": (
        "phi3",
        {
            "attention_bias": False,
            "embd_pdrop": 0.0,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"long_factor": [1.5] * 8, "short_factor": [1.0] * 8, "type": "longrope"},
            "sliding_window": 262144,
        },
    ),
    "Phi 4 mini": ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "partial_rotary_factor": 0.75, "rope_scaling": None}),
    "Gemma": ("gemma", {"head_dim": 16, "hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None, "attention_bias": False}),
    "Gemma 2": (
        "gemma2",
        {
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
    ),
    "Gemma 3": (
        "gemma3_text",
        {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
    ),
    "SmolLM 3": (
        "smollm3",
        {
            "layer_types": ["full_attention"] * 3,
            "max_window_layers": 28,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 0],
            "pretraining_tp": 2,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
    "OLMo 2": ("olmo2", {"rope_scaling": None, "rope_theta": 500000, "attention_bias": False}),
    "Granite 3": ("granite", {"attention_multiplier": 0.0156, "embedding_multiplier": 12.0, "logits_scaling": 16.0, "residual_multiplier": 0.22}),
    "GPT-2": ("gpt2", {"n_ctx": 128, "summary_type": "cls_index", "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}}}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_in_published_configs_is_refused(name):
    family, published = PUBLISHED[name]
    config = {key: value for key, value in config_of(family).items() if key not in ("rope_parameters", "layer_types")}
    found = decoder_of({**config, **published})
    assert found.layers == 3 and (name != "Phi 4 mini" or found.ropes["global"].size == 12)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "mamba"}, "model_type `mamba`"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture `LlamaForSequenceClassification`"),
        ({"hidden_act": "relu2"}, "activation `relu2`"),
        ({"model_type": "bert"}, "model_type `bert`"),
        ({"attention_sink_size": 4}, "attention_sink_size=4, which has no graph"),
        ({"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
    ],
)
def test_what_has_no_graph_is_refused_by_name(changes, found):
    with pytest.raises(UnsupportedError, match=found):
        decoder_of({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"attn_logit_softcapping": 20.0}, "attn_logit_softcapping=20.0"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "sliding_attention"),
    ],
)
def test_options_that_a_family_knows_and_no_graph_has_are_refused_by_name(family, changes, found):
    with pytest.raises(UnsupportedError, match=found):
        decoder_of({**config_of(family), **changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"layer_types": ["full_attention"]}, "1 entries for 3 layers"),
        ({"rms_norm_eps": 0}, "`rms_norm_eps` is 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, found):
    with pytest.raises(IncompatibleError, match=found):
        decoder_of({**LLAMA, **changes})
