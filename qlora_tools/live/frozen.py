"""Layers whose weight stays in its stored form and is decoded when it is used, in the forward pass and again in the backward.

The base of a run never learns, so its weights need no gradient, no optimizer state and no dense copy: an NF4 base costs
half a byte a weight, plus one decoded matrix at a time. The layers are subclasses of the ones they replace, with the same
attributes, so that PEFT dispatches on them as on any other; ``weight`` is a property that decodes. Any codec of
``quant/`` serves, for linears, GPT-2's Conv1D and convolutions alike, on the CPU and on CUDA.

``offset`` is a low-rank matrix that the layer subtracts from its weight. Starting points that move part of the weight into
the adapter (PiSSA, OLoRA) use it, so that the stored base stays the stock one.

Axes: T tokens (all leading axes), I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.nn.grad import conv2d_input
from transformers.pytorch_utils import Conv1D

from qlora_tools.lowrank.factors import LowRank
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.nf4 import NF4, STATE_SUFFIX
from qlora_tools.specs import TensorSpec


class StoredWeight(nn.Module):
    """One weight in a codec's parts. ``spec`` has the stored orientation ([out, in, ...]) and the dtype that it decodes to.

    ``codec=None``: the single part is the dense weight. Moving a model to another device moves the parts; a cast leaves them as they are,
    since a rounded scale is another weight.
    """

    def __init__(self, codec: Codec | None, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.codec, self.spec = codec, spec
        self._names = tuple(parts)
        for number, part in enumerate(parts.values()):
            self.register_buffer(f"part{number}", part, persistent=False)
        self._statistics: Any = None

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, f"part{number}") for number, name in enumerate(self._names)}

    def _apply(self, fn: Any, recurse: bool = True) -> StoredWeight:
        for name, part in self._buffers.items():
            assert part is not None
            changed = fn(part)
            self._buffers[name] = changed if changed.dtype == part.dtype else part.to(changed.device)
        self._statistics = None
        return self

    @property
    def device(self) -> torch.device:
        return self.part0.device  # type: ignore[no-any-return, return-value]

    def dense(self) -> torch.Tensor:
        """The decoded weight, a new tensor unless it is stored dense."""
        if self.codec is None:
            return self.part0  # type: ignore[return-value]
        if self.device.type == "meta" or isinstance(self.part0, FakeTensor):  # a memory estimate: the size is all that counts
            return torch.empty(self.spec.shape, dtype=self.spec.torch_dtype, device=self.device)
        if isinstance(self.codec, NF4) and (self.spec.shape[-1] % self.codec.block_size == 0 or self.device.type == "cuda"):
            return self._bitsandbytes()
        return self.codec.decode(self.spec, self.parts)

    def _bitsandbytes(self) -> torch.Tensor:
        """bitsandbytes' kernel, the fastest there is. Not on the CPU where blocks straddle rows: it picks wrong scales there."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        if self._statistics is None:
            prefix = len(self.spec.name) + 1
            described = {name[prefix:]: part for name, part in self.parts.items() if name != self.spec.name}
            described[STATE_SUFFIX[1:]] = described[STATE_SUFFIX[1:]].cpu()
            self._statistics = QuantState.from_dict(described, device=self.device)
            self._statistics.dtype = self.spec.torch_dtype
        packed = self.part0
        return dequantize_4bit(packed.view(-1, 1), self._statistics).view(self.spec.shape)  # type: ignore[operator, no-any-return]


class _FrozenLinear(torch.autograd.Function):
    """``x W^T + bias`` that keeps neither x nor W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, stored: StoredWeight, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.stored = stored
        return functional.linear(x_TI, stored.dense(), bias_O)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad_TO @ ctx.stored.dense().to(grad_TO.dtype), None, None


class _FrozenConv(torch.autograd.Function):
    """A convolution that keeps neither its input nor its weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stored: StoredWeight, bias_O: torch.Tensor | None, settings: tuple[Any, ...]) -> torch.Tensor:
        ctx.stored, ctx.settings, ctx.shape = stored, settings, x.shape
        return functional.conv2d(x, stored.dense(), bias_O, *settings)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        return conv2d_input(ctx.shape, ctx.stored.dense().to(grad.dtype), grad, *ctx.settings), None, None, None


_outlined = 0


@contextmanager
def outlines() -> Iterator[None]:
    """Inside the block ``weight`` of every frozen layer has shape, dtype and device but no content: enough for who only looks at it, and
    no layer is decoded for that."""
    global _outlined
    _outlined += 1
    try:
        yield
    finally:
        _outlined -= 1


class _Frozen:
    """What the three layers share; mixed in before the layer that is replaced."""

    stored: StoredWeight
    offset: LowRank | None

    def hold(self, stored: StoredWeight, bias: torch.Tensor | None) -> None:
        """Take the weight in stored form; the parameter of the replaced layer goes."""
        del self._parameters["weight"]  # type: ignore[attr-defined]
        self._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[attr-defined]
        self.stored, self.offset = stored, None

    def hold_dense(self, weight: torch.Tensor) -> None:
        """Take another weight in the place of the stored one, dense, [O, I, ...] whatever the class's own orientation."""
        spec = self.stored.spec
        assert tuple(weight.shape) == spec.shape, f"{spec} was given {list(weight.shape)}"
        self.stored = StoredWeight(None, spec, {spec.name: weight.to(self.stored.device, spec.torch_dtype).contiguous()})

    @property
    def codec_name(self) -> str:
        """``nf4``, ``int8``, or ``dense``."""
        return "dense" if self.stored.codec is None else self.stored.codec.name

    def dense(self) -> torch.Tensor:
        """The decoded weight less the offset, as it is stored; inside :func:`outlines` a tensor of its shape without content."""
        if _outlined:
            return torch.empty((), dtype=self.stored.spec.torch_dtype, device=self.stored.device).expand(self.stored.spec.shape)
        dense = self.stored.dense()
        return dense if self.offset is None else (dense.float() - self.offset.dense().to(dense.device).view(dense.shape)).to(dense.dtype)

    def multiply(self, x_TI: torch.Tensor) -> torch.Tensor:
        """``x W^T + bias``, less what the offset takes away: [T, O]."""
        x_TI = x_TI.to(self.stored.spec.torch_dtype)
        out_TO: torch.Tensor = _FrozenLinear.apply(x_TI, self.stored, self.bias)  # type: ignore[attr-defined]
        if self.offset is None:
            return out_TO
        return out_TO - functional.linear(functional.linear(x_TI, self.offset.a_RI.to(x_TI)), self.offset.b_OR.to(x_TI))


class FrozenLinear(_Frozen, nn.Linear):
    """``nn.Linear`` over a :class:`StoredWeight` [O, I]."""

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded weight less the offset, [O, I]."""
        return self.dense()

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self.multiply(x_TI)


class FrozenConv1D(_Frozen, Conv1D):  # type: ignore[misc]
    """transformers' ``Conv1D`` over a :class:`StoredWeight` [O, I]; ``weight`` is [I, O], as the class has it."""

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight less the offset, [I, O]."""
        return self.dense().T

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        return self.multiply(x_TI)


class FrozenConv2d(_Frozen, nn.Conv2d):
    """``nn.Conv2d`` over a :class:`StoredWeight` [O, I, k, k]. Zero padding only: others pad in a way the backward here does not know."""

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The decoded kernels less the offset."""
        return self.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        settings: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
        x = x.to(self.stored.spec.torch_dtype)
        out: torch.Tensor = _FrozenConv.apply(x, self.stored, self.bias, settings)
        if self.offset is not None:
            out = out - functional.conv2d(x, self.offset.dense().to(x).view(self.stored.spec.shape), None, *settings)
        return out


def can_freeze(module: nn.Module) -> bool:
    """True for the layers that :func:`freeze_layer` takes: exactly these classes, since a subclass may compute something else."""
    return type(module) in (nn.Linear, Conv1D) or (type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str))


def freeze_layer(module: nn.Module, stored: StoredWeight, bias: torch.Tensor | None) -> nn.Module:
    """The frozen counterpart of ``module``, holding ``stored``. Nothing of ``module``'s own tensors is read, so it may be on ``meta``."""
    assert can_freeze(module), type(module)
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            layer: Any = FrozenLinear(module.in_features, module.out_features, bias=bias is not None)
        elif isinstance(module, Conv1D):
            layer = FrozenConv1D(module.nf, module.weight.shape[0])
        else:
            assert isinstance(module, nn.Conv2d)
            geometry: Any = {name: getattr(module, name) for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")}
            layer = FrozenConv2d(**geometry, bias=bias is not None)
    layer.hold(stored, bias)
    layer.train(module.training)
    return layer  # type: ignore[no-any-return]
