"""Adapter folders: refusals on reading, and the configuration that is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from qlora_tools.adapters.peft_config import parse_config
from qlora_tools.adapters.peft_files import WEIGHTS, Target, adapter_config, read_adapter, saved_key, task_type_of
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError
from qlora_tools.models.family import family_of
from qlora_tools.specs import TensorSpec

FAMILY = family_of({"model_type": "llama"})
MODULES = [f"model.layers.{layer}.{part}" for layer in range(12) for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")] + [
    "model.embed_tokens",
    "lm_head",
]


def targets(*modules: str, rank: int = 4) -> list[Target]:
    return [Target(module, (8, 6), rank) for module in modules]


def selected(config: dict[str, Any]) -> list[str]:
    theirs = LoraConfig(**{name: config[name] for name in ("target_modules", "modules_to_save", "r")})
    return [module for module in MODULES if check_target_module_exists(theirs, module)]


@pytest.mark.parametrize(
    "chosen",
    [
        [module for module in MODULES if "q_proj" in module],
        [module for module in MODULES if "_proj" in module],
        ["model.layers.1.self_attn.q_proj"],
        ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "lm_head"],
        [module for module in MODULES if "layers.3." not in module],
    ],
)
def test_peft_selects_exactly_the_targets(chosen: list[str]) -> None:
    config = adapter_config(targets(*chosen), MODULES)
    assert selected(config) == chosen
    assert [module for module in MODULES if parse_config(config).targets(module)] == chosen


def test_modules_whose_full_name_ends_another_are_told_apart_by_one_expression() -> None:
    modules = ["proj", "inner.proj", "outer.inner.proj"]
    config = adapter_config(targets("proj", "inner.proj"), modules)
    theirs = LoraConfig(target_modules=config["target_modules"])
    assert [module for module in modules if check_target_module_exists(theirs, module)] == ["proj", "inner.proj"]


def test_ranks_reach_every_module_through_pefts_pattern_rule() -> None:
    chosen = (
        targets("model.layers.1.mlp.up_proj", rank=8)
        + targets("model.layers.11.mlp.up_proj", rank=3)
        + targets("model.layers.2.mlp.up_proj", "model.layers.3.mlp.up_proj", rank=5)
    )
    config = adapter_config(chosen, MODULES)
    assert config["r"] == 5
    for target in chosen:
        assert config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], target.module), config["r"]) == target.rank
        assert parse_config(config).scale_of(target.module) == 1.0


def test_shapes_of_every_kind_of_target() -> None:
    def shapes(target: Target) -> list[tuple[int, ...]]:
        return [spec.shape for spec in target.specs("F32")]

    assert shapes(Target("m", (8, 6), 2)) == [(2, 6), (8, 2)]
    assert shapes(Target("m", (6, 8), 2, transposed=True, bias=True)) == [(2, 6), (8, 2), (8,)]
    assert shapes(Target("m", (100, 6), 2, embedding=True)) == [(2, 100), (6, 2)]
    assert shapes(Target("m", (8, 6, 3, 5), 2)) == [(2, 6, 3, 5), (8, 2, 1, 1)]


def test_keys() -> None:
    assert Target("a.b", (8, 6), 2).a_key == "base_model.model.a.b.lora_A.weight"
    assert Target("a.b", (8, 6), 2, embedding=True).b_key == "base_model.model.a.b.lora_embedding_B"
    assert saved_key("a.norm.weight") == "base_model.model.a.norm.weight"
    assert saved_key("a.q.bias", wrapped=True) == "base_model.model.a.q.base_layer.bias"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "CAUSAL_LM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "CAUSAL_LM"),
        ({"architectures": ["BertModel"]}, None),
        ({}, None),
    ],
)
def test_task_type(config: dict[str, Any], expected: str | None) -> None:
    assert task_type_of(config) == expected


def folder(path: Path, config: Any = None) -> Path:
    (path / "adapter_config.json").write_text(json.dumps(config if config is not None else {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}))
    return path


BASE = {"q.weight": TensorSpec("q.weight", "F32", (8, 6))}


def test_pickled_adapters_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (folder(tmp_path) / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedError, match=r"adapter_model\.bin") as caught:
        read_adapter(tmp_path, BASE, FAMILY)
    assert "safe_serialization=True" in (caught.value.hint or "")


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=re.escape(WEIGHTS)):
        read_adapter(folder(tmp_path), BASE, FAMILY)


def test_truncated_weights_are_corrupt(tmp_path: Path) -> None:
    save_file({"base_model.model.q.lora_A.weight": torch.ones(2, 6), "base_model.model.q.lora_B.weight": torch.ones(8, 2)}, folder(tmp_path) / WEIGHTS)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(CorruptError, match=re.escape(WEIGHTS)):
        read_adapter(tmp_path, BASE, FAMILY)


def test_configuration_of_another_method_is_refused_before_the_weights(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="LOHA"):
        read_adapter(folder(tmp_path, {"peft_type": "LOHA"}), BASE, FAMILY)


def test_targets_never_name_a_container_of_the_model():
    targets = [Target("down.0.conv", (8, 4, 3, 3), 2), Target("down.1.conv", (8, 4, 3, 3), 2), Target("down.0.time.1", (8, 8), 2)]
    config = adapter_config(targets, ["down.0.conv", "down.1.conv", "down.0.time.1", "down.1.norm"])
    assert config["target_modules"] == ["down.0.conv", "down.0.time.1", "down.1.conv"]  # "1" would also name the block down.1
