"""Quantize the linears of a source; everything else is copied.

The result is laid out as stock transformers expects of a bitsandbytes checkpoint: every ``nn.Linear`` that is
not listed in ``llm_int8_skip_modules`` is stored in parts, weights of GPT-2's Conv1D transposed to [out, in].
Dequantizing is the same plan with no codec: a copy of the logical view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit, Write, copy_units
from qlora_tools.models.family import Family
from qlora_tools.names import split_tensor
from qlora_tools.quant.codec import Codec
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.sums import relative_error

#: Weights smaller than this stay as they are, whatever their role: quantizing them saves nothing.
MIN_ELEMENTS = 1024


@dataclass(frozen=True)
class QuantizeReport:
    """What storing one weight in its codec did. ``relative_error`` is ||Q(W) - W|| / ||W|| (Frobenius)."""

    name: str
    relative_error: float
    dense_bytes: int
    stored_bytes: int
    extra: Mapping[str, float] = field(default_factory=dict)


#: Extra numbers about one tensor: (the exact tensor, what the codec made of it, other tensors read) -> name -> value.
Measure = Callable[..., Mapping[str, float]]


def quantized_names(source: Source, family: Family, codec: Codec | None) -> list[str]:
    """The tensors of ``source`` that ``codec`` will store: linears that are neither embedding nor head."""
    if codec is None:
        return []
    return [
        name for name, spec in source.specs.items() if family.is_linear(name, spec.shape) and spec.numel >= MIN_ELEMENTS and spec.torch_dtype.is_floating_point
    ]


def plan_quantize(source: Source, family: Family, codec: Codec | None) -> Plan:
    """Store the linears of ``source`` with ``codec`` and copy the rest. ``codec=None`` writes everything dense.

    Units of quantized weights report a :class:`QuantizeReport`, the others nothing.
    """
    chosen = set(quantized_names(source, family, codec))
    outputs: list[TensorSpec] = []
    units: list[Unit] = []
    for name, spec in source.specs.items():
        if name in chosen:
            assert codec is not None
            outputs.extend(codec.part_specs(stored_spec(spec, family)))
            units.append(encode_unit(codec, spec, family))
        else:
            outputs.append(spec)
            units.extend(copy_units("model", spec))
    return Plan(tuple(outputs), tuple(units))


def encode_unit(codec: Codec, spec: TensorSpec, family: Family, others: Iterable[Read] = (), measure: Measure | None = None) -> Unit:
    """One weight of the source ``model`` through ``codec``; an [in, out] weight is turned to the [out, in] of the parts."""
    turn = family.stores_inputs_first(spec.name, spec.shape)
    stored = stored_spec(spec, family)

    def apply(dense: torch.Tensor, *rest: torch.Tensor) -> Outcome:
        dense = dense.T.contiguous() if turn else dense
        parts = codec.encode(stored, dense)
        decoded = codec.decode(stored, parts)
        extra = measure(dense, decoded, *(other.T if turn else other for other in rest)) if measure else {}
        error = relative_error(decoded, dense)
        stored_bytes = sum(part.nbytes for part in parts.values())
        return Outcome(parts, QuantizeReport(stored.name, error, stored.nbytes, stored_bytes, extra))

    writes = tuple(Write(part.name) for part in codec.part_specs(stored))
    return Unit(f"{codec.name} {stored.name}", (Read("model", stored.name), *others), writes, apply)


def stored_spec(spec: TensorSpec, family: Family) -> TensorSpec:
    """``spec`` in the [out, in] orientation that bitsandbytes layers store."""
    return TensorSpec(spec.name, spec.dtype, spec.shape[::-1]) if family.stores_inputs_first(spec.name, spec.shape) else spec


def quantization_config(codec: Codec | None, source: Source, family: Family) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json; ``None`` for a dense checkpoint.

    The modules left dense are listed, so that transformers converts exactly the layers that are stored in parts.
    """
    if codec is None:
        return None
    chosen = set(quantized_names(source, family, codec))
    described = codec.describe()
    dtypes = [source.specs[name].torch_dtype for name in chosen]
    if "bnb_4bit_compute_dtype" in described and dtypes:
        described["bnb_4bit_compute_dtype"] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    return {**described, "llm_int8_skip_modules": list(_dense_linears(source, family, chosen))}


def _dense_linears(source: Source, family: Family, chosen: set[str]) -> Iterator[str]:
    for name, spec in source.specs.items():
        module, leaf = split_tensor(name)
        if leaf == "weight" and len(spec.shape) == 2 and name not in chosen and family.role(module) != "embedding":
            yield module
    for tied in family.tied:
        if f"{tied}.weight" not in source.specs:
            yield tied
