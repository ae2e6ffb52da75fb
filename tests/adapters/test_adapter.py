"""Matching stored keys to a base: everything wrong is told at once, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from qlora_tools.adapters.adapter import Adapter, Part, bind
from qlora_tools.adapters.peft_config import parse_config
from qlora_tools.errors import IncompatibleError
from qlora_tools.models.family import family_of
from qlora_tools.specs import TensorSpec

BASE = {
    "model.layers.0.self_attn.q_proj.weight": (8, 6),
    "model.layers.0.self_attn.k_proj.weight": (4, 6),
    "model.layers.0.self_attn.k_proj.bias": (4,),
    "model.embed_tokens.weight": (20, 6),
    "model.norm.weight": (6,),
}
Q = "base_model.model.model.layers.0.self_attn.q_proj"
K = "base_model.model.model.layers.0.self_attn.k_proj"


def must_not_read() -> torch.Tensor:
    raise AssertionError("a weight was read")


def bound(shapes: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]] = BASE, model_type: str = "llama", **config: Any) -> Adapter:
    parts = [Part(key, TensorSpec(key, "F32", shape), must_not_read) for key, shape in shapes.items()]
    specs = {name: TensorSpec(name, "F32", shape) for name, shape in base.items()}
    return bind("x", parse_config({"r": 2, "lora_alpha": 4, **config}), parts, specs, family_of({"model_type": model_type}))


def test_a_plain_pair_is_bound() -> None:
    adapter = bound({f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (8, 2)})
    delta = adapter.deltas["model.layers.0.self_attn.q_proj.weight"]
    assert (delta.rank, delta.scale, delta.transposed) == (2, 2.0, False)
    assert adapter.changed == {"model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "base_model.model._orig_mod.", "base_model.model._fsdp_wrapped_module."])
@pytest.mark.parametrize("name", ["", ".default"])
def test_keys_of_raw_state_dicts_are_understood(prefix: str, name: str) -> None:
    module = prefix + "model.layers.0.self_attn.q_proj"
    assert bound({f"{module}.lora_A{name}.weight": (2, 6), f"{module}.lora_B{name}.weight": (8, 2)}).deltas


def test_all_wrong_shapes_are_in_one_error_with_found_and_expected() -> None:
    with pytest.raises(IncompatibleError) as caught:
        bound(
            {
                f"{Q}.lora_A.weight": (3, 6),
                f"{Q}.lora_B.weight": (8, 3),
                f"{K}.lora_A.weight": (2, 7),
                f"{K}.lora_B.weight": (4, 2),
                "base_model.model.model.norm.weight": (5,),
            },
            modules_to_save=["norm"],
        )
    for text in (
        f"`{Q}.lora_A.weight` is [3, 6], expected [2, 6]",
        f"`{Q}.lora_B.weight` is [8, 3], expected [8, 2]",
        f"`{K}.lora_A.weight` is [2, 7], expected [2, 6]",
        "is [5], expected [6]",
    ):
        assert text in str(caught.value)


def test_all_unmatched_keys_are_listed_with_the_nearest_module() -> None:
    strange = [f"{Q.replace('q_proj', 'qq_proj')}.lora_{factor}.weight" for factor in "AB"] + ["base_model.model.extra"]
    with pytest.raises(IncompatibleError) as caught:
        bound({f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (8, 2), strange[0]: (2, 6), strange[1]: (8, 2), strange[2]: (1,)})
    assert all(key in str(caught.value) for key in strange) and "3 keys" in str(caught.value)
    assert caught.value.hint and "q_proj" in caught.value.hint


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["k_proj"]}, {"target_modules": ["q_proj"], "layers_to_transform": [3]}, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}],
)
def test_factors_that_the_config_does_not_target_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="match nothing"):
        bound({f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (8, 2)}, **config)


def test_unknown_part_of_a_known_module_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="lora_E"):
        bound({f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (8, 2), f"{Q}.lora_E": (2, 1)})


def test_half_a_pair_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="has A but not B"):
        bound({f"{Q}.lora_A.weight": (2, 6)})


def test_dora_without_its_magnitude_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="lora_magnitude_vector is missing"):
        bound({f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (8, 2)}, use_dora=True)


def test_bias_of_a_layer_without_bias_is_refused_unless_zero() -> None:
    shapes = {f"{Q}.lora_A.weight": (2, 6), f"{Q}.lora_B.weight": (8, 2), f"{Q}.lora_B.bias": (8,)}
    specs = {name: TensorSpec(name, "F32", shape) for name, shape in BASE.items()}
    config = parse_config({"r": 2, "lora_bias": True})
    parts = {
        value: [Part(key, TensorSpec(key, "F32", shape), lambda shape=shape, value=value: torch.full(shape, value)) for key, shape in shapes.items()]
        for value in (0.0, 1.0)
    }
    assert not bind("x", config, parts[0.0], specs, family_of({"model_type": "llama"})).biases
    with pytest.raises(IncompatibleError, match="does not have"):
        bind("x", config, parts[1.0], specs, family_of({"model_type": "llama"}))


def test_square_weights_follow_the_family_and_without_one_the_config() -> None:
    key, base = "base_model.model.transformer.h.0.attn.c_proj", {"transformer.h.0.attn.c_proj.weight": (6, 6)}
    shapes = {f"{key}.lora_A.weight": (2, 6), f"{key}.lora_B.weight": (6, 2)}
    for model_type, flag, expected in (
        ("gpt2", False, True),
        ("gpt2", True, True),
        ("llama", True, False),
        ("unheard of", True, True),
        ("unheard of", False, False),
    ):
        assert bound(shapes, base, model_type, fan_in_fan_out=flag).deltas["transformer.h.0.attn.c_proj.weight"].transposed is expected


def test_token_index_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="token index 20"):
        bound({"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 6)}, trainable_token_indices=[1, 20])


def test_grouped_convolution_factors_do_not_fit() -> None:
    base = {"conv.weight": (8, 2, 3, 3)}
    with pytest.raises(IncompatibleError, match=r"expected \[2, 2, 3, 3\]"):
        bound({"base_model.model.conv.lora_A.weight": (2, 4, 3, 3), "base_model.model.conv.lora_B.weight": (8, 1, 1, 1)}, base, "unheard of")


def test_empty_adapter_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="no tensors"):
        bound({})


def test_attention_in_proj_is_bound_and_reads_lazily() -> None:
    base = {"mha.in_proj_weight": (18, 6), "mha.out_proj.weight": (6, 6)}
    adapter = bound(
        {
            "base_model.model.mha.lora_A.weight": (2, 6),
            "base_model.model.mha.lora_B.weight": (18, 2),
            "base_model.model.mha.base_layer.out_proj.lora_A.weight": (2, 6),
            "base_model.model.mha.base_layer.out_proj.lora_B.weight": (6, 2),
        },
        base,
        "unheard of",
    )
    assert adapter.deltas.keys() == {"mha.in_proj_weight", "mha.out_proj.weight"}
