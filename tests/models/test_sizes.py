"""Numbers of a config.json that no model has are named before anything is built with them; those that models do have pass."""

from pathlib import Path

import pytest

from qlora_tools.errors import CorruptError
from qlora_tools.models.sizes import MOST, MOST_LAYERS, check_sizes
from tests.models.decoder_configs import config_of
from tests.models.test_decoder import PUBLISHED

PATH = Path("model/config.json")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": -4096}, "hidden_size"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"num_attention_heads": -8}, "num_attention_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"n_embd": "768"}, "n_embd"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 100_000_000}, "num_hidden_layers"),
        ({"num_hidden_layers": [2, 2]}, "num_hidden_layers"),
        ({"n_layer": MOST_LAYERS + 1}, "n_layer"),
        ({"decoder_layers": 100_000_000}, "decoder_layers"),
        ({"vocab_size": MOST + 1}, "vocab_size"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"intermediate_size": [64, -1]}, "intermediate_size"),
        ({"text_config": {"num_hidden_layers": 10**8}}, "text_config.num_hidden_layers"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_parameters": {"factor": float("nan")}}, "rope_parameters.factor"),
    ],
)
def test_a_number_that_no_model_has_is_named_with_what_was_expected(changes, key):
    with pytest.raises(CorruptError, match=rf"model/config\.json: `{key}` is .*, expected a") as raised:
        check_sizes(changes, PATH)
    assert raised.value.hint


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"head_dim": None, "num_labels": 0, "encoder_layers": 0, "num_experts": 0},
        {"intermediate_size": [64, 128], "num_attention_heads": [1, 2, 5, 8], "num_key_value_heads": [None, 2]},
        {"num_hidden_layers": MOST_LAYERS, "vocab_size": MOST},
        {"time_step_limit": [0.0, float("inf")], "initializer_range": float("inf"), "max_window_layers": 0, "type_vocab_size": 0},
    ],
)
def test_what_models_have_passes(config):
    check_sizes(config, PATH)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_pass(name):
    family, published = PUBLISHED[name]
    check_sizes({**config_of(family), **published}, PATH)


def test_sections_as_deep_as_json_goes_are_walked_without_recursion():
    depth = 5000
    config = {"num_hidden_layers": -1}
    for _ in range(depth):
        config = {"a": config}
    with pytest.raises(CorruptError, match="num_hidden_layers"):
        check_sizes(config, PATH)
