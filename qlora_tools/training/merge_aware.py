"""Training for the merged, quantized weight: linears compute with Q(W + scale B A), gradients pass the rounding straight through.

An adapter trained on Q(W) + scale B A loses what the quantizer rounds away when it is merged and quantized. Here the quantizer is inside the forward
pass, so A and B learn to land on the right side of the grid's edges. W is the original 16-bit weight, decoded nowhere but here: the
model must hold its base dense. The rounded weight is made once per change of A or B and kept in the compute dtype, one weight's worth of memory
beside the base. Gradients are those of a plain LoRA at the rounded weight (straight-through, Bengio et al. 2013).

Axes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qlora_tools.errors import UnsupportedError
from qlora_tools.live.frozen import FrozenConv1D, FrozenLinear
from qlora_tools.quant.codec import Codec
from qlora_tools.specs import TensorSpec
from qlora_tools.training.lora import ADAPTER, lora_layers

#: (module path, dense fp32 [O, I]) -> the weight as a reader of the quantized model will see it.
Rounding = Callable[[str, torch.Tensor], torch.Tensor]


def round_trip(codec: Codec) -> Rounding:
    """``codec`` there and back, as fp32."""

    def through(path: str, dense_OI: torch.Tensor) -> torch.Tensor:
        spec = TensorSpec(f"{path}.weight", "F32", tuple(dense_OI.shape))
        return codec.decode(spec, codec.encode(spec, dense_OI.cpu())).to(dense_OI.device)

    return through


class _Rounded:
    """The merged weight of one layer, rounded; made anew when A or B have changed."""

    def __init__(self, path: str, layer: Any, rounding: Rounding) -> None:
        self._path, self._layer, self._rounding = path, layer, rounding
        self._made_from: tuple[tuple[torch.Tensor, int], ...] = ()
        self._weight_OI: torch.Tensor | None = None

    @torch.no_grad()
    def weight(self) -> torch.Tensor:
        """[O, I] in the compute dtype."""
        a, b = self._layer.lora_A[ADAPTER].weight, self._layer.lora_B[ADAPTER].weight
        if self._weight_OI is None or not all(part is old and part._version == version for part, (old, version) in zip((a, b), self._made_from, strict=True)):
            base = self._layer.base_layer
            dense_OI = (base.stored.dense() if isinstance(base, FrozenLinear | FrozenConv1D) else _oriented(base)).float()
            merged_OI = torch.addmm(dense_OI, b.float(), a.float(), alpha=float(self._layer.scaling[ADAPTER]))
            self._weight_OI = self._rounding(self._path, merged_OI).to(a.dtype)
            self._made_from = ((a, a._version), (b, b._version))
        return self._weight_OI


def _oriented(base: Any) -> torch.Tensor:
    weight: torch.Tensor = base.weight
    return weight.T if isinstance(base, Conv1D) else weight


class _StraightThrough(torch.autograd.Function):
    """``x W^T + bias`` with W rounded; gradients by A and B as if W were ``W0 + scale B A``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a_RI, b_OR, weight_OI)
        ctx.scale = scale
        return functional.linear(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, a_RI, b_OR, weight_OI = ctx.saved_tensors
        grad_TO, x_TI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_a_RI = ((grad_TO @ b_OR).T @ x_TI) * ctx.scale
        grad_b_OR = (grad_TO.T @ (x_TI @ a_RI.T)) * ctx.scale
        grad_x = (grad_TO @ weight_OI).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_a_RI, grad_b_OR, None, None, None


def quantize_in_forward(model: PeftModel, rounding: Rounding) -> int:
    """Let every LoRA linear of ``model`` compute with its merged weight after ``rounding``; returns how many.

    Call it in place of ``fuse``, when the adapter is in place and the base is dense. A bias on B is added as it is.

    Raises:
        UnsupportedError: convolutions, DoRA, dropout, or a base that is quantized already.
    """
    layers = lora_layers(model)
    for path, layer in layers.items():
        _refuse(path, layer)
    for path, layer in layers.items():
        rounded = _Rounded(path, layer, rounding)
        layer.forward = lambda x, *rest, layer=layer, rounded=rounded, **named: _forward(layer, rounded, x)  # type: ignore[misc]
    return len(layers)


def _forward(layer: Any, rounded: _Rounded, x: torch.Tensor) -> torch.Tensor:
    a, b, scale = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], float(layer.scaling[ADAPTER])
    out: torch.Tensor = _StraightThrough.apply(x.to(a.weight.dtype), a.weight, b.weight, rounded.weight(), layer.base_layer.bias, scale)
    return out if b.bias is None else out + scale * b.bias


def _refuse(path: str, layer: Any) -> None:
    base = layer.base_layer
    if not isinstance(layer, LoraLinear) or isinstance(base, torch.nn.Conv2d) or layer.lora_variant:
        raise UnsupportedError(f"`{path}` ({type(layer).__name__}) cannot be trained through the quantizer", hint="only plain LoRA on linears can")
    if not isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity):
        raise UnsupportedError(f"`{path}` has dropout, which a merged weight has not", hint="leave out --dropout")
    stored = getattr(base, "stored", None)
    if (stored is not None and stored.codec is not None) or getattr(base, "offset", None) is not None:
        raise UnsupportedError(f"`{path}`: the base is quantized already", hint="give the 16-bit base")
