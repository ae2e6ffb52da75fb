"""Every format is told from names alone, also from those that look like it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_tools.adapters.formats.table import FORMATS, WRITTEN
from qlora_tools.adapters.pickled import read_pickled
from qlora_tools.adapters.recognise import open_stored, recognise
from qlora_tools.adapters.stored import StoredAdapter
from qlora_tools.errors import CorruptError, UnsupportedError
from qlora_tools.specs import TensorSpec

LAYER = "model.layers.0.self_attn.q_proj"
PEFT_CONFIG = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
SAMPLES: dict[str, tuple[str, list[str], dict[str, Any] | None]] = {
    "peft": ("peft", [f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight"], PEFT_CONFIG),
    "peft without a configuration": ("peft", [f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight"], None),
    "peft from a raw state dict": ("peft", [f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight"], None),
    "peft without its prefix": ("peft", [f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"], None),
    "peft of gpt2 without its prefix": ("peft", ["transformer.h.0.attn.c_attn.lora_A.weight", "transformer.h.0.attn.c_attn.lora_B.weight"], None),
    "peft of a unet": (
        "peft",
        ["base_model.model.down_blocks.0.attn1.to_q.lora_A.weight", "base_model.model.down_blocks.0.attn1.to_q.lora_B.weight"],
        PEFT_CONFIG,
    ),
    "peft with embeddings": ("peft", ["base_model.model.embed.lora_embedding_A", "base_model.model.embed.lora_embedding_B"], PEFT_CONFIG),
    "diffusers": ("diffusers", ["unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q.lora_B.weight"], None),
    "diffusers, older": ("diffusers", ["unet.mid.attn1.to_q.lora.down.weight", "unet.mid.attn1.to_q.lora.up.weight"], None),
    "diffusers, oldest": ("diffusers", ["mid.attn1.processor.to_q_lora.down.weight", "mid.attn1.processor.to_q_lora.up.weight"], None),
    "kohya": ("kohya", ["lora_unet_mid_attn1_to_q.lora_down.weight", "lora_unet_mid_attn1_to_q.lora_up.weight", "lora_unet_mid_attn1_to_q.alpha"], None),
    "lycoris": (
        "lycoris",
        ["lora_unet_mid_to_q.hada_w1_a", "lora_unet_mid_to_q.hada_w1_b", "lora_unet_mid_to_q.hada_w2_a", "lora_unet_mid_to_q.hada_w2_b"],
        None,
    ),
    "mlx": ("mlx", [f"{LAYER}.lora_a", f"{LAYER}.lora_b"], {"fine_tune_type": "lora", "lora_parameters": {"scale": 20.0}}),
    "torchtune": ("torchtune", ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"], None),
    "torchtune beside a configuration": ("torchtune", ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"], PEFT_CONFIG),
    "litgpt": ("litgpt", ["transformer.h.0.attn.qkv.lora_A", "transformer.h.0.attn.qkv.lora_B"], None),
    "loralib": ("loralib", ["transformer.h.0.attn.c_attn.lora_A", "transformer.h.0.attn.c_attn.lora_B"], None),
}


def stored(keys: list[str], config: dict[str, Any] | None = None) -> StoredAdapter:
    return StoredAdapter(Path("x.safetensors"), {key: TensorSpec(key, "F32", (4, 4)) for key in keys}, {}, {}, config)


@pytest.mark.parametrize("sample", SAMPLES)
def test_formats_are_recognised_by_their_names(sample: str) -> None:
    expected, keys, config = SAMPLES[sample]
    assert recognise(stored(keys, config)) == expected


def test_every_format_but_those_of_whole_files_has_a_sample() -> None:
    assert {expected for expected, _, _ in SAMPLES.values()} == FORMATS.keys() - {"gguf", "onnx_adapter"}


def test_files_that_are_no_safetensors_are_told_by_their_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"GGUF" + bytes(20))
    assert recognise(open_stored(tmp_path / "x.bin")) == "gguf"
    (tmp_path / "x.onnx_adapter").write_bytes(bytes(20))
    assert recognise(open_stored(tmp_path / "x.onnx_adapter")) == "onnx_adapter"


@pytest.mark.parametrize("keys", [[], ["weight"], ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"], ["lora.weight"], [f"{LAYER}.lora_C.weight"]])
def test_what_is_no_adapter_is_refused_with_the_formats_known(keys: list[str]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        recognise(stored(keys))
    assert all(name in str(caught.value.hint) for name in FORMATS)


def test_formats_that_are_written_are_named_for_the_command_line() -> None:
    from qlora_tools.cli.commands.convert import command

    metavar = next(parameter.metavar for parameter in command.params if parameter.name == "to")
    assert set(str(metavar).split("|")) == set(WRITTEN)


@pytest.mark.parametrize("nest", [None, "model_state_dict", "state_dict"])
def test_nested_state_dicts_are_unpacked(tmp_path: Path, nest: str | None) -> None:
    content = {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)}
    torch.save({nest: content, "step": 3} if nest else content, tmp_path / "x.pt")
    found = read_pickled(tmp_path / "x.pt", allowed=True)
    assert found.keys() == content.keys() and torch.equal(found["a"], content["a"]) and found["b"].dtype == torch.bfloat16


@pytest.mark.parametrize("content", [{"a": [1]}, {1: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}, "text", {"a": {"b": torch.ones(1)}}])
def test_pickles_of_more_than_named_tensors_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CorruptError):
        read_pickled(tmp_path / "x.pt", allowed=True)


def test_a_pickle_is_not_even_opened_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="pickle"):
        read_pickled(tmp_path / "missing.pt", allowed=False)
