"""Rotary frequencies and caches against transformers."""

import pytest
import torch

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.decoder import decoder_of
from tests.models.decoder_configs import LLAMA, config_of, hf_config

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
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}


@pytest.mark.parametrize("entry", ROPES, ids=lambda entry: entry["rope_type"])
def test_rotation_is_that_of_transformers(entry):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(LlamaConfig(**{**LLAMA, "rope_parameters": entry}))
    cos, sin = rotary(torch.zeros(1, 1), torch.arange(128)[None])
    found_cos, found_sin = decoder_of({**LLAMA, "rope_parameters": entry}).ropes["global"].caches(0, 128)
    torch.testing.assert_close(found_cos, cos[0, :, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_sin, sin[0, :, :8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [None, 3.0])
@pytest.mark.parametrize("length", [20, 90])
def test_long_inputs_turn_at_the_long_factors_as_in_transformers(length, factor):
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    entry = dict(LONG) | ({"factor": factor} if factor else {})
    options = {"rope_parameters": entry, "original_max_position_embeddings": 40}
    cos, sin = Phi3RotaryEmbedding(hf_config("phi3", **options))(torch.zeros(1, 1), torch.arange(length)[None])
    rope = decoder_of(config_of("phi3", **options)).ropes["global"]
    assert rope.switch == 40 and rope.rows(128) == 168
    start = 40 if length > 40 else 0
    for found, expected in zip(rope.caches(start, start + length), (cos, sin), strict=True):
        torch.testing.assert_close(found, expected[0, :, :8], rtol=1e-5, atol=1e-5)


def test_a_model_no_longer_than_its_original_length_has_short_factors_alone():
    rope = decoder_of(config_of("phi3", rope_parameters=dict(LONG), original_max_position_embeddings=128)).ropes["global"]
    assert rope.switch is None and rope.rows(128) == 128


def test_older_names_of_longrope_mean_the_same():
    options = {"rope_theta": 10000.0, "original_max_position_embeddings": 40, "max_position_embeddings": 128}
    config = {key: value for key, value in config_of("phi3").items() if key != "rope_parameters"} | options
    entry = {"short_factor": LONG["short_factor"], "long_factor": LONG["long_factor"]}
    found = [decoder_of({**config, "rope_scaling": {"type": name, **entry}}).ropes for name in ("su", "yarn", "longrope")]
    assert found[0] == found[1] == found[2] and found[0]["global"].kind == "longrope"


def test_the_older_layout_means_the_same():
    new = decoder_of({**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}})
    old = decoder_of({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert new.ropes == old.ropes


def test_rotary_rows_in_pieces_are_the_whole():
    long = decoder_of(config_of("phi3", rope_parameters=dict(LONG), original_max_position_embeddings=40)).ropes["global"]
    for rope in (decoder_of(LLAMA).ropes["global"], long):
        whole = rope.caches(0, 100)
        pieces = [torch.cat(pair) for pair in zip(rope.caches(0, 37), rope.caches(37, 100), strict=True)]
        assert all(torch.equal(piece, part) for piece, part in zip(pieces, whole, strict=True))


def test_a_part_of_each_head_is_rotated_where_the_family_knows_that():
    entry = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert decoder_of(config_of("phi3", rope_parameters=entry)).ropes["global"].size == 8
    with pytest.raises(UnsupportedError, match="partial_rotary_factor"):
        decoder_of({**LLAMA, "rope_parameters": entry})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type `dynamic`"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers"),
    ],
)
def test_rotations_that_have_no_graph_are_refused_by_name(changes, found):
    with pytest.raises(UnsupportedError, match=found):
        decoder_of({**LLAMA, **changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"head_dim": 15}, "head size 15 is odd"),
        ({"rope_scaling": {"type": "linear"}}, "`factor` is None"),
        ({"rope_theta": -1}, "`rope_theta` is -1"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "`short_factor` has 0 numbers, expected 8"),
    ],
)
def test_rotations_that_cannot_be_are_refused(changes, found):
    with pytest.raises(IncompatibleError, match=found):
        decoder_of({**LLAMA, **changes})
