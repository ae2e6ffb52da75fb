"""A starting adapter for training on a quantized base, computed from the base's own weights.

What the three methods are is in ``lowrank/initial.py``. LoftQ and QERA give the stock quantized base back some of what quantization lost.
PiSSA moves the leading part of each weight into the adapter, so its base is another one: the weights less ``scale B A``, quantized
afterwards (they are smaller, so less is lost). The adapter written here then fits that residual base alone.

The LoRA scale is divided out of the factors: what every reader computes, ``scale B A``, is what was meant.

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qlora_tools.adapters.peft_files import Target, adapter_config, task_type_of
from qlora_tools.checkpoint.reader import tensor_sha256
from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit, Write
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.finite import refuse_non_finite
from qlora_tools.lowrank.initial import loftq, pissa, qera
from qlora_tools.lowrank.svd import squared_norm
from qlora_tools.models.family import Family
from qlora_tools.names import shortened, split_tensor
from qlora_tools.quant.codec import MIN_ELEMENTS, Codec
from qlora_tools.quant.gptq import output_error
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.extract import Moments, sides
from qlora_tools.stages.extract_objective import held

METHODS = ("pissa", "loftq", "qera")


@dataclass(frozen=True)
class InitConfig:
    """``method``: one of :data:`METHODS`. ``scale`` = ``alpha / rank``; ``alpha=None``: the rank. ``targets``: preset or regular expression.
    ``dtype``: of the factors, a torch name of 16 bits or more."""

    method: str = "qera"
    rank: int = 16
    alpha: float | None = None
    targets: str = "all"
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r} is unknown", hint=f"choose one of {', '.join(METHODS)}")
        if self.rank < 1:
            raise UsageError(f"rank {self.rank} holds nothing", hint="give a rank of at least 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(f"alpha {self.alpha} is no scale", hint="give a positive number, most often the rank or twice the rank")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Started:
    """One tensor. Energies (squared Frobenius norms): of the weight, of what quantization loses of it, and of what it loses with the adapter in place;
    ``weighed_*``: the same as seen through the layer's inputs."""

    name: str
    sha256: str
    weight: float
    lost: float
    left: float
    weighed_lost: float | None = None
    weighed_left: float | None = None


@dataclass(frozen=True)
class Start:
    """The plan (source ``base``, and ``stats`` for QERA), whose units report :class:`Started`, and ``adapter_config.json``."""

    plan: Plan
    config: Mapping[str, Any]


def plan_init(
    base: Source, family: Family, config: InitConfig, codec: Codec, *, base_config: Mapping[str, Any], base_model: str, moments: Moments | None
) -> Start:
    """Plan the adapter from headers alone. ``moments``: names in the source ``stats``; without, QERA would do as LoftQ.

    Raises:
        UsageError: a rank above a tensor's smaller side; targets that match nothing. IncompatibleError: statistics that lack a tensor.
    """
    linears = [name for name, spec in base.specs.items() if family.is_storable(name, spec.shape) and spec.numel >= MIN_ELEMENTS]
    chosen = set(family.targets(config.targets, [split_tensor(name)[0] for name in linears]))
    names = [name for name in linears if split_tensor(name)[0] in chosen]
    _check(names, base.specs, config, moments)
    live = family.live_names(base_config, base.specs)
    outputs: list[TensorSpec] = []
    units, targets = [], []
    for name in names:
        spec = base.specs[name]
        target = Target(live(split_tensor(name)[0]), spec.shape, config.rank, family.stores_inputs_first(name, spec.shape))
        stored = target.specs({torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[config.dtype])
        statistics = moments.name_of("input", name) if moments else None
        reads = (Read("base", name), *([Read("stats", statistics)] if statistics else []))
        units.append(Unit(f"start {name}", reads, tuple(Write(part.name) for part in stored), _starting(name, target, stored, config, codec)))
        outputs.extend(stored)
        targets.append(target)
    modules = {live(split_tensor(name)[0]) for name in base.specs}
    written = adapter_config(targets, modules, base_model=base_model, task_type=task_type_of(base_config))
    alpha = config.scale * config.rank
    return Start(Plan(tuple(outputs), tuple(units)), {**written, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "inference_mode": False})


def _check(names: Iterable[str], specs: Mapping[str, TensorSpec], config: InitConfig, moments: Moments | None) -> None:
    narrow = [name for name in names if min(sides(specs[name])) < config.rank]
    if narrow:
        least = min(min(sides(specs[name])) for name in narrow)
        raise UsageError(f"rank {config.rank} is above the smaller side of {len(narrow)} tensors: {shortened(narrow)}", hint=f"use --rank {least} or less")
    if config.method == "qera" and moments is not None:
        missing = [name for name in names if moments.name_of("input", name) is None]
        if missing:
            raise IncompatibleError(f"the statistics say nothing of {len(missing)} tensors: {shortened(missing)}", hint="run `qlt calibrate` again")


def _starting(name: str, target: Target, stored: list[TensorSpec], config: InitConfig, codec: Codec) -> Callable[..., Outcome]:
    def apply(base: torch.Tensor, moments_II: torch.Tensor | None = None) -> Outcome:
        refuse_non_finite(name, base)
        weight_OI = base.T.contiguous() if target.transposed else base

        def quantize(values_OI: torch.Tensor) -> torch.Tensor:
            return held(codec, name, values_OI)

        if config.method == "pissa":
            found = pissa(weight_OI, config.rank, config.scale, name)
        elif config.method == "loftq" or moments_II is None:
            found = loftq(weight_OI, quantize, config.rank, config.scale, name)
        else:
            found = qera(weight_OI, quantize, moments_II, config.rank, config.scale, name)
        factors = found.to(config.dtype)
        product_OI = factors.dense() * config.scale
        lost_OI = weight_OI.float() - quantize(weight_OI).float()
        left_OI = lost_OI - product_OI
        if config.method == "pissa":
            residual_OI = (weight_OI.float() - product_OI).to(weight_OI.dtype)
            left_OI = weight_OI.float() - quantize(residual_OI).float() - product_OI
        energies = [squared_norm(part) for part in (weight_OI.float(), lost_OI, left_OI)]
        weighed = [] if moments_II is None else [output_error(part, moments_II) for part in (lost_OI, left_OI)]
        values = {part.name: value.reshape(part.shape).cpu().contiguous() for part, value in zip(stored, (factors.a_RI, factors.b_OR), strict=True)}
        return Outcome(values, Started(name, tensor_sha256(base.cpu()), *energies, *weighed))

    return apply
