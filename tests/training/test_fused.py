"""Fused modules against PEFT's and transformers' own, forward and backward, in fp32, bf16 and float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

from qlora_tools.live.frozen import StoredWeight, can_freeze, freeze_layer
from qlora_tools.models.family import family_of
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec, dtype_of, spec_of
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.fused import _RmsNorm, fuse
from qlora_tools.training.lora import choose_modules, inject, rank_of, trainable_parameters
from qlora_tools.training.ranks import widen

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}
IDS = torch.tensor([[1, 7, 2, 60, 5, 9], [3, 3, 9, 11, 30, 8]])


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True))


def qwen3() -> Any:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16))


def gemma2() -> Any:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16))


def gpt2() -> Any:
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0, **quiet))


def ready(build: Callable[[], Any], dtype: torch.dtype = torch.float32, codec: Codec | None = None, **choices: Any) -> Any:
    """A PEFT model over frozen layers, as a run has it, with factors and norms that are not those of the start."""
    model = build().to(dtype)
    for path, module in list(model.named_modules()):
        if can_freeze(module) and path != "lm_head":
            weight = module.weight.detach().T.contiguous() if isinstance(module, Conv1D) else module.weight.detach()
            spec = TensorSpec(path, dtype_of(dtype).name, tuple(weight.shape))
            parts = codec.encode(spec_of(path, weight), weight) if codec else {path: weight}
            model.set_submodule(path, freeze_layer(module, StoredWeight(codec, spec, parts), None if module.bias is None else module.bias.detach()))
    model.requires_grad_(False)
    config = TrainConfig(**{"rank": 4, **choices})
    modules = choose_modules(model, family_of(vars(model.config)), config.targets)
    return shaken(inject(model, rank_of(model, modules, config), config, dtype=dtype)).train()


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "norm" in name:
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype))
    return model


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and the gradients of all trainable parameters and of the embedded tokens, all in float64."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    parameters = trainable_parameters(model)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(8)).to(logits.dtype)
    found = torch.autograd.grad((logits * weights).sum(), [embedded, *parameters.values()])
    return logits.detach().double(), {name: value.double() for name, value in zip(["embedded", *parameters], found, strict=True)}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, int]]] = {
    "llama": (llama, {}, {"linears": 14, "feed-forwards": 2, "norms": 5}),
    "llama, rsLoRA, attention only": (llama, {"targets": "attn", "rslora": True}, {"linears": 8, "feed-forwards": 0, "norms": 5}),
    "qwen3, norms over heads": (qwen3, {}, {"linears": 14, "feed-forwards": 2, "norms": 9}),
    "gpt2, transposed": (gpt2, {}, {"linears": 8, "feed-forwards": 0, "norms": 0}),
    "gemma2, norms of 1 + w": (gemma2, {}, {"linears": 14, "feed-forwards": 0, "norms": 0}),
}


@pytest.mark.parametrize("codec", [None, NF4()], ids=["dense", "nf4"])
@pytest.mark.parametrize("case", MODELS)
def test_a_fused_model_computes_what_peft_computes(case: str, codec: Codec | None) -> None:
    build, choices, counts = MODELS[case]
    model = ready(build, codec=codec, **choices)
    logits, gradients = step(model)
    assert fuse(model) == counts
    fused_logits, fused_gradients = step(model)
    assert distance(fused_logits, logits) < 1e-5
    assert {name for name in gradients if not distance(fused_gradients[name], gradients[name]) < 1e-5} == set()


@pytest.mark.parametrize("build", [llama, qwen3, gpt2])
def test_in_bf16_it_is_as_near_to_float64_as_peft_is(build: Callable[[], Any]) -> None:
    """Both round; neither may be far from what the same bf16 weights give without rounding."""
    exact = ready(build, torch.bfloat16)
    plain = copy.deepcopy(exact)
    for module in exact.modules():
        if isinstance(module, StoredWeight):
            wide = module.dense().double()
            module.part0, module.spec = wide, TensorSpec(module.spec.name, "F64", module.spec.shape)
    exact_logits, exact_gradients = step(exact.double())
    logits, gradients = step(plain)
    fuse(plain)
    fused_logits, fused_gradients = step(plain)
    assert distance(fused_logits, exact_logits) < 1.25 * distance(logits, exact_logits) + 1e-3
    for name, expected in exact_gradients.items():
        assert distance(fused_gradients[name], expected) < 1.5 * distance(gradients[name], expected) + 2e-3, name


def test_less_is_kept_for_the_backward_pass() -> None:
    def kept(model: Any) -> int:
        held: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(input_ids=IDS.repeat(4, 1), use_cache=False).logits.sum()
        del out
        return sum(size for pointer, size in held.items() if pointer not in own)

    model = ready(llama, torch.bfloat16)
    before = kept(model)
    fuse(model)
    assert kept(model) < 0.7 * before


def fused_linears(**choices: Any) -> int:
    return fuse(ready(llama, **choices))["linears"]


def test_what_peft_does_besides_is_left_to_peft() -> None:
    assert fused_linears(dropout=0.1) == fused_linears(dora=True) == fused_linears(init="pissa") == 0
    biased = get_peft_model(ready(llama).unload(), LoraConfig(r=4, target_modules="all-linear", lora_bias=True))
    assert fuse(biased) == {"linears": 0, "feed-forwards": 0, "norms": 5}
    wide = inject(ready(llama, torch.bfloat16).unload(), {"model.layers.0.mlp.up_proj": 4}, TrainConfig(rank=4), dtype=torch.float32)
    assert fuse(wide)["linears"] == 0  # factors of another dtype than the base computes in


def test_linears_over_plain_torch_layers_are_left_alone() -> None:
    assert fuse(get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))) == {"linears": 0, "feed-forwards": 0, "norms": 5}


def test_a_norm_that_learns_is_left_alone() -> None:
    model = ready(llama)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert fuse(model)["norms"] == 4


@pytest.mark.parametrize("name", ["dora", "dropout", "pissa"])
def test_layers_that_are_not_taken_over_compute_as_before(name: str) -> None:
    choices: dict[str, Any] = {"dora": {"dora": True}, "dropout": {"dropout": 0.5}, "pissa": {"init": "pissa"}}[name]
    model = ready(llama, **choices)
    torch.manual_seed(1)
    logits, gradients = step(model)
    fuse(model)
    torch.manual_seed(1)
    again, fused_gradients = step(model)
    assert distance(again, logits) < 1e-5
    assert {key for key in gradients if not distance(fused_gradients[key], gradients[key]) < 1e-5} == set()


def test_a_disabled_or_another_adapter_goes_pefts_way() -> None:
    model = ready(llama)
    with model.disable_adapter():
        expected = model(input_ids=IDS).logits
    fuse(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(model(input_ids=IDS).logits, expected)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))  # its B is zero
    model.set_adapter("other")
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_gradient_checkpointing_gives_the_same_gradients(build: Callable[[], Any]) -> None:
    model = ready(build)
    fuse(model)
    logits, gradients = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = step(model)
    assert torch.equal(again, logits)
    assert all(torch.equal(recomputed[name], gradients[name]) for name in gradients)


def test_widened_factors_are_used() -> None:
    model = ready(llama, rank=8, start_rank=2)
    fuse(model)
    before, _ = step(model)
    widened = widen(model, 8, seed=0)
    logits, gradients = step(model)
    assert distance(logits, before) < 1e-6  # new directions have no effect yet
    assert all(min(parameter.shape) == 8 and gradients[name].shape == parameter.shape for name, parameter in widened.items() if ".lora_" in name)
    shaken(model)
    assert distance(step(model)[0], before) > 1e-2


def test_an_input_without_gradient_costs_none() -> None:
    """The first layer of a model stands on frozen embeddings."""
    model = ready(llama, targets="mlp")
    fuse(model)
    mlp = model.get_base_model().model.layers[0].mlp
    mlp(torch.randn(3, 64)).sum().backward()
    factors = [parameter for name, parameter in mlp.named_parameters() if ".lora_" in name]
    assert len(factors) == 6 and all(parameter.grad is not None for parameter in factors)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 7)])
def test_the_norms_gradient_is_the_derivative_of_its_formula(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    x, grad, weight = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), torch.randn(7, generator=generator)
    exact = x.double().requires_grad_()
    expected = weight.double() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    expected.backward(grad.double())
    ours = x.clone().requires_grad_()
    found = _RmsNorm.apply(ours, weight, 1e-5)
    found.backward(grad)
    torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_a_norm_that_computes_something_else_is_not_taken() -> None:
    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8), requires_grad=False), 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    assert fuse(nn.Sequential(OtherRMSNorm()))["norms"] == 0


def test_a_model_without_content_can_be_fused() -> None:
    model = ready(llama).to("meta")
    assert fuse(model) == {"linears": 14, "feed-forwards": 2, "norms": 5}
    assert model(input_ids=IDS.to("meta")).logits.shape == (2, 6, 61)
