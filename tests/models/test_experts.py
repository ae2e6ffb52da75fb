"""Mixtures of experts, read from configs."""

import math

import pytest

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.decoder import decoder_of
from qlora_tools.models.experts import Place
from qlora_tools.models.family import family_of

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QWEN = {**MIXTRAL, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80}


def test_every_layer_of_mixtral_is_a_mixture_whose_weights_sum_to_one():
    experts = decoder_of(MIXTRAL).experts
    assert (experts.count, experts.per_token, experts.intermediate, experts.normalized, experts.shared) == (8, 2, 96, True, None)
    assert experts.layers == {0, 1, 2, 3}


def test_the_count_has_two_names_and_a_default():
    renamed = {("num_experts" if key == "num_local_experts" else key): value for key, value in MIXTRAL.items()}
    assert decoder_of({**renamed, "num_experts": 5}).experts.count == 5
    assert decoder_of({key: value for key, value in renamed.items() if key != "num_experts"}).experts.count == 8
    assert decoder_of({**QWEN, "num_local_experts": 6}).experts.count == 6
    assert decoder_of({**QWEN, "num_local_experts": None}).experts.count == 60


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {0, 1, 2, 3}),
        ({"decoder_sparse_step": 2}, {1, 3}),
        ({"mlp_only_layers": [0, 3]}, {1, 2}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {1}),
    ],
)
def test_dense_layers_stand_between_mixtures_where_the_config_says_so(changes, layers):
    decoder = decoder_of({**QWEN, **changes})
    assert decoder.experts.layers == layers
    shapes = decoder.expected_shapes()
    for layer in range(4):
        assert (f"model.layers.{layer}.mlp.up_proj.weight" in shapes) == (layer not in layers)
        assert (f"model.layers.{layer}.mlp.experts.7.up_proj.weight" in shapes) == (layer in layers)


def test_a_model_without_any_mixture_is_plain():
    assert decoder_of({**QWEN, "num_local_experts": 0}).experts is None
    assert decoder_of({**QWEN, "decoder_sparse_step": 9}).experts is None


def test_shapes_of_a_mixture():
    shapes = decoder_of({**QWEN, "num_hidden_layers": 1}).expected_shapes()
    found = {name.removeprefix("model.layers.0.mlp."): shape for name, shape in shapes.items() if "mlp" in name}
    assert len(found) == 1 + 3 * 8 + 4
    assert found["gate.weight"] == (8, 64) and found["shared_expert_gate.weight"] == (1, 64)
    assert found["experts.3.gate_proj.weight"] == found["experts.3.up_proj.weight"] == (48, 64) and found["experts.3.down_proj.weight"] == (64, 48)
    assert found["shared_expert.gate_proj.weight"] == (80, 64) and found["shared_expert.down_proj.weight"] == (64, 80)


def test_where_the_weights_of_an_expert_lie_among_those_of_all():
    places = decoder_of(MIXTRAL).stacked_places()
    prefix = "model.layers.2.block_sparse_moe"
    stack = "model.layers.2.mlp.experts.gate_up_proj"
    assert places[f"{prefix}.experts.5.w1.weight"] == Place(stack, 5, 0, 96) and places[f"{prefix}.experts.5.w3.weight"] == Place(stack, 5, 96, 192)
    assert places[f"{prefix}.experts.5.w2.weight"] == Place("model.layers.2.mlp.experts.down_proj", 5, 0, 64)
    assert places[f"{prefix}.gate.weight"] == Place("model.layers.2.mlp.gate.weight", None, 0, 8)
    assert len(places) == 4 * (1 + 3 * 8)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(IncompatibleError, match=r"num_experts_per_tok 9 is above num_local_experts 8"):
        decoder_of({**MIXTRAL, "num_experts_per_tok": 9})
    with pytest.raises(IncompatibleError, match="moe_intermediate_size"):
        decoder_of({**QWEN, "moe_intermediate_size": -1})


@pytest.mark.parametrize(
    ("config", "bare"),
    [
        (MIXTRAL, ["model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.experts.3.w2", "model.layers.0.mlp.experts"]),
        (QWEN, ["model.layers.0.mlp.gate", "model.layers.0.mlp.experts.3.down_proj", "model.layers.0.mlp.experts"]),
        ({"model_type": "deepseek_v3"}, ["model.layers.3.mlp.gate", "model.layers.3.mlp.experts.200.up_proj"]),
    ],
)
def test_routers_and_experts_are_no_linears_of_the_live_model(config, bare):
    family = family_of(config)
    assert all(family.is_bare(module) for module in bare)
    assert not any(family.is_storable(f"{module}.weight", (64, 64)) for module in bare)
    assert family.is_storable("model.layers.0.self_attn.q_proj.weight", (64, 64))


def test_a_shared_expert_is_a_plain_feed_forward():
    family = family_of(QWEN)
    assert family.is_storable("model.layers.0.mlp.shared_expert.up_proj.weight", (80, 64)) and family.role("model.layers.0.mlp.shared_expert.up_proj") == "mlp"


#: What published config.json files hold, as far as it could matter.
PUBLISHED = {
    "Mixtral 8x7B": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2}
        | {"output_router_logits": False, "router_aux_loss_coef": 0.02, "rope_theta": 1e6, "sliding_window": None, "rms_norm_eps": 1e-5},
        46_702_792_704,
    ),
    "Qwen1.5-MoE A2.7B": (
        {"model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192}
        | {"max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60}
        | {"num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "output_router_logits": False, "router_aux_loss_coef": 0.001}
        | {"shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False, "vocab_size": 151936, "rope_theta": 1e6},
        14_315_784_192,
    ),
    "Qwen3 30B A3B": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
        | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 48}
        | {"sliding_window": None, "use_sliding_window": False, "router_aux_loss_coef": 0.001, "rope_theta": 1e6, "rope_scaling": None},
        30_532_122_624,
    ),
    "OLMoE 1B 7B": (
        {"model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16}
        | {"max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64}
        | {"num_experts_per_tok": 8, "rope_theta": 10000.0, "rope_scaling": None, "router_aux_loss_coef": 0.01, "vocab_size": 50304},
        6_919_161_856,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_describe_as_many_weights_as_the_models_have(name):
    config, weights = PUBLISHED[name]
    assert sum(math.prod(shape) for shape in decoder_of(config).expected_shapes().values()) == weights


@pytest.mark.parametrize("option", [{"use_sliding_window": True, "sliding_window": 16}, {"clip_qkv": 8.0}])
def test_options_without_a_graph_are_refused(option):
    family = "olmoe" if "clip_qkv" in option else "qwen2_moe"
    with pytest.raises(UnsupportedError, match=next(iter(option))):
        decoder_of({**PUBLISHED["OLMoE 1B 7B" if family == "olmoe" else "Qwen1.5-MoE A2.7B"][0], **option})
