"""How many bytes of tensors a piece of torch code keeps alive, found by running it on tensors that have no content.

Weights and hidden states are fake: they have shape, dtype, device and a storage that is never allocated, so a step of an 8 B model is
traced in seconds on any machine, through autograd, checkpointing and every operator that the step really calls. A dispatch
mode sees each result, counts its storage once, and forgets it when the last reference dies; the largest sum met is the peak.

Small real tensors (token ids, masks, positions) stay real and are computed with, because the step's shapes depend on
them: rows without a target are dropped by a boolean index. What would need a number that a fake tensor does not hold (a
gradient norm, a scalar loss) gets 1.

Left out: buffers inside a kernel (a matrix multiplication's packed operands, a convolution's workspace), which no
dispatcher sees. Uses ``torch._subclasses``, which is not public API; a test traces every kind of model.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from qlora_tools.live.frozen import StoredWeight
from qlora_tools.lowrank.factors import LowRank

_ATEN = torch.ops.aten
#: Integer tensors made from nothing, at most this large, are made for real: positions and index ranges that masks depend on.
_REAL_ELEMENTS = 1 << 22
_FACTORIES = (
    _ATEN.arange.default,
    _ATEN.arange.start,
    _ATEN.arange.start_step,
    _ATEN.zeros.default,
    _ATEN.ones.default,
    _ATEN.full.default,
    _ATEN.empty.memory_format,
)


_PRODUCTS = (_ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default, _ATEN.addmm_.default)


class LiveBytes(TorchDispatchMode):
    """Live bytes by label, now and at the peak. New storages get the label that stands in ``label``.

    ``largest_factor``: bytes of the largest right factor of a matrix product, which the CPU's kernels copy into an order of their own.
    """

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label
        self.largest_factor = 0
        self.now: Counter[str] = Counter()
        self.total = 0
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._seen: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = _call(func, args, kwargs or {})
        if func in _PRODUCTS:
            self.largest_factor = max(self.largest_factor, args[-1].numel() * args[-1].element_size())
        tree_map_only(torch.Tensor, self.note, result)
        return result

    def note(self, tensor: torch.Tensor, label: str | None = None) -> torch.Tensor:
        """Count a tensor's storage, or move it under ``label`` if it is counted already."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        known = self._seen.get(key)
        if known is not None and known[0]() is storage:
            if label is not None and known[1] != label:
                self._forget(key)
            else:
                return tensor
        label = label or self.label
        self._seen[key] = (weakref.ref(storage, lambda _: self._forget(key)), label, size)
        self.now[label] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, self.now.copy()
        return tensor

    def _forget(self, key: int) -> None:
        _, label, size = self._seen.pop(key)
        self.now[label] -= size
        self.total -= size

    @contextmanager
    def under(self, label: str) -> Iterator[None]:
        """New storages inside the block get ``label``."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if (not leaves and _makes_indices(func, args, kwargs)) or (leaves and not any(isinstance(leaf, FakeTensor) for leaf in leaves)):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    if func is _ATEN._local_scalar_dense.default:
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    if func is _ATEN.equal.default:
        return True
    if func in (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default, _ATEN._unsafe_index_put.default):
        args = (args[0], _positions(args[1]), *args[2:])
    return func(*args, **kwargs)


def _makes_indices(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    whole = dtype in (torch.int64, torch.int32, torch.bool) or (func in _FACTORIES[:3] and dtype is None and not any(isinstance(arg, float) for arg in args))
    if func not in _FACTORIES or not whole or str(kwargs.get("device")) == "meta":
        return False
    return func in _FACTORIES[:3] or torch.Size(args[0]).numel() <= _REAL_ELEMENTS


def _positions(indices: Any) -> list[Any]:
    """Boolean indices that are real as the integer indices that they stand for; the shape of what they pick is known then."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                found += list(index.nonzero().unbind(1))
        else:
            found.append(index)
    return found


@contextmanager
def without_content() -> Iterator[FakeTensorMode]:
    """Inside the block new float tensors are fake. The random states are as before afterwards."""
    state = torch.get_rng_state()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode:
            yield mode
    finally:
        torch.set_rng_state(state)


def empty_tensors(model: nn.Module, device: str) -> None:
    """Replace the model's parameters, stored weights and persistent buffers, in place, by tensors without content on ``device``.

    Call inside :func:`without_content`. What the model computes positions from (small buffers that no checkpoint holds) stays.
    """
    made: dict[int, torch.Tensor] = {}

    def twin(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return made[id(tensor)]

    for module in model.modules():
        offset = getattr(module, "offset", None)
        if isinstance(offset, LowRank):
            module.offset = LowRank(twin(offset.a_RI), twin(offset.b_OR))  # type: ignore[assignment]
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, FakeTensor):
                fake = twin(parameter)
                module._parameters[name] = fake if isinstance(fake, nn.Parameter) else nn.Parameter(fake, requires_grad=parameter.requires_grad)
                made[id(parameter)] = module._parameters[name]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is None or isinstance(buffer, FakeTensor):
                continue
            if (
                isinstance(module, StoredWeight)
                or buffer.device.type == "meta"
                or (buffer.is_floating_point() and name not in module._non_persistent_buffers_set)
            ):
                module._buffers[name] = twin(buffer)
