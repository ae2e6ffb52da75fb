"""The configuration parser against the installed PEFT, and against files nobody should have written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from qlora_tools.adapters.fields import is_empty
from qlora_tools.adapters.peft_config import FIELDS, parse_config, pattern_key, read_config
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError

MODULES = [
    f"model.layers.{layer}.{part}" for layer in (0, 1, 11) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.1.down_proj")
] + ["model.embed_tokens", "lm_head"]


def test_every_field_of_the_installed_peft_is_in_the_table() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= FIELDS.keys()


def test_refused_fields_are_empty_by_default_in_the_installed_peft() -> None:
    defaults = LoraConfig().to_dict()
    assert all(is_empty(defaults[name]) for name, use in FIELDS.items() if use == "refused" and name in defaults)


def test_defaults_are_those_of_the_installed_peft() -> None:
    written = LoraConfig()
    config = parse_config({})
    assert (config.rank, config.alpha, config.bias, config.use_rslora, config.fan_in_fan_out) == (
        written.r,
        written.lora_alpha,
        written.bias,
        written.use_rslora,
        written.fan_in_fan_out,
    )


def test_a_config_that_peft_writes_is_read_back(tmp_path: Path) -> None:
    LoraConfig(
        r=7, lora_alpha=3, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, use_rslora=True, layers_to_transform=1, trainable_token_indices={"embed": [1]}
    ).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert (config.rank, config.alpha, config.layers_to_transform, config.token_indices) == (7, 3.0, (1,), {"embed": (1,)})
    assert (
        config.rank_of("model.q_proj") == 2
        and config.scale_of("model.q_proj") == pytest.approx(3 / 2**0.5)
        and config.scale_of("v") == pytest.approx(3 / 7**0.5)
    )


@pytest.mark.parametrize(
    "patterns",
    [
        ["q_proj", "down_proj"],
        ["^model.layers.1.self_attn.q_proj"],
        [r"layers\.\d+\.mlp.*", "down_proj"],
        ["proj"],
        ["1.self_attn.q_proj"],
        ["q_proj|v_proj"],
        ["experts.1.down_proj", "down_proj"],
    ],
)
def test_pattern_keys_match_as_peft_does(patterns: list[str]) -> None:
    table = dict.fromkeys(patterns, 1)
    assert [pattern_key(table, module) for module in MODULES] == [get_pattern_key(table, module) for module in MODULES]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["down_proj"], "layers_to_transform": [1], "layers_pattern": "experts"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["self_attn"]},
    ],
)
def test_targets_are_those_of_peft(options: dict[str, Any]) -> None:
    theirs, ours = LoraConfig(**options), parse_config(options)
    assert [ours.targets(module) for module in MODULES] == [bool(check_target_module_exists(theirs, module)) for module in MODULES]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["mlp.experts.gate_up_proj", "x"]}, r"`target_parameters` is set \(mlp\.experts\.gate_up_proj, x\)"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"use_something_new": 3}, "use_something_new"),
    ],
)
def test_what_would_be_mis_applied_is_refused_by_name(content: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        parse_config(content)


@pytest.mark.parametrize(
    "content",
    [
        {"use_something_new": None},
        {"use_something_new": False},
        {"future": {}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"lora_dropout": 0.1},
        {"use_qalora": False},
    ],
)
def test_what_says_nothing_passes(content: dict[str, Any]) -> None:
    assert parse_config(content).rank == 8


@pytest.mark.parametrize(
    "content",
    [
        [],
        "r",
        {"r": 0},
        {"r": -3},
        {"r": "8"},
        {"r": True},
        {"r": 1 << 40},
        {"lora_alpha": "NaN"},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"use_rslora": "yes"},
        {"bias": "some"},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"q": 0}},
        {"alpha_pattern": {"q": None}},
        {"target_modules": "("},
        {"target_modules": [1]},
        {"modules_to_save": {"a": 1}},
        {"modules_to_save": ["("]},
        {"layers_to_transform": [-1]},
        {"trainable_token_indices": ["1"]},
        {"target_modules": "a" * 5000},
    ],
)
def test_malformed_fields_are_corrupt(content: Any) -> None:
    with pytest.raises(CorruptError):
        parse_config(content)


@pytest.mark.parametrize("text", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_files_that_are_no_configuration(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(CorruptError, match=r"adapter_config\.json"):
        read_config(tmp_path)


def test_missing_file_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        read_config(tmp_path)
    assert caught.value.hint


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(sorted(FIELDS)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_any_json_gives_a_config_or_one_of_two_errors(content: dict[str, Any]) -> None:
    with contextlib.suppress(CorruptError, UnsupportedError):
        parse_config(json.loads(json.dumps(content)))
