"""Frozen layers against the layers they replace, with the decoded weight, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qlora_tools.live.frozen import FrozenConv1D, FrozenConv2d, FrozenLinear, StoredWeight, can_freeze, freeze_layer
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec, dtype_of, spec_of

CODECS: dict[str, Codec | None] = {"dense": None, "nf4": NF4(), "nf4 single": NF4(128, double_quant=False), "int8": Int8()}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: torch.Tensor, codec: Codec | None, dtype: torch.dtype = torch.float32) -> StoredWeight:
    """``weight`` [O, I, ...] in the codec's parts, decoding to ``dtype``."""
    name = "block.layer.weight"
    if codec is None:
        return StoredWeight(None, TensorSpec(name, dtype_of(dtype).name, tuple(weight.shape)), {name: weight.to(dtype)})
    spec = TensorSpec(name, dtype_of(dtype).name, tuple(weight.shape))
    return StoredWeight(codec, spec, codec.encode(spec_of(name, weight), weight))


def linear(outputs: int, inputs: int, codec: Codec | None, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    weight = stored(drawn(outputs, inputs) / inputs**0.5, codec, dtype)
    return freeze_layer(nn.Linear(inputs, outputs, bias=bias, device="meta"), weight, drawn(outputs, seed=1).to(dtype) if bias else None)


def output_and_gradient(compute: Any, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = compute(x)
    out.backward(grad.to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


def agree(layer: Any, reference: Any, x: torch.Tensor, grad: torch.Tensor) -> None:
    """Output and input gradient of ``layer`` and of a float64 ``reference``."""
    found = output_and_gradient(layer, x, grad)
    expected = output_and_gradient(reference, x.double(), grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (33, 50), (7, 129), (1, 65)])
def test_a_frozen_linear_is_the_linear_of_its_decoded_weight(codec: str, outputs: int, inputs: int) -> None:
    layer = linear(outputs, inputs, CODECS[codec])
    weight, bias = layer.stored.dense().double(), layer.bias.double()
    agree(layer, lambda x: functional.linear(x, weight, bias), drawn(2, 5, inputs, seed=2), drawn(2, 5, outputs, seed=3))
    if CODECS[codec] is not None:  # the decoded weight is the codec's, whichever kernel decodes it
        assert torch.equal(layer.stored.dense(), CODECS[codec].decode(layer.stored.spec, layer.stored.parts))  # type: ignore[union-attr]


@pytest.mark.parametrize("codec", CODECS)
def test_bf16_is_the_dense_layer_bit_for_bit(codec: str) -> None:
    layer = linear(48, 64, CODECS[codec], torch.bfloat16)
    x, grad = drawn(3, 64, seed=2).bfloat16(), drawn(3, 48, seed=3).bfloat16()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    for ours, theirs in zip(output_and_gradient(layer, x, grad), output_and_gradient(lambda x: functional.linear(x, weight, bias), x, grad), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 48), (33, 50)])
def test_a_frozen_conv1d_keeps_its_orientation(codec: str, outputs: int, inputs: int) -> None:
    dense = Conv1D(outputs, inputs)
    layer: Any = freeze_layer(dense, stored(dense.weight.detach().T.contiguous(), CODECS[codec]), drawn(outputs))
    assert isinstance(layer, FrozenConv1D) and layer.weight.shape == (inputs, outputs) and layer.nf == outputs
    dense.double()
    dense.weight.data, dense.bias.data = layer.weight.detach().double(), layer.bias.double()
    agree(layer, dense, drawn(2, 5, inputs, seed=2), drawn(2, 5, outputs, seed=3))


@pytest.mark.parametrize("codec", ["dense", "nf4", "nf4 single"])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "dilation": 2, "padding": 2, "groups": 2},
    ],
)
def test_a_frozen_convolution_is_the_convolution_of_its_decoded_kernels(codec: str, settings: dict[str, Any]) -> None:
    dense = nn.Conv2d(6, 10, **settings)
    bias = None if dense.bias is None else dense.bias.detach()
    layer: Any = freeze_layer(dense, stored(dense.weight.detach(), CODECS[codec]), bias)
    assert isinstance(layer, FrozenConv2d)
    reference = copy.deepcopy(dense).double()
    reference.weight.data = layer.weight.detach().double()
    x = drawn(2, 6, 9, 8, seed=2)
    agree(layer, reference, x, drawn(*dense(x).shape, seed=3))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("codec", ["dense", "nf4"])
def test_the_offset_is_subtracted_from_output_gradient_and_weight(kind: str, codec: str) -> None:
    shape = (12, 5, 3, 3) if kind == "conv2d" else (12, 45)
    weight = stored(drawn(*shape) / 6, CODECS[codec])
    dense = {"linear": lambda: nn.Linear(45, 12), "conv1d": lambda: Conv1D(12, 45), "conv2d": lambda: nn.Conv2d(5, 12, 3)}[kind]()
    layer: Any = freeze_layer(dense, weight, drawn(12))
    layer.offset = LowRank(drawn(3, 45, seed=5), drawn(12, 3, seed=6))
    less = weight.dense().double() - layer.offset.dense().double().view(shape)
    bias = layer.bias.double()
    if kind == "conv2d":
        agree(layer, lambda x: functional.conv2d(x, less, bias), drawn(2, 5, 7, 6, seed=2), drawn(2, 12, 5, 4, seed=3))
    else:
        agree(layer, lambda x: functional.linear(x, less, bias), drawn(2, 45, seed=2), drawn(2, 12, seed=3))
    torch.testing.assert_close((layer.weight.T if kind == "conv1d" else layer.weight).double(), less, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_nothing_is_kept_for_the_backward_pass(codec: str) -> None:
    kept: list[torch.Tensor] = []
    conv = freeze_layer(nn.Conv2d(4, 32, 3), stored(drawn(32, 4, 3, 3), None if codec == "int8" else CODECS[codec]), None)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = linear(48, 64, CODECS[codec])(drawn(3, 64).requires_grad_()).sum() + conv(drawn(1, 4, 8, 8).requires_grad_()).sum()
    assert not kept
    out.backward()


def test_gradients_pass_a_numerical_check() -> None:
    layer = linear(6, 9, None, torch.float64)
    layer.offset = LowRank(drawn(2, 9, seed=5).double(), drawn(6, 2, seed=6).double())
    assert torch.autograd.gradcheck(layer, drawn(3, 9, seed=2).double().requires_grad_())
    conv = freeze_layer(nn.Conv2d(2, 3, 3, stride=2, padding=1), stored(drawn(3, 2, 3, 3), None, torch.float64), None)
    assert torch.autograd.gradcheck(conv, drawn(1, 2, 5, 4, seed=2).double().requires_grad_())


@pytest.mark.parametrize("codec", CODECS)
def test_checkpoints_of_the_model_hold_no_codes(codec: str) -> None:
    layer = linear(48, 64, CODECS[codec])
    assert set(layer.state_dict()) == {"bias"}
    assert [name for name, _ in layer.named_parameters()] == ["bias"] and not layer.bias.requires_grad


@pytest.mark.parametrize("codec", CODECS)
def test_casts_and_moves_leave_the_codes_alone(codec: str) -> None:
    layer = linear(48, 64, CODECS[codec])
    before, parts = layer.stored.dense().clone(), {name: part.clone() for name, part in layer.stored.parts.items()}
    layer(drawn(1, 64))
    layer.half().to(torch.bfloat16).to("cpu").float()
    assert torch.equal(layer.stored.dense(), before)
    assert all(part.dtype == parts[name].dtype and torch.equal(part, parts[name]) for name, part in layer.stored.parts.items())
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(drawn(1, 64)), layer(drawn(1, 64)))
    assert twin.to("meta").stored.device.type == "meta" and layer.stored.device.type == "cpu"


@pytest.mark.parametrize("codec", CODECS)
def test_an_estimate_sees_sizes_without_content(codec: str) -> None:
    layer = linear(48, 65, CODECS[codec], torch.bfloat16).to("meta")
    x = torch.empty(2, 65, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = layer(x)
    assert out.shape == (2, 48) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = linear(48, 65, None)
        fake.stored = StoredWeight(
            CODECS[codec], fake.stored.spec, {name: torch.empty(part.shape, dtype=part.dtype) for name, part in layer.stored.parts.items()}
        )
        fake.bias = nn.Parameter(torch.empty(48), requires_grad=False)
        if codec != "dense":
            assert fake(mode.from_tensor(drawn(2, 65))).shape == (2, 48)


def test_exactly_the_known_classes_are_frozen() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert can_freeze(nn.Linear(2, 2)) and can_freeze(Conv1D(2, 2)) and can_freeze(nn.Conv2d(1, 1, 1))
    assert not can_freeze(Doubled(2, 2)) and not can_freeze(nn.Conv1d(1, 1, 1)) and not can_freeze(linear(4, 4, None))
    assert not can_freeze(nn.Conv2d(1, 1, 3, padding_mode="reflect", padding=1)) and not can_freeze(nn.Conv2d(1, 1, 3, padding="same"))


def test_layers_keep_what_adapters_look_at() -> None:
    layer = linear(48, 64, NF4())
    assert isinstance(layer, FrozenLinear) and isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.codec_name, layer.weight.shape) == (64, 48, "nf4", (48, 64))
    assert linear(4, 4, None).codec_name == "dense" and linear(4, 4, Int8()).codec_name == "int8"
    assert freeze_layer(nn.Linear(4, 4).eval(), stored(drawn(4, 4), None), None).training is False


def test_wider_inputs_are_rounded_to_the_dtype_of_the_layer() -> None:
    layer = linear(8, 16, None, torch.bfloat16)
    x = drawn(2, 16).requires_grad_()
    out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("inputs", [64, 50])
def test_a_gpu_decodes_the_same_weight(codec: str, inputs: int) -> None:
    layer = linear(48, inputs, CODECS[codec], torch.bfloat16)
    before = layer.weight.clone()
    layer.to("cuda")
    torch.testing.assert_close(layer.weight.cpu(), before, rtol=1e-2, atol=1e-6)
    x = drawn(4, inputs).bfloat16().cuda().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.is_cuda


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_another_weight_takes_the_place_of_the_stored_one(kind):
    old = torch.randn(64, 128)
    stored = StoredWeight(NF4(), spec_of("w", old), NF4().encode(spec_of("w", old), old))
    layer = freeze_layer(nn.Linear(128, 64, bias=False) if kind is nn.Linear else Conv1D(64, 128), stored, None)
    new = torch.randn(64, 128)
    layer.hold_dense(new)
    assert torch.equal(layer.weight, new if kind is nn.Linear else new.T)
    assert layer.codec_name == "dense"
