"""Ranks that are not one number: growing during a run, and spread over the modules by measured need.

Growing. A run may start narrow and double its rank until the final one is reached in the middle of the run. New rows of A
are drawn as at the start and new columns of B are zero, so that nothing changes at that moment; the scale is that of the final
rank from the first step on, so that nothing changes for the directions already there either. The optimizer's state is padded:
no momentum, and for the second moment the mean of the directions that exist, so that the first steps of the new ones are of
the same size as theirs.

By need. A module deserves rank where the loss would fall fastest if all of its weight could move: by the norm of the gradient of
its whole weight, G. At B = 0 the gradient of B is ``scale G A^T`` with A random, whose norm tells that of G without G
(the projection of Johnson and Lindenstrauss): ``|G| ~ |dB| sqrt(I) / (scale |A|)``. Ranks go by ``|G| / sqrt(O + I)``, as in
He et al., "GoRA: Gradient-driven Adaptive Low Rank Adaptation" (2025), under the parameter budget of one rank for all.

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from qlora_tools.errors import NonFiniteError, UsageError
from qlora_tools.lowrank.initial import uniform
from qlora_tools.lowrank.svd import seed_of
from qlora_tools.names import natural_key, shortened
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.lora import ADAPTER, lora_layers, sides, trainable_parameters

#: Entries of an optimizer's state that hold mean squares, of torch's and of bitsandbytes' optimizers.
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "state2")
#: Values per scale in the 8-bit states of bitsandbytes.
_STATE_BLOCK = 256


def growth(config: TrainConfig, steps: int) -> list[tuple[int, int]]:
    """(step, rank that holds from it on), by step: the start at 0, then doublings spread evenly up to the middle of the run.

    Empty without ``config.start_rank``. In a run too short for all doublings, those that meet in one step become one.
    """
    if config.start_rank is None:
        return []
    ranks = [config.start_rank]
    while ranks[-1] < config.rank:
        ranks.append(min(2 * ranks[-1], config.rank))
    doublings = max(1, len(ranks) - 1)
    return sorted({number * steps // (2 * doublings): rank for number, rank in enumerate(ranks)}.items())


@torch.no_grad()
def widen(peft_model: PeftModel, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Enlarge every LoRA layer to ``rank``, or to its own final rank where that is less. The model's output stays what it is.

    Returns all trainable parameters by key, as :func:`~qlora_tools.training.lora.trainable_parameters`; those of widened layers
    are new objects. The same ranks by the same seed give the same rows, whichever steps lead there.
    """
    for path, layer in lora_layers(peft_model).items():
        has, wants = layer.r[ADAPTER], min(rank, layer.final_rank)
        if wants <= has:
            continue
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        drawn = torch.cat([_row(path, number, tuple(a.weight.shape[1:]), seed) for number in range(has, wants)])
        zeros = b.weight.new_zeros(b.weight.shape[0], wants - has, *b.weight.shape[2:])
        a.weight = nn.Parameter(torch.cat([a.weight, drawn.to(a.weight)]))
        b.weight = nn.Parameter(torch.cat([b.weight, zeros], dim=1))
        if isinstance(a, nn.Conv2d):
            a.out_channels = b.in_channels = wants
        else:
            a.out_features = b.in_features = wants
        layer.r[ADAPTER] = wants
    return trainable_parameters(peft_model)


def _row(path: str, number: int, inputs: tuple[int, ...], seed: int) -> torch.Tensor:
    return uniform((1, *inputs), seed_of(f"{seed}/{path}/{number}"))


def pad_state(state: Mapping[str, Any], shape: Iterable[int]) -> dict[str, Any]:
    """The optimizer's state of a parameter that grew to ``shape``; entries that have no value per element stay as they are, paged ones come to the device.

    Known: torch's AdamW, and the 32-bit and 8-bit states of bitsandbytes.
    """
    new = tuple(shape)
    padded = {
        entry: value.clone() if isinstance(value, torch.Tensor) and value.ndim == 0 else value for entry, value in state.items()
    }  # counters advance in place
    for entry, value in state.items():
        if not isinstance(value, torch.Tensor) or value.ndim != len(new) or tuple(value.shape) == new:
            continue
        value = _on_device(value)
        if value.dtype == torch.uint8:
            padded |= _padded_8bit({**state, entry: value}, entry, new)
        else:
            padded[entry] = _padded(value, new, float(value.float().mean()) if entry in _SQUARES else 0.0)
    return padded


def _on_device(value: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' paged states lie in managed memory, which looks like the host's."""
    if not getattr(value, "is_paged", False):
        return value
    torch.cuda.synchronize(value.page_deviceid)  # type: ignore[attr-defined]
    return value.to(torch.device("cuda", value.page_deviceid))  # type: ignore[attr-defined]


def _padded(value: torch.Tensor, shape: tuple[int, ...], filling: float) -> torch.Tensor:
    grown = torch.full(shape, filling, dtype=value.dtype, device=value.device)
    grown[tuple(slice(0, extent) for extent in value.shape)] = value
    return grown


def _padded_8bit(state: Mapping[str, Any], entry: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Decode, pad, encode: the blocks of the larger tensor hold other values together."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    number = entry.removeprefix("state")
    code = state[f"qmap{number}"]
    wide = dequantize_blockwise(state[entry], absmax=state[f"absmax{number}"], code=code, blocksize=_STATE_BLOCK)
    grown = _padded(wide, shape, float(wide.mean()) if entry in _SQUARES else 0.0)
    stored, scales = quantize_blockwise(grown, code=code, blocksize=_STATE_BLOCK)
    return {entry: stored, f"absmax{number}": scales.absmax}


def measure_need(peft_model: PeftModel, batches: Iterable[Any], loss: Callable[[PeftModel, Any], torch.Tensor]) -> dict[str, float]:
    """An estimate of the norm of the loss's gradient with respect to each adapted weight, by module path.

    Before the first step of a random start (B = 0). ``loss``: of one batch; gradients of ``batches`` are summed. Nothing is changed.
    """
    layers = lora_layers(peft_model)
    parameters = [layer.lora_B[ADAPTER].weight for layer in layers.values()]
    assert not any(parameter.any() for parameter in parameters), "measured at B = 0 only"
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    for batch in batches:
        for total, gradient in zip(sums, torch.autograd.grad(loss(peft_model, batch), parameters, allow_unused=True), strict=True):
            if gradient is not None:
                total.add_(gradient)
    return {path: _whole_norm(layer, total) for (path, layer), total in zip(layers.items(), sums, strict=True)}


def _whole_norm(layer: Any, gradient: torch.Tensor) -> float:
    """|G| from the gradient of B; see the module's docstring."""
    _, inputs = sides(layer.base_layer)
    a_norm = float(torch.linalg.vector_norm(layer.lora_A[ADAPTER].weight.detach().float()))
    return float(torch.linalg.vector_norm(gradient)) * math.sqrt(inputs) / (float(layer.scaling[ADAPTER]) * a_norm)


def by_need(gradient_norms: Mapping[str, float], dims: Mapping[str, tuple[int, int]], mean_rank: int, max_rank: int) -> dict[str, int]:
    """Ranks by need, with together at most the parameters that ``mean_rank`` for all would have, and less only by what fits no further rank.

    Every module gets at least 1 and at most ``max_rank`` and its smaller side. Ranks are handed out one by one to the module that
    is furthest behind its share (the divisors 1/2, 3/2, 5/2, ... of Webster's method); ties go to the earlier path.

    Raises:
        UsageError: ``mean_rank`` is above ``max_rank``. NonFiniteError: a norm is not a number.
    """
    assert gradient_norms.keys() == dims.keys(), sorted(gradient_norms.keys() ^ dims.keys())
    if not 1 <= mean_rank <= max_rank:
        raise UsageError(f"a mean rank of {mean_rank} is not between 1 and the largest rank, {max_rank}")
    broken = [path for path, norm in gradient_norms.items() if not math.isfinite(norm) or norm < 0]
    if broken:
        raise NonFiniteError(
            f"the gradients of {len(broken)} modules are not finite: {shortened(broken)}", hint="lower --alpha, or leave these modules out with --targets"
        )
    paths = sorted(dims, key=natural_key)
    left = sum(mean_rank * sum(dims[path]) for path in paths) - sum(sum(dims[path]) for path in paths)
    flat = not any(gradient_norms.values())  # nothing to go by: all alike
    shares = {path: 1.0 if flat else gradient_norms[path] / math.sqrt(sum(dims[path])) for path in paths}
    ranks = dict.fromkeys(paths, 1)
    heap = [(-2.0 * shares[path] / 3.0, number) for number, path in enumerate(paths)]
    heapq.heapify(heap)
    while heap:
        _, number = heapq.heappop(heap)
        path = paths[number]
        if ranks[path] < min(max_rank, *dims[path]) and sum(dims[path]) <= left:
            left -= sum(dims[path])
            ranks[path] += 1
            heapq.heappush(heap, (-shares[path] / (ranks[path] + 0.5), number))
    return ranks
