"""The optimizer and its schedule, over fp32 masters of the adapter's parameters.

The model computes with bf16 factors; the optimizer moves fp32 copies, because late in a run a step is smaller than bf16 can
add to a weight. Gradients of micro-batches are summed in fp32 too. A step is: gather, clip, move the masters, round them into
the model.

LoRA+ (Hayou et al. 2024): B learns ``ratio`` times as fast as A.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qlora_tools.errors import UnsupportedError
from qlora_tools.training.config import TrainConfig

_BETAS = (0.9, 0.999)


class Masters:
    """fp32 copies of trainable parameters, with their summed gradients. Names are the model's."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.values = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        for value in self.values.values():
            value.grad = torch.zeros_like(value)

    def gather(self) -> None:
        """Add the model's gradients to the masters' and free them."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                gradient = self.values[name].grad
                assert gradient is not None
                gradient.add_(parameter.grad)
                parameter.grad = None

    def clear(self) -> None:
        """Forget all gradients."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            gradient = self.values[name].grad
            assert gradient is not None
            gradient.zero_()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])

    def clip(self, largest: float) -> float:
        """The norm of all gradients before they are scaled to at most ``largest`` (0: only measured)."""
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if largest > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self.values.values()), largest, norm)
        return float(norm)

    def flat_gradients(self) -> torch.Tensor:
        """All gradients as one vector, in order of name, for one all-reduce."""
        return torch.cat([value.grad.flatten() for _, value in sorted(self.values.items()) if value.grad is not None])

    def set_flat_gradients(self, flat: torch.Tensor) -> None:
        """The inverse of :meth:`flat_gradients`."""
        start = 0
        for _, value in sorted(self.values.items()):
            assert value.grad is not None
            value.grad.copy_(flat[start : start + value.numel()].view_as(value))
            start += value.numel()


def make_optimizer(masters: Masters, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the masters, in groups that learn at their own rate.

    Raises:
        UnsupportedError: an optimizer of bitsandbytes without a CUDA device.
    """
    groups = [
        {"params": [masters.values[name] for name in names], "lr": config.lr * factor, "base_lr": config.lr * factor, "weight_decay": decay}
        for factor, decay, names in _groups(masters.values, config)
    ]
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, betas=_BETAS, fused=True)
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"--optim {config.optim} keeps its state by CUDA kernels of bitsandbytes, and torch sees no CUDA device", hint="use --optim adamw"
        )
    from bitsandbytes import optim

    kinds = {"adamw8bit": optim.AdamW8bit, "paged-adamw8bit": optim.PagedAdamW8bit, "paged-adamw": optim.PagedAdamW32bit}
    made: torch.optim.Optimizer = kinds[config.optim](groups, betas=_BETAS)
    return made


def _groups(values: Mapping[str, torch.Tensor], config: TrainConfig) -> list[tuple[float, float, list[str]]]:
    """(rate factor, weight decay, names): B apart under LoRA+; decay on matrices alone."""
    found: dict[tuple[float, float], list[str]] = {}
    for name, value in values.items():
        fast = config.loraplus is not None and (".lora_B." in name or ".lora_embedding_B" in name)
        decays = value.ndim > 1 and ".lora_magnitude_vector" not in name
        found.setdefault((config.loraplus or 1.0 if fast else 1.0, config.weight_decay if decays else 0.0), []).append(name)
    return [(factor, decay, members) for (factor, decay), members in sorted(found.items())]


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step ``step`` (from 0) as a share of the peak: linear warm-up, then the schedule down to zero at ``steps``."""
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, steps - warmup)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Steps of warm-up: ``config.warmup`` as it stands from 1 on, below 1 as a share of the run."""
    return round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to ``factor`` of its peak; returns the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def export_state(optimizer: torch.optim.Optimizer, names: Iterable[str], masters: Masters) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """(tensors, plain values) of the optimizer's state, by ``<parameter>/<entry>`` and by parameter."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name in names:
        for entry, value in optimizer.state.get(masters.values[name], {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}/{entry}"] = value
            else:
                plain.setdefault(name, {})[entry] = value
    return tensors, plain


def at_home(optimizer: torch.optim.Optimizer, value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of ``tensor``, of the state of ``value``, where the optimizer keeps such: on the device, or in bitsandbytes' managed memory."""
    if not (getattr(optimizer, "is_paged", False) and value.is_cuda and tensor.shape == value.shape):
        return tensor.to(value.device, copy=True)
    room: torch.Tensor = optimizer.get_state_buffer(value, dtype=tensor.dtype)  # type: ignore[attr-defined]
    torch.cuda.synchronize(value.device)  # the room is filled with zeros over there, and looks like the host's
    return room.copy_(tensor)


def import_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Mapping[str, Any]], masters: Masters) -> None:
    """The inverse of :func:`export_state`. Tensors go to their master's device, but counters only where torch's kernel counts there."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        counts_elsewhere = tensor.ndim == 0 and not optimizer.defaults.get("fused")
        found.setdefault(name, {})[entry] = tensor.clone() if counts_elsewhere else at_home(optimizer, masters.values[name], tensor)
    for name, value in masters.values.items():
        if name in found or name in plain:
            optimizer.state[value] = {**found.get(name, {}), **plain.get(name, {})}
