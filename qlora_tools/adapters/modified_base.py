"""Adapters whose training began by changing the base, made into equal ones for the base as it was.

PiSSA and OLoRA start at factors taken from the weight itself, ``W = (W - s B0 A0) + s B0 A0``, and train them beside the
residual. The adapter file alone is then wrong on W. What it does to W is ``s (B A - B0 A0)``: the factors ``[A; A0]`` and
``[B, -B0]`` of twice the rank. B0 and A0 come again from W: their product does not depend on the signs that a decomposition is
free to choose. As a check, the trained product must lie nearer to the initial one than the initial one to zero.

References, followed in where the scale stands: PEFT's ``pissa_init`` (exact SVD; s B0 A0 is the best rank-R approximation of W)
and ``olora_init`` (QR of the stored weight; s B0 A0 is s times its first R columns and rows). Refused by name: what a random
choice (``pissa_niter_``), data (CorDA, LoRA-GA) or quantization (LoftQ) decided and the file does not tell.

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from qlora_tools.adapters.peft_config import HARMLESS_INITS
from qlora_tools.adapters.portable import LINEAR, Layer, Portable
from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError, UnsupportedError, UsageError
from qlora_tools.lowrank.algebra import distance, norm
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.initial import olora
from qlora_tools.lowrank.svd import seed_of, truncated_svd
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress

#: What can be recomputed from the weight alone.
RECOMPUTED = ("pissa", "olora")
_WAY_OUT = "save it with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`, which makes a plain LoRA"


@dataclass(frozen=True)
class Restored:
    """How far training moved each module: ||s B A - s B0 A0|| / ||s B0 A0||, by module."""

    init: str
    moved: Mapping[str, float]

    @property
    def largest(self) -> float:
        return max(self.moved.values())


def changed_init(content: Mapping[str, object], where: str = "the adapter") -> str | None:
    """The initialisation of an ``adapter_config.json`` if it changed the base: ``pissa`` or ``olora``; ``None`` for a plain one.

    Raises:
        UnsupportedError: one that changed the base in a way that cannot be recomputed.
    """
    init = content.get("init_lora_weights", True)
    if not isinstance(init, str) or init.lower() in HARMLESS_INITS:
        return None
    if init in RECOMPUTED or init.lower() == "olora":
        return init.lower()
    reason = "its initial factors were random" if init.startswith("pissa_niter") else "its initial factors are not told by the weights"
    raise UnsupportedError(
        f"{where}: init_lora_weights is {init!r}: the adapter belongs to base weights that its initialisation changed, and {reason}", hint=_WAY_OUT
    )


def on_original_base(
    portable: Portable, init: str, base: Source, targets: Mapping[str, tuple[str, bool]], *, device: str = "cpu", progress: Progress = SILENT
) -> tuple[Portable, Restored]:
    """The equal adapter of twice the rank for ``base``, the model before training. ``targets``: module -> name of its weight
    there, and whether that is stored inputs first.

    Factors come back in fp32: ``B A`` and ``B0 A0`` nearly cancel.

    Raises:
        UnsupportedError: a layer that PEFT does not initialise so. IncompatibleError: the initial factors of this base are
        not near the trained ones, so that it is not the base of training.
    """
    _check_layers(portable, init, targets)
    units = [
        Unit(f"{init} of {module}", (Read("base", targets[module][0]),), (), _restoring(module, layer, init, targets[module][1]))
        for module, layer in portable.layers.items()
    ]
    found: list[tuple[str, Layer, float]] = run(Plan((), tuple(units)), {"base": base}, device=device, title=f"undo {init}", progress=progress)
    moved = {module: distance for module, _, distance in found}
    strange = [module for module, share in moved.items() if not share < 1.0]
    if strange:
        raise IncompatibleError(
            f"the {init} factors of this base are not where the adapter started: {shortened(strange, 3)} moved by {moved[strange[0]]:.2f} of their own size",
            hint="give the exact model that training began from with --base",
        )
    layers = {module: layer for module, layer, _ in found}
    note = f"started with {init}: made into an adapter of twice the rank for the base as it was"
    return replace(portable, layers=layers, notes=(*portable.notes, note)), Restored(init, moved)


def needs_base(init: str) -> UsageError:
    """The error for an adapter that started with ``init`` and came without its base."""
    return UsageError(f"the adapter started with {init}, which changed the base", hint=f"give the model it was trained from with --base, or {_WAY_OUT}")


def _check_layers(portable: Portable, init: str, targets: Mapping[str, tuple[str, bool]]) -> None:
    wrong = [module for module, layer in portable.layers.items() if layer.kind != LINEAR]
    if wrong:
        raise UnsupportedError(f"{init} on {shortened(wrong, 3)}: PEFT has it for linear layers only", hint=_WAY_OUT)
    dora = [module for module, layer in portable.layers.items() if layer.magnitude is not None]
    if dora:
        raise UnsupportedError(f"{init} with DoRA on {shortened(dora, 3)}: its lengths belong to the changed base", hint=_WAY_OUT)
    if init == "olora" and any(inputs_first for _, inputs_first in targets.values()):
        raise UnsupportedError("olora on weights stored inputs first: PEFT decomposes them the wrong way round", hint=_WAY_OUT)
    if any(layer.scale <= 0.0 for layer in portable.layers.values()):
        raise UnsupportedError(f"{init} with a scale that is not positive", hint=_WAY_OUT)


def _restoring(module: str, layer: Layer, init: str, inputs_first: bool) -> Callable[[torch.Tensor], Outcome]:
    def restore(weight: torch.Tensor) -> Outcome:
        weight_OI = weight.T if inputs_first else weight
        if tuple(weight_OI.shape) != (layer.b.shape[0], layer.a.shape[1]) or layer.rank > min(weight_OI.shape):
            raise IncompatibleError(
                f"`{module}` has factors for {layer.b.shape[0]} x {layer.a.shape[1]}, the base has {list(weight_OI.shape)}", hint="give the base of training"
            )
        started = initial(weight_OI, layer.rank, layer.scale, init, module)
        trained = LowRank(layer.a.to(weight.device).float(), layer.b.to(weight.device).float())
        size = norm(started)
        moved = distance(trained, started) / size if size else math.inf
        a_RI = torch.cat([trained.a_RI, started.a_RI]).cpu()
        b_OR = torch.cat([trained.b_OR, -started.b_OR], dim=1).cpu()
        return Outcome(report=(module, replace(layer, a=a_RI, b=b_OR), moved))

    return restore


def initial(weight_OI: torch.Tensor, rank: int, scale: float, init: str, name: str = "") -> LowRank:
    """``B0`` and ``A0`` (fp32) as PEFT starts with them, up to signs."""
    if init == "olora":
        return olora(weight_OI.float(), rank)
    factors = truncated_svd(weight_OI.float(), rank, seed=seed_of(name), exact=True).factors
    return LowRank(factors.a_RI / math.sqrt(scale), factors.b_OR / math.sqrt(scale))
