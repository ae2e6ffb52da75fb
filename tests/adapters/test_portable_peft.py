"""PEFT adapters through the portable form and back: stock PEFT loads the result and computes the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from qlora_tools.adapters import portable_peft
from qlora_tools.adapters.peft_keys import parse_key
from qlora_tools.adapters.portable import CONV, EMBEDDING, Layer, Portable
from qlora_tools.adapters.portable_peft import scale_baked
from qlora_tools.errors import CorruptError, UnsupportedError
from tests.adapters.tiny_models import Convolutions, Saved, bert, forward, gpt2, llama, save

LINEARS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEARS},
    "scale 2": {"target_modules": LINEARS, "lora_alpha": 8},
    "rslora": {"target_modules": LINEARS, "use_rslora": True},
    "patterns": {"target_modules": LINEARS, "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {"q_proj": 2.5}},
    "bias": {"target_modules": LINEARS, "lora_bias": True},
    "dora": {"target_modules": LINEARS, "use_dora": True},
    "regex": {"target_modules": r".*layers\.0.*(q|k)_proj"},
    "one layer": {"target_modules": LINEARS, "layers_to_transform": [1]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2, 60]},
}


def stored(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def rewritten(saved: Saved, dest: Path) -> Path:
    dest.mkdir()
    portable_peft.write(dest, portable_peft.content(portable_peft.read(*stored(saved.adapter))))
    return dest


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_computes_the_same_logits_from_what_was_read_and_written(case: str, tmp_path: Path) -> None:
    saved = save(tmp_path, llama, **CASES[case])
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.base), rewritten(saved, tmp_path / "again")).eval()
    torch.testing.assert_close(forward(again), forward(saved.live), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_conv1d_adapters_keep_their_orientation(options: dict[str, Any], tmp_path: Path) -> None:
    saved = save(tmp_path, gpt2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **options)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.base), rewritten(saved, tmp_path / "again")).eval()
    assert again.peft_config["default"].fan_in_fan_out
    torch.testing.assert_close(forward(again), forward(saved.live), atol=2e-6, rtol=1e-5)


def test_encoders_go_round(tmp_path: Path) -> None:
    saved = save(tmp_path, bert, target_modules=["query", "word_embeddings"], modules_to_save=["pooler"])
    again = PeftModel.from_pretrained(AutoModel.from_pretrained(saved.base), rewritten(saved, tmp_path / "again")).eval()
    tokens = torch.tensor([[1, 7, 2, 60, 5]])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).pooler_output, saved.live(tokens).pooler_output, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_convolutions_go_round(options: dict[str, Any], tmp_path: Path) -> None:
    saved = save(tmp_path, Convolutions, target_modules=["one", "two", "three", "point"], **options)
    folder = rewritten(saved, tmp_path / "again")
    again = PeftModel.from_pretrained(Convolutions(), folder).merge_and_unload().state_dict()
    for name, expected in saved.live.merge_and_unload().state_dict().items():
        torch.testing.assert_close(again[name], expected, atol=1e-6, rtol=1e-5)
    assert all(layer.kind == CONV for layer in portable_peft.read(*stored(folder)).layers.values())


def test_factors_keep_their_bits_when_alpha_must_say_the_scale(tmp_path: Path) -> None:
    saved = save(tmp_path, llama, target_modules=LINEARS, lora_alpha=6, r=4)  # 1.5 is no power of two
    config, tensors = stored(rewritten(saved, tmp_path / "again"))
    assert config["lora_alpha"] == 6 and config["r"] == 4 and config["alpha_pattern"] == {}
    assert all(torch.equal(tensors[key], value) for key, value in stored(saved.adapter)[1].items())


def test_a_power_of_two_is_multiplied_in() -> None:
    layer = Layer(torch.ones(2, 3), torch.full((4, 2), 0.3, dtype=torch.bfloat16), 4.0)
    baked = scale_baked(layer)
    assert baked.scale == 1.0 and torch.equal(baked.b, layer.b * 4)


@pytest.mark.parametrize(("value", "scale"), [(6e4, 2.0), (6e-8, 0.25)])
def test_a_power_of_two_that_leaves_the_range_of_the_dtype_stays_in_alpha(value: float, scale: float) -> None:
    layer = Layer(torch.ones(2, 3), torch.full((4, 2), value, dtype=torch.float16), scale)
    assert scale_baked(layer) is layer


def test_scale_zero_is_a_zero_b() -> None:
    baked = scale_baked(Layer(torch.ones(2, 3), torch.ones(4, 2), 0.0, bias=torch.zeros(4)))
    assert baked.scale == 1.0 and not baked.b.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scaled_bias_survives_the_round_trip_bit_for_bit(dtype: torch.dtype) -> None:
    config = {"r": 3, "lora_alpha": 7, "lora_bias": True, "target_modules": ["q"]}
    bias = torch.randn(50, dtype=torch.float32).to(dtype)
    tensors = {"a.q.lora_A.weight": torch.randn(3, 5).to(dtype), "a.q.lora_B.weight": torch.randn(50, 3).to(dtype), "a.q.lora_B.bias": bias}
    again = portable_peft.content(portable_peft.read(config, tensors))
    assert torch.equal(again.tensors["base_model.model.a.q.lora_B.bias"], bias)


@pytest.mark.parametrize(
    ("key", "kind", "path", "slot"),
    [
        ("base_model.model.m.q.lora_A.weight", "lora", "m.q", "A"),
        ("m.q.lora_A.default.weight", "lora", "m.q", "A"),
        ("module.base_model.model.m._orig_mod.q.lora_B.bias", "lora", "m.q", "B.bias"),
        ("_fsdp_wrapped_module.base_model.model.m._fsdp_wrapped_module.q.lora_B.my_name.weight", "lora", "m.q", "B"),
        ("base_model.model.e.lora_embedding_A.default", "lora", "e", "embedding_A"),
        ("base_model.model.m.q.lora_magnitude_vector.default.weight", "lora", "m.q", "magnitude_vector"),
        ("base_model.model.score.modules_to_save.default.weight", "whole", "score.weight", ""),
        ("base_model.model.score.modules_to_save.weight", "whole", "score.weight", ""),
        ("base_model.model.score.original_module.weight", "original", "score.original_module.weight", ""),
        ("base_model.model.e.token_adapter.trainable_tokens_delta.default", "tokens", "e", ""),
        ("base_model.model.e.base_layer.weight", "whole", "e.weight", ""),
        ("base_model.model.attn.base_layer.out_proj.lora_A.weight", "lora", "attn.out_proj", "A"),
    ],
)
def test_keys_of_every_age_are_read(key: str, kind: str, path: str, slot: str) -> None:
    parsed = parse_key(key)
    assert (parsed.kind, parsed.path, parsed.slot) == (kind, path, slot)


def pair(module: str = "a.q", rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.randn(rank, 5), f"{module}.lora_B.weight": torch.randn(4, rank)}


@pytest.mark.parametrize(
    ("config", "tensors", "named"),
    [
        ({}, pair() | {"base_model.model.a.q.lora_A.weight": torch.ones(2, 5)}, "same tensor"),
        ({}, pair() | {"a.v.lora_A.weight": torch.ones(2, 5)}, "targets none of 1 tensors: a.v.lora_A.weight"),
        ({}, {"a.q.lora_A.weight": torch.ones(2, 5)}, "not one A and one B"),
        ({"r": 3}, pair(), "rank 3"),
        ({}, {}, "holds no tensors"),
        ({}, pair() | {"a.q.lora_B.bias": torch.ones(9)}, r"\[9\], expected \[4\]"),
        ({"use_dora": True}, pair(), "lora_magnitude_vector is missing"),
        ({}, {"a.q.lora_A.x.weight": torch.ones(2, 5), "a.q.lora_B.y.weight": torch.ones(4, 2)}, "several adapters"),
        ({}, pair() | {"a.q.lora_A.bias": torch.ones(2)}, "targets none"),
        ({}, pair() | {"emb.token_adapter.trainable_tokens_delta": torch.ones(2, 5)}, "targets none"),
    ],
)
def test_contradictions_are_refused_by_name(config: dict[str, Any], tensors: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(CorruptError, match=named):
        portable_peft.read({"r": 2, "lora_alpha": 2, "target_modules": ["q"], **config}, tensors)


def test_no_tensor_is_read_before_every_key_has_its_place() -> None:
    class Exploding(dict):
        def __getitem__(self, key: str) -> torch.Tensor:
            raise AssertionError("read")

    with pytest.raises(CorruptError):
        portable_peft.read({"r": 2, "target_modules": ["q"]}, Exploding(pair() | pair("a.v")))


def test_names_of_4_bit_copies_become_those_of_the_original() -> None:
    for name in ("unsloth/Llama-3-8B-bnb-4bit", "unsloth/Llama-3-8B-unsloth-bnb-4bit"):
        portable = portable_peft.read({"r": 2, "target_modules": ["q"], "base_model_name_or_path": name, "unsloth_fixed": True}, pair())
        assert portable.base_name == "unsloth/Llama-3-8B" and any(name in note for note in portable.notes) and any("unsloth_fixed" in n for n in portable.notes)


def test_merged_linear_of_old_releases_is_written_out() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 6), torch.randn(10, 2, 1)  # rank 2, groups q and v of q, k, v with 5 outputs each
    config = {"r": 2, "lora_alpha": 6, "enable_lora": [True, False, True], "merge_weights": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    portable = portable_peft.read(config, {"base_model.model.h.c_attn.lora_A.weight": a, "base_model.model.h.c_attn.lora_B.weight": b})
    layer = portable.layers["h.c_attn"]
    x = torch.randn(7, 6)
    conv = torch.nn.functional.conv1d((x @ a.T).T[None], b, groups=2)[0].T  # as the old release computed it
    expected = torch.zeros(7, 15)
    expected[:, 0:5], expected[:, 10:15] = conv[:, :5], conv[:, 5:]
    torch.testing.assert_close(layer.scale * x @ (layer.b @ layer.a).T, 3.0 * expected)
    assert portable.inputs_first and layer.rank == 4


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"a.q": {"magnitude": torch.ones(4)}, "a.v": {}}, "one switch"),
        ({"a.q": {"bias": torch.ones(4)}, "e": {"kind": EMBEDDING}}, "factors on e"),
        ({"a.q": {"bias": torch.ones(4), "magnitude": torch.ones(4)}}, "DoRA"),
    ],
)
def test_what_peft_has_no_words_for_is_refused(layers: dict[str, dict[str, Any]], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        portable_peft.content(Portable({name: Layer(torch.ones(2, 5), torch.ones(4, 2), 1.0, **more) for name, more in layers.items()}))


def test_patterns_mean_one_module_also_where_its_path_ends_another() -> None:
    layers = {
        "q": Layer(torch.ones(2, 5), torch.ones(4, 2), 1.5),
        "in.q": Layer(torch.ones(3, 5), torch.ones(4, 3), 0.7),
        "v": Layer(torch.ones(2, 5), torch.ones(4, 2), 3.0),
    }
    again = portable_peft.read(*vars(portable_peft.content(Portable(layers))).values())
    assert {name: (layer.rank, layer.scale) for name, layer in again.layers.items()} == {
        name: (layer.rank, pytest.approx(layer.scale)) for name, layer in layers.items()
    }


def test_a_module_inside_an_adapted_one_is_written_where_peft_looks_for_it() -> None:
    class Attends(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    live = get_peft_model(Attends(), LoraConfig(r=2, lora_alpha=2, target_modules=["attention"]))
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    theirs = get_peft_model_state_dict(live)
    portable = portable_peft.read({"r": 2, "lora_alpha": 2, "target_modules": ["attention", "attention.out_proj"]}, theirs)
    assert portable.layers.keys() == {"attention", "attention.out_proj"}
    assert portable_peft.content(portable).tensors.keys() == theirs.keys()


def test_a_scale_that_could_not_be_read_again_is_not_written() -> None:
    with pytest.raises(CorruptError, match="lora_alpha"):
        portable_peft.content(Portable({"a.q": Layer(torch.ones(2, 5), torch.ones(4, 2), 1.1e306)}))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 60]},
    ],
)
def test_tied_models_go_round(options: dict[str, Any], tmp_path: Path) -> None:
    saved = save(tmp_path, lambda: llama(tied=True), **options)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved.base), rewritten(saved, tmp_path / "again")).eval()
    torch.testing.assert_close(forward(again), forward(saved.live), atol=2e-6, rtol=1e-5)
