"""LoRA put in, started, and written: against stock PEFT on the stock base, and against this package's own reader."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification, ResNetConfig, ResNetForImageClassification
from transformers.pytorch_utils import Conv1D

from qlora_tools.adapters.merged import MergedSource
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.live.frozen import StoredWeight, can_freeze, freeze_layer
from qlora_tools.models.family import family_of
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import spec_of
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.lora import (
    adaptable,
    adapter_state,
    choose_modules,
    inject,
    lora_layers,
    rank_of,
    save_adapter,
    stored_key,
    trainable_parameters,
    with_number_ranges,
)
from tests.adapters.tiny_models import gpt2, llama

TOKENS = torch.tensor([[1, 7, 2, 60, 5], [3, 3, 9, 11, 30]])


def bert() -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def gpt2_classifier() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=3)
    return GPT2ForSequenceClassification(config).eval()


def resnet() -> Any:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    return ResNetForImageClassification(config).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))).logits
        return model(input_ids=TOKENS).logits


def freeze(model: Any, codec: NF4 | None = None) -> Any:
    """Frozen layers in place of all but heads; with ``codec`` in its stored form."""
    for path, module in list(model.named_modules()):
        if can_freeze(module) and "classifier" not in path and "score" not in path and "lm_head" not in path:
            dense = module.weight.detach().clone()
            dense = dense.T.contiguous() if isinstance(module, Conv1D) else dense
            parts = codec.encode(spec_of(path, dense), dense) if codec else {path: dense}
            stored = StoredWeight(codec, spec_of(path, dense), parts)
            model.set_submodule(path, freeze_layer(module, stored, None if module.bias is None else module.bias.detach().clone()))
    return model.requires_grad_(False)


def ready(build: Callable[[], Any], config: TrainConfig, task_type: str | None = None, *, frozen: bool = True, model: Any = None, **options: Any) -> PeftModel:
    model = model if model is not None else freeze(build()) if frozen else build().requires_grad_(False)
    chosen = choose_modules(model, family_of(vars(model.config)), config.targets)
    return inject(model, rank_of(model, chosen, config), config, task_type, **{"dtype": torch.float32, **options}).eval()


def moved(peft_model: PeftModel, size: float = 0.05) -> PeftModel:
    """As after training: every trainable value is another."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in trainable_parameters(peft_model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return peft_model


def loaded_by_peft(model: Any, peft_model: PeftModel, folder: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    folder.mkdir()
    save_adapter(folder, *adapter_state(peft_model, dtype=dtype))
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


DECODER_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "patterns": {"rank_pattern": (("q_proj|c_attn", 2), ("0-0", 7))},
    "patterns with rslora": {"rank_pattern": (("q_proj|c_attn", 2),), "rslora": True, "alpha": 3.0},
    "minimal": {"targets": "minimal"},
    "alpha that divides badly": {"alpha": 7.0, "rank": 6},
    "pissa": {"init": "pissa"},
    "pissa with rslora and patterns": {"init": "pissa", "rslora": True, "rank_pattern": (("q_proj|c_attn", 2),)},
    "olora": {"init": "olora"},
}


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("case", DECODER_CASES)
def test_stock_peft_computes_the_same_on_the_stock_base(case: str, build: Callable[[], Any], tmp_path: Path) -> None:
    ours = ready(build, TrainConfig(**{"rank": 4, **DECODER_CASES[case]}), "CAUSAL_LM")
    torch.testing.assert_close(logits(ours), logits(build()), atol=2e-5, rtol=1e-4)  # at the start nothing has changed
    moved(ours)
    theirs = loaded_by_peft(build(), ours, tmp_path / "adapter")
    assert float((logits(ours) - logits(build())).abs().max()) > 1e-3
    torch.testing.assert_close(logits(ours), logits(theirs), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("case", DECODER_CASES)
def test_own_reader_merges_to_the_same_model(case: str, build: Callable[[], Any], tmp_path: Path) -> None:
    stock = build()
    stock.save_pretrained(tmp_path / "base")
    ours = moved(ready(build, TrainConfig(**{"rank": 4, **DECODER_CASES[case]}), "CAUSAL_LM"))
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", *adapter_state(ours, dtype=torch.float32))
    base = open_checkpoint(tmp_path / "base")
    source = MergedSource(base, [(read_adapter(tmp_path / "adapter", base.specs, base.family, ties=base.ties), 1.0)], ties=base.ties)
    stock.load_state_dict({name: source.read(name) for name in source.specs}, strict=False)
    torch.testing.assert_close(logits(ours), logits(stock), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "task_type", "heads"), [(bert, "SEQ_CLS", ("classifier",)), (gpt2_classifier, "SEQ_CLS", ("score",)), (resnet, None, ("classifier",))]
)
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_heads_are_trained_whole_and_found_by_stock_peft(
    build: Callable[[], Any], task_type: str | None, heads: tuple[str, ...], init: str, tmp_path: Path
) -> None:
    ours = ready(build, TrainConfig(rank=2, init=init), task_type, heads=heads)
    torch.testing.assert_close(logits(ours), logits(build()), atol=2e-5, rtol=1e-4)
    keys = trainable_parameters(moved(ours)).keys()
    assert any(heads[0] in key and "lora" not in key for key in keys) and not any(heads[0] in key and "lora" in key for key in keys)
    theirs = loaded_by_peft(build(), ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=3e-5, rtol=1e-4)


def test_the_head_inside_a_container_is_saved_with_it() -> None:
    ours = ready(resnet, TrainConfig(rank=2), heads=("classifier.1",))
    assert "base_model.model.classifier.1.weight" in trainable_parameters(ours)


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_compute_as_in_stock_peft(dora: bool, tmp_path: Path) -> None:
    ours = moved(ready(resnet, TrainConfig(rank=3, dora=dora, rank_pattern=(("layer.0", 2),))))
    assert all(type(layer.lora_A["default"]) is nn.Conv2d for layer in lora_layers(ours).values())
    theirs = loaded_by_peft(resnet(), ours, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["plain", "rslora", "dora", "pissa", "olora"])
def test_bf16_logits_agree_within_bf16_rounding(case: str, tmp_path: Path) -> None:
    ours = moved(ready(llama, TrainConfig(rank=4, **DECODER_CASES[case]), "CAUSAL_LM", model=freeze(llama().bfloat16()), dtype=torch.bfloat16), 0.02)
    theirs = loaded_by_peft(llama().bfloat16(), ours, tmp_path / "adapter", torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainable_parameters(ours).values()} == {torch.bfloat16}
    wide = logits(copy.deepcopy(theirs).float())
    own_error, their_error = (float((logits(model).float() - wide).norm() / wide.norm()) for model in (ours, theirs))
    assert own_error < max(2 * their_error, 0.02), (own_error, their_error)


@pytest.mark.parametrize("build", [llama, gpt2, resnet])
@pytest.mark.parametrize("scale", [{}, {"rslora": True, "alpha": 5.0}])
def test_loftq_on_nf4_comes_closer_to_the_original_and_needs_only_the_stock_quantized_base(build: Any, scale: dict[str, Any], tmp_path: Path) -> None:
    dense, decoded, quantized = build(), build(), freeze(build(), NF4(block_size=32))
    for path, module in quantized.named_modules():
        if hasattr(module, "stored"):
            decoded.get_submodule(path).weight.data = module.weight.clone()
    plain_error = float((logits(quantized) - logits(dense)).norm())
    ours = ready(build, TrainConfig(rank=6, init="loftq", **scale), model=quantized, originals=lambda path: dense.get_submodule(path).weight)
    for path, layer in lora_layers(ours).items():
        lost = (dense.get_submodule(path).weight - layer.base_layer.weight).detach()
        left = (lost - layer.get_delta_weight("default")).detach()
        assert float(left.norm()) <= float(torch.linalg.svdvals(lost.double().flatten(1))[6:].norm()) * 1.002
    assert float((logits(ours) - logits(dense)).norm()) < plain_error
    theirs = loaded_by_peft(decoded, moved(ours), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] is True
    torch.testing.assert_close(logits(ours), logits(theirs), atol=3e-5, rtol=1e-4)


def test_loftq_without_original_weights_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="before quantization"):
        ready(llama, TrainConfig(rank=2, init="loftq"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("build", [llama, gpt2, resnet])
def test_dense_layers_learn_to_subtract(build: Callable[[], Any], init: str) -> None:
    ours = ready(build, TrainConfig(rank=2, init=init), frozen=False)
    torch.testing.assert_close(logits(ours), logits(build()), atol=2e-5, rtol=1e-4)
    assert all(layer.base_layer.offset is not None for layer in lora_layers(ours).values())


def test_keys_are_those_of_pefts_own_files() -> None:
    ours = ready(bert, TrainConfig(rank=2, dora=True), "SEQ_CLS")
    assert trainable_parameters(ours).keys() == get_peft_model_state_dict(ours).keys()
    assert stored_key("base_model.model.default.lora_A.default.weight") == "base_model.model.default.lora_A.weight"


def test_a_head_that_is_trained_whole_gets_no_factors_beside() -> None:
    with pytest.raises(UsageError, match="classifier, which the task trains whole"):
        ready(bert, TrainConfig(rank=2, targets="classifier"), "SEQ_CLS")
    with pytest.raises(UsageError, match=r"classifier\.1"):
        ready(resnet, TrainConfig(rank=2, targets="classifier"), heads=("classifier",))


def test_first_values_depend_on_seed_and_name_only() -> None:
    def values(seed: int, reverse: bool = False, threads: int = 1, init: str = "default") -> dict[str, torch.Tensor]:
        model = freeze(llama())
        chosen = choose_modules(model, family_of({"model_type": "llama"}), "attn")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            config = TrainConfig(rank=4, seed=seed, init=init)
            made = inject(model, rank_of(model, reversed(chosen) if reverse else chosen, config), config, dtype=torch.float32)
        finally:
            torch.set_num_threads(before)
        return {key: value.detach() for key, value in trainable_parameters(made).items()}

    for init in ("default", "pissa"):
        first = values(1, init=init)
        again = values(1, reverse=True, threads=3, init=init)
        assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(
        values(1)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], values(2)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    )


def test_injection_leaves_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    model = freeze(llama())
    torch.random.set_rng_state(before)
    inject(model, {"model.layers.0.self_attn.q_proj": 2}, TrainConfig(rank=2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_masters_are_written_instead_of_the_models_rounded_values(tmp_path: Path) -> None:
    ours = ready(llama, TrainConfig(rank=2), dtype=torch.bfloat16)
    masters = {key: value.detach().float() + 2.0**-6 for key, value in trainable_parameters(ours).items()}
    _, tensors = adapter_state(ours, masters)
    assert all(torch.equal(tensors[key], masters[key].bfloat16()) for key in masters)


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_adapter(tmp_path / name, *adapter_state(ready(llama, TrainConfig(rank=2)), base_model="base"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_scale_follows_the_rank_only_with_rslora() -> None:
    pattern = (("q_proj", 2),)
    plain = lora_layers(ready(llama, TrainConfig(rank=8, alpha=8.0, rank_pattern=pattern)))
    assert {layer.scaling["default"] for layer in plain.values()} == {1.0}
    stabilised = lora_layers(ready(llama, TrainConfig(rank=8, alpha=8.0, rank_pattern=pattern, rslora=True)))
    assert stabilised["model.layers.0.self_attn.q_proj"].scaling["default"] == pytest.approx(8 / 2**0.5)
    assert stabilised["model.layers.0.self_attn.v_proj"].scaling["default"] == pytest.approx(8 / 8**0.5)


def test_presets_leave_the_head_and_a_regex_may_name_it() -> None:
    model, family = llama(), family_of({"model_type": "llama"})
    assert "lm_head" not in choose_modules(model, family, "all")
    assert choose_modules(model, family, "lm_head$") == ["lm_head"]
    assert choose_modules(model, family, "minimal") == [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"]
    assert choose_modules(gpt2(), family_of({"model_type": "gpt2"}), "minimal") == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


def test_convolutions_that_peft_cannot_merge_are_not_offered() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, dilation=2))
    assert list(adaptable(model)) == ["0"]


def layers_of(count: int) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(8, 12), "v": nn.Linear(8, 12)}) for _ in range(count))
    return model


def test_number_ranges_are_whole_numbers_and_the_first_pattern_counts() -> None:
    model = layers_of(13)
    ranks = rank_of(model, adaptable(model), TrainConfig(rank=8, rank_pattern=((r"layers.1.q", 3), ("layers.0-5", 4), ("layers.12.v", 6))))
    assert ranks["layers.1.q"] == 3 and ranks["layers.1.v"] == ranks["layers.5.q"] == 4
    assert ranks["layers.6.v"] == ranks["layers.11.q"] == ranks["layers.12.q"] == 8 and ranks["layers.12.v"] == 6
    assert with_number_ranges(r"[0-5]\d-a") == r"[0-5]\d-a"


@pytest.mark.parametrize(
    ("pattern", "rank", "said"),
    [
        ("qq_proj", 2, "matches none of 4 modules"),
        ("(", 2, "regular expression"),
        ("layers.5-0", 2, "not a range"),
        ("layers.0.q", 9, r"layers.0.q` \(9 of 12 x 8\)"),
        ("layers.0.q", 0, "between 1 and"),
    ],
)
def test_wrong_patterns_are_refused(pattern: str, rank: int, said: str) -> None:
    model = layers_of(2)
    with pytest.raises(UsageError, match=said):
        rank_of(model, adaptable(model), TrainConfig(rank=4, rank_pattern=((pattern, rank),)))


def test_a_rank_above_the_smaller_side_names_the_module_and_the_way_out() -> None:
    model = layers_of(1)
    with pytest.raises(UsageError, match="12 x 8") as caught:
        rank_of(model, adaptable(model), TrainConfig(rank=16))
    assert "=8" in str(caught.value.hint)


def test_sizes_alone_are_made_on_meta() -> None:
    with torch.device("meta"):
        model = llama()
    for init in ("default", "pissa"):
        made = ready(llama, TrainConfig(rank=4, init=init), model=copy.deepcopy(model).requires_grad_(False))
        assert {value.device.type for value in trainable_parameters(made).values()} == {"meta"}


def test_many_modules_with_ranks_of_their_own_go_in_at_once() -> None:
    model = layers_of(60)
    ranks = {path: 1 + number % 7 for number, path in enumerate(adaptable(model))}
    made = inject(model, ranks, TrainConfig(rank=4))
    assert {path: layer.r["default"] for path, layer in lora_layers(made).items()} == ranks


def test_saved_safetensors_file_has_the_planned_header(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    save_adapter(tmp_path, {"r": 1}, tensors)
    save_file(tensors, tmp_path / "by-safetensors", metadata={"format": "pt"})
    found, expected = load_file(tmp_path / "adapter_model.safetensors"), load_file(tmp_path / "by-safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
