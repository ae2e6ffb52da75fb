"""How far a graph may be from what it was made of, by scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qlora_tools.export.schemes import Scheme, default_scheme


@dataclass(frozen=True)
class Bound:
    """Largest relative errors allowed: against the carried weights, and against the dense ones."""

    carried: float
    dense: float


#: Activations are rounded to 8 bits per block in the quantized graphs; int4 weights alone move logits by tens of percent in small models.
BOUNDS: Mapping[str, Bound] = {
    "fp32": Bound(2e-4, 2e-4),
    "fp16": Bound(0.02, 0.02),
    "bf16": Bound(0.1, 0.1),
    "int8": Bound(0.1, 0.2),
    "w8a8": Bound(0.3, 0.4),
    "int4": Bound(0.15, 0.9),
    "nf4": Bound(0.1, 0.9),
}


def bound_of(scheme: Scheme) -> Bound:
    """What a scheme's graphs are held to. CUDA's do not round activations to 8 bits, so no scheme may be further from its own weights than floats are."""
    bound = BOUNDS[scheme.carried]
    if scheme.target.compute == "F32" or scheme.target.standard:
        return bound
    return replace(bound, carried=min(bound.carried, BOUNDS[default_scheme(scheme.target)].carried))
