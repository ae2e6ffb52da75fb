"""How families read their options: windows, rotation of each layer, activations, scales."""

import pytest

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.decoder import decoder_of
from tests.models.decoder_configs import FAMILIES, LLAMA, config_of


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


@pytest.mark.parametrize(("family", "windows"), [("gemma2", (8, None, 8)), ("gemma3_text", (8, 8, 8)), ("olmo3", (8, 8, 8))])
def test_windows_alternate_by_the_familys_interval_where_layer_types_are_missing(family, windows):
    config = config_of(family, sliding_window=8)
    named = decoder_of(config).windows
    config.pop("layer_types")
    assert decoder_of(config).windows == named == windows


def test_layers_without_rotation_are_listed_or_follow_an_interval():
    config = config_of("smollm3", no_rope_layers=[1, 0, 1])
    assert decoder_of(config).rotary == ("global", None, "global")
    assert decoder_of({**config, "no_rope_layers": None, "no_rope_layer_interval": 3}).rotary == ("global", "global", None)
    with pytest.raises(IncompatibleError, match="no_rope_layers has 1 entries for 3 layers"):
        decoder_of({**config, "no_rope_layers": [1]})


def test_local_and_global_layers_have_bases_of_their_own_in_both_layouts_of_the_config():
    new = config_of("gemma3_text", sliding_window_pattern=2)
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    old = {key: value for key, value in new.items() if key != "rope_parameters"} | {
        "rope_theta": 1e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    found = decoder_of(new)
    assert found.rotary == ("local", "global", "local") and found.windows == (4096, None, 4096)
    assert (found.ropes["local"].theta, found.ropes["global"].theta, found.ropes["local"].kind, found.ropes["global"].kind) == (2e4, 1e6, "default", "linear")
    assert decoder_of(old).ropes == found.ropes
    with pytest.raises(UnsupportedError, match="rope_parameters holds rope_theta"):
        decoder_of({**new, "rope_parameters": {"rope_theta": 1e6}})


def test_gemma_reads_gelu_as_its_tanh_form():
    config = config_of("gemma")
    assert decoder_of({**config, "hidden_act": "gelu"}).activation == "gelu_tanh"
    assert decoder_of({**config_of("starcoder2"), "hidden_act": "gelu"}).activation == "gelu"


def test_scales_and_caps_come_from_the_keys_the_family_names():
    gemma2 = decoder_of(config_of("gemma2", query_pre_attn_scalar=64, attn_logit_softcapping=50.0, final_logit_softcapping=None)).scales
    assert (gemma2.embedding, gemma2.attention, gemma2.attention_softcap, gemma2.logit_softcap) == (8.0, 0.125, 50.0, 0.0)
    options = {"embedding_multiplier": 12.0, "residual_multiplier": 0.25, "attention_multiplier": 0.01, "logits_scaling": 8.0}
    granite = decoder_of(config_of("granite", **options)).scales
    assert (granite.embedding, granite.residual, granite.attention, granite.logits) == (12.0, 0.25, 0.01, 0.125)
    with pytest.raises(IncompatibleError, match="`logits_scaling` is 0"):
        decoder_of({**config_of("granite"), "logits_scaling": 0})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes_or_is_refused(family):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    full = config_of(family)
    understood = 0
    for key in full.keys() - {"architectures", "model_type"}:
        config = {name: value for name, value in full.items() if name != key}
        try:
            found = decoder_of(config)
        except IncompatibleError as error:
            assert key in str(error) or key == "num_key_value_heads"
            continue
        filled = CONFIG_MAPPING[family].from_dict(dict(config)).to_dict()
        assert found == decoder_of({**filled, "architectures": full["architectures"]}), key
        understood += 1
    assert understood > 10
