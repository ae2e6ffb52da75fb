"""Merged tensors against what the installed PEFT computes, for every kind of stored key."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qlora_tools.adapters.merged import MergedSource, base_fingerprint
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.errors import IncompatibleError, NonFiniteError
from qlora_tools.manifest import FILE_NAME, Manifest
from tests.adapters.tiny_models import Convolutions, Saved, bert, forward, gpt2, llama, save

LINEARS = ["q_proj", "v_proj", "down_proj"]
LLAMA_CASES: Mapping[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEARS},
    "rslora": {"target_modules": LINEARS, "use_rslora": True},
    "patterns": {
        "target_modules": LINEARS,
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 11, "q_proj": 2.5},
    },
    "patterns with rslora": {"target_modules": LINEARS, "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    "lora_bias": {"target_modules": LINEARS, "lora_bias": True},
    "lora_bias with rslora": {"target_modules": LINEARS, "lora_bias": True, "use_rslora": True},
    "dora": {"target_modules": LINEARS, "use_dora": True},
    "regex target": {"target_modules": r".*layers\.0.*(q|k)_proj"},
    "one layer": {"target_modules": LINEARS, "layers_to_transform": [1]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of targets": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2, 60]},
    "tokens by module": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}},
}


def merged_by_peft(saved: Saved) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in copy.deepcopy(saved.live).merge_and_unload().state_dict().items()}


def assert_same(source: MergedSource, expected: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    for name in source.specs:
        torch.testing.assert_close(
            source.read(name).float(), expected[prefix + name].float(), atol=3e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_tiles_agree(source: MergedSource) -> None:
    for name, spec in source.specs.items():
        if len(spec.shape) >= 1 and spec.shape[0] > 3:
            torch.testing.assert_close(source.read(name, (1, 3)), source.read(name)[1:3], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_llama_merges_as_peft_does(case: str, tmp_path: Path) -> None:
    saved = save(tmp_path, llama, **LLAMA_CASES[case])
    source = saved.merged()
    assert source.changed
    assert_same(source, merged_by_peft(saved))
    assert_tiles_agree(source)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_gpt2_conv1d_weights_are_transposed_even_when_square(options: dict[str, Any], tmp_path: Path) -> None:
    saved = save(tmp_path, gpt2, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, **options)
    assert saved.open()[0].specs["transformer.h.0.attn.c_proj.weight"].shape == (32, 32)
    source = saved.merged()
    assert_same(source, merged_by_peft(saved))
    assert_tiles_agree(source)


def test_gpt2_checkpoint_without_the_models_prefix_is_matched(tmp_path: Path) -> None:
    saved = save(tmp_path, gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    expected = merged_by_peft(saved)
    weights = load_file(saved.base / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in weights.items()}, saved.base / "model.safetensors", metadata={"format": "pt"})
    assert_same(saved.merged(), expected, "transformer.")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "intermediate.dense"]},
        {"target_modules": ["word_embeddings", "value"]},
        {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    ],
)
def test_bert_merges_as_peft_does(options: dict[str, Any], tmp_path: Path) -> None:
    saved = save(tmp_path, bert, **options)
    assert_same(saved.merged(), merged_by_peft(saved))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_convolutions_merge_as_peft_does(options: dict[str, Any], tmp_path: Path) -> None:
    saved = save(tmp_path, Convolutions, target_modules=["one", "two", "three", "point"], **options)
    source = saved.merged()
    assert_same(source, merged_by_peft(saved))
    assert_tiles_agree(source)


@pytest.mark.parametrize(
    ("options", "untied"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 60]}, False),
    ],
)
def test_tied_model_computes_what_the_live_adapter_computes(options: dict[str, Any], untied: bool, tmp_path: Path) -> None:
    saved = save(tmp_path, lambda: llama(tied=True), **options)
    source = saved.merged()
    assert source.untied == (("lm_head.weight",) if untied else ())
    model = llama(tied=not untied)
    model.load_state_dict({name: source.read(name) for name in source.specs} | ({} if untied else {"lm_head.weight": source.read("model.embed_tokens.weight")}))
    torch.testing.assert_close(forward(model), forward(saved.live), atol=1e-5, rtol=1e-4)


def test_equal_replacements_of_a_tied_pair_stay_tied(tmp_path: Path) -> None:
    saved = save(tmp_path, lambda: llama(tied=True), target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    weights = load_file(saved.adapter / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = weights["base_model.model.model.embed_tokens.weight"].clone()
    save_file(weights, saved.adapter / "adapter_model.safetensors")
    assert saved.merged().untied == ()


@pytest.mark.parametrize("weight", [0.25, -1.0, 2.0])
def test_weight_scales_the_change(weight: float, tmp_path: Path) -> None:
    saved = save(tmp_path, llama, target_modules=LINEARS, modules_to_save=["lm_head"], lora_bias=True)
    base, whole, part = saved.open()[0], saved.merged(), saved.merged(weight)
    for name in whole.specs:
        start = base.read(name)
        torch.testing.assert_close(part.read(name), start + weight * (whole.read(name) - start), atol=3e-6, rtol=1e-4)


def test_several_adapters_add_their_changes(tmp_path: Path) -> None:
    first, second = (
        save(tmp_path, llama, 1, target_modules=LINEARS, use_rslora=True),
        save(tmp_path, llama, 2, target_modules=["q_proj", "o_proj"], r=3, use_dora=True),
    )
    base, one = first.open()
    _, two = second.open()
    both = MergedSource(base, [(one, 0.5), (two, 2.0)])
    alone = [MergedSource(base, [(one, 1.0)]), MergedSource(base, [(two, 1.0)])]
    for name in both.specs:
        start = base.read(name)
        expected = start + 0.5 * (alone[0].read(name) - start) + 2.0 * (alone[1].read(name) - start)
        torch.testing.assert_close(both.read(name), expected, atol=3e-6, rtol=1e-4)


def test_several_plain_adapters_merge_as_peft_does_one_after_the_other(tmp_path: Path) -> None:
    first, second = save(tmp_path, llama, 1, target_modules=LINEARS), save(tmp_path, llama, 2, target_modules=["q_proj"], r=2)
    base, one = first.open()
    live = PeftModel.from_pretrained(PeftModel.from_pretrained(llama(), first.adapter).merge_and_unload(), second.adapter).merge_and_unload()
    assert_same(MergedSource(base, [(one, 1.0), (second.open()[1], 1.0)]), live.state_dict())


def test_weight_zero_and_no_adapter_are_the_base(tmp_path: Path) -> None:
    saved = save(tmp_path, llama, target_modules=LINEARS)
    assert saved.merged(0.0).changed == frozenset()
    assert torch.equal(saved.merged(0.0).read("model.layers.0.self_attn.q_proj.weight"), saved.open()[0].read("model.layers.0.self_attn.q_proj.weight"))


def test_zero_b_leaves_every_byte_alone(tmp_path: Path) -> None:
    saved = save(tmp_path, lambda: llama().to(torch.bfloat16), target_modules=LINEARS)
    weights = load_file(saved.adapter / "adapter_model.safetensors")
    save_file({key: tensor * 0 if "lora_B" in key else tensor for key, tensor in weights.items()}, saved.adapter / "adapter_model.safetensors")
    base_weights = load_file(saved.base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    base_weights[name][0, :4] = -0.0
    save_file(base_weights, saved.base / "model.safetensors", metadata={"format": "pt"})
    for weight in (1.0, 0.5):
        source = saved.merged(weight)
        for name, spec in source.specs.items():
            assert torch.equal(source.read(name).to(spec.torch_dtype).view(torch.int16), base_weights[name].view(torch.int16)), name


def test_bf16_base_and_factors_are_added_in_fp32_with_one_rounding(tmp_path: Path) -> None:
    saved = save(tmp_path, lambda: llama().to(torch.bfloat16), target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = load_file(saved.adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight"].double() for factor in "AB")
    exact = saved.open()[0].read(name).double() + 6 / 4 * (b @ a)
    merged = saved.merged().read(name)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), exact, atol=1e-6, rtol=1e-6)


def test_grown_vocabulary_replaces_embedding_and_head(tmp_path: Path) -> None:
    def grown() -> Any:
        model = llama()
        model.resize_token_embeddings(64)
        return model

    llama().save_pretrained(tmp_path / "base")
    saved = save(tmp_path, grown, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    source = saved.merged()
    assert source.specs["model.embed_tokens.weight"].shape == source.specs["lm_head.weight"].shape == (64, 32)
    assert_same(source, merged_by_peft(saved))
    base, adapter = saved.open()
    with pytest.raises(IncompatibleError, match="cannot be weighted"):
        MergedSource(base, [(adapter, 0.5)])


class Without:
    """A source less one tensor."""

    def __init__(self, base: Any, name: str) -> None:
        self.specs = {known: spec for known, spec in base.specs.items() if known != name}
        self.read = base.read


def test_a_tensor_that_the_base_lacks_comes_from_the_one_adapter_that_brings_it(tmp_path: Path) -> None:
    saved = save(tmp_path, llama, target_modules=["q_proj"], modules_to_save=["lm_head"])
    base, adapter = saved.open()
    rest, added = Without(base, "lm_head.weight"), {"lm_head.weight": base.specs["lm_head.weight"]}
    source = MergedSource(rest, [(adapter, 1.0)], added=added)
    assert source.specs.keys() == base.specs.keys() and "lm_head.weight" in source.changed
    assert_same(source, merged_by_peft(saved))
    assert_tiles_agree(source)
    for others in ([], [(adapter, 0.0)], [(adapter, 0.5)], [(adapter, 1.0), (adapter, 1.0)]):
        with pytest.raises(IncompatibleError, match="where the base has none: it cannot be weighted"):
            MergedSource(rest, others, added=added)


def with_manifest(saved: Saved, **base_tensors: str) -> MergedSource:
    hashes = {name.replace("__", "."): value for name, value in base_tensors.items()}
    (saved.adapter / FILE_NAME).write_bytes(Manifest("adapter", {}, base_tensors=hashes).to_json())
    base = saved.open()[0]
    return MergedSource(base, [(read_adapter(saved.adapter, base.specs, base.family), 1.0)], fingerprint=base_fingerprint(base))


def test_wrong_base_is_refused_at_once(tmp_path: Path) -> None:
    saved = save(tmp_path, llama, target_modules=["q_proj"])
    with pytest.raises(IncompatibleError, match=r"made for another base: `model.layers.0.self_attn.q_proj.weight`"):
        with_manifest(saved, model__layers__0__self_attn__q_proj__weight="0" * 64)


def test_a_later_tensor_of_the_wrong_base_is_refused_when_read(tmp_path: Path) -> None:
    saved = save(tmp_path, llama, target_modules=["q_proj"])
    first, second = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
    right = base_fingerprint(saved.open()[0])(first)
    assert right is not None
    source = with_manifest(saved, **{first.replace(".", "__"): right, second.replace(".", "__"): "f" * 64})
    source.read(first)
    with pytest.raises(IncompatibleError, match="layers.1"):
        source.read(second)


def test_quantized_base_passes_through_the_hashes_of_what_it_was_quantized_from(tmp_path: Path) -> None:
    saved = save(tmp_path, llama, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.weight"
    (saved.base / FILE_NAME).write_bytes(Manifest("checkpoint", {}, source_tensors={name: "a" * 64}).to_json())
    with_manifest(saved, **{name.replace(".", "__"): "a" * 64}).read(name)


def test_nan_in_a_factor_is_named(tmp_path: Path) -> None:
    saved = save(tmp_path, llama, target_modules=["q_proj"])
    weights = load_file(saved.adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    weights[key][0, 0] = float("nan")
    save_file(weights, saved.adapter / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match=key):
        saved.merged().read("model.layers.0.self_attn.q_proj.weight")


def test_config_read_from_json_is_the_one_saved(tmp_path: Path) -> None:
    saved = save(tmp_path, llama, **LLAMA_CASES["patterns"])
    config = saved.open()[1].config
    assert json.loads((saved.adapter / "adapter_config.json").read_text())["rank_pattern"] == dict(config.rank_pattern)
