"""Linears that compute with their merged and rounded weight."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.base import load_base
from qlora_tools.quant.int4 import Int4
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.lora import ADAPTER, inject, lora_layers
from qlora_tools.training.merge_aware import quantize_in_forward, round_trip

PATH = "model.layers.0.mlp.down_proj"


def adapted(folder, codec=None, **choices):
    base = load_base(open_checkpoint(folder), "language", codec, dtype=torch.float32)
    model = inject(base.model, {PATH: 3}, TrainConfig(rank=3, base_format="bf16", **choices), "CAUSAL_LM", dtype=torch.float32)
    layer = lora_layers(model)[PATH]
    torch.nn.init.normal_(layer.lora_B[ADAPTER].weight, std=0.02, generator=torch.Generator().manual_seed(0))
    return model, layer


@pytest.mark.parametrize("codec", [NF4(), Int8(), Int4()], ids=lambda codec: codec.name)
def test_the_forward_pass_is_that_of_the_quantized_merged_weight(llama, codec):
    model, layer = adapted(llama)
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    assert quantize_in_forward(model, round_trip(codec)) == 1
    a, b, scale = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach(), layer.scaling[ADAPTER]
    merged = layer.base_layer.stored.dense() + scale * b @ a
    spec = TensorSpec("w.weight", "F32", tuple(merged.shape))
    rounded = codec.decode(spec, codec.encode(spec, merged))
    assert torch.allclose(layer(x), x @ rounded.T, atol=1e-5)
    assert not torch.allclose(layer(x), x @ merged.T, atol=1e-4)


def test_gradients_are_those_of_a_dense_weight_in_float64(llama):
    model, layer = adapted(llama)
    x = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    pull = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(2))
    quantize_in_forward(model, round_trip(NF4()))
    (layer(x) * pull).sum().backward()
    a, b = (part[ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
    wide_a, wide_b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    merged = layer.base_layer.stored.dense().double() + layer.scaling[ADAPTER] * wide_b @ wide_a
    (x.detach().double() @ merged.T * pull.double()).sum().backward()
    assert torch.allclose(a.grad.double(), wide_a.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(b.grad.double(), wide_b.grad, rtol=1e-4, atol=1e-5)
    spec = TensorSpec("w.weight", "F32", (64, 96))
    rounded = NF4().decode(spec, NF4().encode(spec, merged.detach().float()))
    assert torch.allclose(x.grad, pull @ rounded, atol=1e-5)


def test_the_weight_is_rounded_once_per_change_of_the_factors(llama):
    model, layer = adapted(llama)
    calls = []

    def rounding(path, dense):
        calls.append(path)
        return dense.round(decimals=2)

    quantize_in_forward(model, rounding)
    x = torch.randn(2, 96)
    layer(x), layer(x)
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight.mul_(1.5)
    layer(x)
    assert calls == [PATH, PATH]


def test_a_quantized_base_and_dropout_are_refused(llama):
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize_in_forward(adapted(llama, NF4())[0], round_trip(NF4()))
    with pytest.raises(UnsupportedError, match="dropout"):
        quantize_in_forward(adapted(llama, dropout=0.1)[0], round_trip(NF4()))
