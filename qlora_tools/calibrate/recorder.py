"""Listens at every linear layer of a model and sums the moments of what it reads, and of the gradients at its output.

Layers that read the very same tensor (query, key and value; gate and up) are told at run time by the tensor, not by their names, and
share one sum. Linears, GPT-2's Conv1D and ungrouped convolutions are heard, the latter as the patches that their kernels see; lookups
and grouped convolutions are not. Axes: T tokens, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qlora_tools.calibrate.moments import Moments
from qlora_tools.errors import NonFiniteError, UnsupportedError


class InputRecorder:
    """Hooks on the linears of ``model`` that ``weight_of`` names. Set ``batch`` (held out or not, and which positions count) before each call."""

    def __init__(self, model: Any, weight_of: Any, device: str = "cpu") -> None:
        self._device = device
        self.owner: dict[str, str] = {}
        self.path_of: dict[str, str] = {}
        self._weight: dict[str, str] = {}
        self._sums: dict[tuple[bool, str], Moments] = {}
        self._seen: dict[tuple[Any, ...], tuple[str, torch.Tensor]] = {}
        self._keep: torch.Tensor | None = None
        self._held_out = False
        self._handles = []
        for path, module in model.named_modules():
            name = weight_of(path)
            if name is not None and _heard(module):
                self._weight[path] = name
                self.path_of.setdefault(name, path)
                self._handles.append(module.register_forward_pre_hook(self._hook(path), with_kwargs=True))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, *, held_out: bool, keep: torch.Tensor | None) -> None:
        """What follows belongs to a batch that teaches or judges; ``keep`` (bool, [batch, tokens]) tells real tokens from padding."""
        self._seen.clear()
        self._held_out, self._keep = held_out, keep

    def take(self, prefix: str | None, *, held_out: bool) -> Iterator[tuple[str, Moments]]:
        """(weight, sums) of all owners below ``prefix`` (``None``: all that are left), which are forgotten here, in order of name."""
        self._seen.clear()
        owners = sorted(owner for side, owner in self._sums if side == held_out and (prefix is None or f"{self.path_of[owner]}.".startswith(f"{prefix}.")))
        for owner in owners:
            yield owner, self._sums.pop((held_out, owner))

    def hear(self, path: str, module: nn.Module, x: torch.Tensor) -> None:
        """Take in one input of the layer at ``path``."""
        weight = self._weight.get(path)
        if weight is None:
            return
        key = (x.data_ptr(), x.shape, x.stride(), x._version, _geometry(module))
        found = self._seen.get(key)
        owner = self.owner.setdefault(weight, found[0] if found else weight)
        if found is not None and found[0] == owner and owner != weight:
            return
        if owner != weight:
            raise UnsupportedError(f"`{weight}` reads what `{owner}` reads in one batch and something else in another", hint="calibrate with one kind of input")
        self._seen[key] = (weight, x)  # holding x keeps its address from being given to another tensor
        sums = self._sums.get((self._held_out, weight))
        for x_TI in _rows(module, x.detach(), self._keep):
            if sums is None:
                sums = self._sums[self._held_out, weight] = Moments(x_TI.shape[1], self._device, with_mean=not self._held_out)
            if not bool(torch.isfinite(x_TI.sum())):
                raise NonFiniteError(f"the input of `{weight}` holds NaN or infinity", hint="check the weights with `qlt inspect`, or compute in another dtype")
            sums.add(x_TI)

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hear(path, module, args[0] if args else kwargs["input"])

        return hook


class OutputRecorder:
    """Sums g g' of the gradients g that reach the output of every linear, while a graph that was built under these hooks is run backwards."""

    def __init__(self, model: Any, weight_of: Any, leaving: str | None, device: str = "cpu") -> None:
        self._device = device
        self._path_of: dict[str, str] = {}
        self._sums: dict[str, Moments] = {}
        self.keep: torch.Tensor | None = None
        self._handles = []
        for path, module in model.named_modules():
            name = weight_of(path)
            if name is not None and _heard(module) and path != leaving:
                self._path_of.setdefault(name, path)
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self, prefix: str | None) -> Iterator[tuple[str, Moments]]:
        """(weight, sums) of all layers below ``prefix`` (``None``: all that are left), which are forgotten here, in order of name."""
        for name in sorted(name for name in self._sums if prefix is None or f"{self._path_of[name]}.".startswith(f"{prefix}.")):
            yield name, self._sums.pop(name)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if output.requires_grad:
                keep = self.keep
                output.register_hook(lambda grad: self._add(name, module, grad, keep))

        return hook

    def _add(self, name: str, module: nn.Module, grad: torch.Tensor, keep: torch.Tensor | None) -> None:
        if isinstance(module, nn.Conv2d):
            grad_TO = grad.movedim(1, -1).reshape(-1, grad.shape[1])
        else:
            grad_TO = grad[keep] if keep is not None and grad.shape[:-1] == keep.shape else grad.reshape(-1, grad.shape[-1])
        if not bool(torch.isfinite(grad_TO.sum())):
            raise NonFiniteError(f"the gradient at the output of `{name}` holds NaN or infinity", hint="compute in another dtype")
        if name not in self._sums:
            self._sums[name] = Moments(grad_TO.shape[1], self._device, with_mean=False)
        self._sums[name].add(grad_TO)


def _heard(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear | Conv1D)


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    """What of ``module`` decides which inputs its weight multiplies."""
    return (module.kernel_size, module.stride, module.padding, module.dilation) if isinstance(module, nn.Conv2d) else ()


def _rows(module: nn.Module, x: torch.Tensor, keep: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The vectors that the weight multiplies, [T, I]: positions that count, or patches, an image at a time."""
    if isinstance(module, nn.Conv2d):
        for image in x:
            unfolded = functional.unfold(image[None], module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
            yield unfolded[0].T
    elif keep is not None and x.shape[:-1] == keep.shape:
        yield x[keep]
    else:
        yield x.reshape(-1, x.shape[-1])
