"""Reading a config.json: what nobody asked for is refused where it may matter."""

import pytest

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.reading import ConfigReader


def reader(config, renamed=(), defaults=(), ignored=()):
    return ConfigReader(config, dict(renamed), dict(defaults), ignored)


def test_values_come_from_the_config_then_the_family_then_the_caller():
    values = reader({"a": 1, "none": None, "family_name": 3}, {"usual": "family_name"}, {"a": 9, "b": 2, "none": 5})
    assert [values.get(key, 7) for key in ("a", "b", "c", "usual")] == [1, 2, 7, 3]
    assert values.get("none", 7) is None


@pytest.mark.parametrize("key", ["rope_new", "attention_sinks", "embedding_scale", "logit_bias", "sliding_window", "mup_base", "moe_layers", "qk_layernorm"])
def test_an_option_that_sounds_as_if_it_mattered_must_be_read_or_off(key):
    for off in (None, False, 0, "", [], {}):
        reader({key: off}).refuse_unread()
    with pytest.raises(UnsupportedError, match=f"{key}=1.5, which has no graph"):
        reader({key: 1.5}).refuse_unread()
    reader({key: 1.5}, ignored=[key]).refuse_unread()
    values = reader({key: 1.5})
    values.get(key)
    values.refuse_unread()


def test_options_of_training_and_loading_are_passed_over():
    reader(
        {"attention_dropout": 0.1, "_attn_implementation": "sdpa", "unsloth_version": "1", "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    ).refuse_unread()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "3", [1]])
def test_sizes_are_positive_whole_numbers(wrong):
    with pytest.raises(IncompatibleError, match="n is "):
        reader({"n": wrong}).size("n", 4)
    assert reader({"n": None}).size("n", 4) == 4


@pytest.mark.parametrize("wrong", [0, -1.0, True, "3", None, float("nan")])
def test_numbers_are_positive(wrong):
    with pytest.raises(IncompatibleError, match="`x` is "):
        reader({"x": wrong}).number("x")
