"""Patterns of strangers mean what Python says they mean, and none of them hangs."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.adapters import path_patterns
from qlora_tools.adapters.path_patterns import PathPattern, path_pattern
from qlora_tools.adapters.peft_config import parse_config
from qlora_tools.errors import CorruptError, UnsupportedError

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.k_proj",
    "model.layers.1.mlp.down_proj",
    "model.visual.blocks.3.attn.qkv",
    "lm_head",
    "model.language_model.layers.2.MLP.up_proj",
    "",
    "a\n",
]
#: As they stand in adapters that people share.
STOCK = [
    r".*layers\.0.*(q|k)_proj",
    r"layers\.1\.mlp\.down_proj",
    r"^model\.layers\.1\.mlp\.down_proj",
    r"^(model.language_model(?=\.).*\.(q_proj|up_proj))$",
    r"^(?!.*visual).*(?:q_proj|k_proj|qkv)$",
    r"(?:.*?(?:vision|visual|language|text).*?(?:self_attn|attention|attn|mlp|ffn|dense).*?(?:q|k|v|up|qkv).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))",
    r"((?!lm_head).)*",
    r"(?i).*\.mlp\..*",
    r".*(?i:mlp).*(?<=up|do)_proj|.*(?<!q)_proj",
    r"model\.layers\.([0-9]|1[0-5])\.[^.]+\.\w+",
    r"\w+|(?s:a.)|[^a-y\d]*",
    r"(?x) lm _ head  # the head",
    r"a$|(?:)\Z",
    r"(?!)",
    "[[a]lm_head",
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("pattern", STOCK)
def test_patterns_in_use_mean_what_python_says(pattern):
    for path in PATHS:
        assert PathPattern(pattern).whole(path) == bool(re.fullmatch(pattern, path)), path


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=300, deadline=None)
@given(pattern=st.text(st.sampled_from("ab.()|*+?^$[]{}12,\\w"), max_size=14), path=st.text(st.sampled_from("ab.w1"), max_size=7))
def test_any_pattern_means_what_python_says(pattern, path):
    try:
        ours, theirs = PathPattern(pattern), re.compile(pattern)
        tail = re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return
    assert ours.whole(path) == bool(theirs.fullmatch(path))
    assert ours.tail(path) == bool(tail.match(path))


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*$", "(a?){40}a{40}$", "a?" * 60 + "a" * 60, ".*" * 500 + "b", "((((a*)*)*)*)*b", "(?=(a+)+$)b"]
)
def test_no_pattern_hangs(pattern):
    began = time.perf_counter()
    path_pattern(pattern).tail("a" * 59 + "!")
    assert time.perf_counter() - began < 5  # the backtracking matcher would not come back


def test_a_pattern_of_too_many_steps_is_refused(monkeypatch):
    monkeypatch.setattr(path_patterns, "_MAX_STEPS", 50)
    with pytest.raises(UnsupportedError, match=r"more than 50 steps on `aaaa"):
        PathPattern("((a*)*)*b").whole("a" * 60)


@pytest.mark.parametrize("pattern", [r"(a)\1", r"(a)?(?(1)b|c)", "(?m)^a", "(?a:\\w)", "(" * 70 + ")" * 70, "("])
def test_what_cannot_be_followed_is_refused_by_field(pattern):
    for field in ("rank_pattern", "target_modules", "layers_pattern", "modules_to_save"):
        value = {pattern: 2} if field == "rank_pattern" else [pattern] if field in ("layers_pattern", "modules_to_save") else pattern
        with pytest.raises(CorruptError, match=f"`{field}`.*regular expression"):
            parse_config({"r": 2, field: value})


def test_an_evil_configuration_is_answered():
    config = parse_config({"r": 2, "rank_pattern": {"(a+)+$": 4}, "target_modules": "(a|a)*b", "layers_pattern": ["(l+)+"], "modules_to_save": ["(b*)*c"]})
    assert config.rank_of("a" * 50 + "!") == 2 and config.rank_of("x." + "a" * 50) == 4
    assert config.targets("a" * 50 + "b") and not config.targets("a" * 50)


@pytest.mark.parametrize(("patterns", "number"), [(["layers"], 3), (["blocks"], None), (["h", "l.*s"], 3), ([], 3)])
def test_the_number_of_a_layer_follows_its_pattern(patterns, number):
    config = parse_config({"r": 2, "target_modules": ["q"], "layers_to_transform": [3], "layers_pattern": patterns})
    assert config.targets("model.layers.3.attn.q") == (number == 3) and not config.targets("model.layers.4.attn.q")


def test_a_saved_module_and_what_it_holds_are_not_targets():
    config = parse_config({"r": 2, "target_modules": ["q", "dense"], "modules_to_save": ["score", "head.x"]})
    assert [config.targets(path) for path in ("model.score.dense", "model.scores.dense", "head.x.q", "ahead.x.q", "m.q")] == [False, True, False, True, True]
