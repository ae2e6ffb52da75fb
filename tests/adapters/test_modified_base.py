"""PiSSA and OLoRA adapters on the base as it was: the same logits as PEFT's live model with its changed base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_tools.adapters import portable_peft
from qlora_tools.adapters.modified_base import Restored, changed_init, on_original_base
from qlora_tools.adapters.peft_keys import parse_key
from qlora_tools.adapters.portable import CONV, Layer, Portable
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import IncompatibleError, UnsupportedError
from tests.adapters.tiny_models import forward, gpt2, llama


def trained(folder: Path, build: Any, seed: int = 0, **options: Any) -> PeftModel:
    """A live PEFT model after a few steps, its base and its unconverted adapter in ``folder``."""
    model = build()
    model.save_pretrained(folder / "base")
    torch.manual_seed(seed)
    live = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    optimizer = torch.optim.Adam([parameter for parameter in live.parameters() if parameter.requires_grad], lr=1e-3)
    tokens = torch.randint(0, 61, (2, 9))
    for _ in range(8):
        live(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live.eval().save_pretrained(folder / "adapter")
    return live


def converted(folder: Path, base: Path) -> tuple[Path, Restored]:
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    init = changed_init(config)
    assert init is not None
    config["init_lora_weights"] = True
    portable = portable_peft.read(config, load_file(folder / "adapter/adapter_model.safetensors"))
    checkpoint = open_checkpoint(base)
    deltas = portable_peft.bound(portable_peft.content(portable), checkpoint).deltas
    targets = {parse_key(delta.a.key).path: (name, delta.transposed) for name, delta in deltas.items()}
    portable, restored = on_original_base(portable, init, checkpoint, targets)
    (folder / "plain").mkdir()
    portable_peft.write(folder / "plain", portable_peft.content(portable))
    return folder / "plain", restored


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES = {
    "pissa": (llama, {**LLAMA, "init_lora_weights": "pissa"}),
    "pissa rslora": (llama, {**LLAMA, "init_lora_weights": "pissa", "use_rslora": True}),
    "pissa patterns": (llama, {**LLAMA, "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 2.5}}),
    "pissa conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}),
    "olora": (llama, {**LLAMA, "init_lora_weights": "olora"}),
    "olora rslora": (llama, {**LLAMA, "init_lora_weights": "olora", "use_rslora": True, "rank_pattern": {"q_proj": 3}}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_live_model(case: str, tmp_path: Path) -> None:
    build, options = CASES[case]
    live = trained(tmp_path, build, **options)
    plain, restored = converted(tmp_path, tmp_path / "base")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), plain).eval()
    stock = forward(build())
    assert (forward(live) - stock).abs().max() > 0.003, "training must have changed something"
    torch.testing.assert_close(forward(again), forward(live), atol=2e-5, rtol=1e-4)
    assert 0.0 < restored.largest < 1.0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_another_base_is_refused_with_how_far_it_lies(init: str, tmp_path: Path) -> None:
    trained(tmp_path, llama, **{**LLAMA, "init_lora_weights": init})
    other = llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.02)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(IncompatibleError, match=r"_proj.*moved by [12]\.\d\d of their own size") as caught:
        converted(tmp_path, tmp_path / "other")
    assert caught.value.hint and "--base" in caught.value.hint


@pytest.mark.parametrize("init", ["pissa_niter_4", "loftq", "corda", "lora_ga", "something new"])
def test_what_cannot_be_recomputed_is_refused_with_the_way_out(init: str) -> None:
    with pytest.raises(UnsupportedError, match=init) as caught:
        changed_init({"init_lora_weights": init})
    assert caught.value.hint and "path_initial_model_for_weight_conversion" in caught.value.hint


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_starts_that_leave_the_base_alone_are_plain(init: Any) -> None:
    assert changed_init({"init_lora_weights": init}) is None and changed_init({}) is None


@pytest.mark.parametrize(
    ("layer", "init", "inputs_first", "named"),
    [
        ({"kind": CONV}, "pissa", False, "linear layers only"),
        ({"magnitude": torch.ones(4)}, "pissa", False, "DoRA"),
        ({}, "olora", True, "wrong way round"),
        ({"scale": -1.0}, "pissa", False, "not positive"),
    ],
)
def test_layers_that_peft_does_not_start_so_are_refused_before_the_base_is_read(layer: dict[str, Any], init: str, inputs_first: bool, named: str) -> None:
    portable = Portable({"q": Layer(**{"a": torch.ones(2, 5), "b": torch.ones(4, 2), "scale": 1.0, **layer})})
    with pytest.raises(UnsupportedError, match=named):
        on_original_base(portable, init, None, {"q": ("q.weight", inputs_first)})  # type: ignore[arg-type]
