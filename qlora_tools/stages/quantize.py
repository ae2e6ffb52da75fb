"""Quantize the linears of a source; everything else is copied.

The result is laid out as stock transformers expects of a bitsandbytes checkpoint: every ``nn.Linear`` that is
not listed in ``llm_int8_skip_modules`` is stored in parts, weights of GPT-2's Conv1D transposed to [out, in].
Dequantizing is the same plan with no codec: a copy of the logical view.

With a file of calibration statistics every weight whose inputs it knows is stored in the way that disturbs its outputs least
(:mod:`qlora_tools.quant.calibrated`); the others as without. Weights named in ``keep`` stay dense: mixed precision.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.checkpoint.statistics import HELD_OUT, INPUT, Statistics
from qlora_tools.engine.plan import Outcome, Plan, Read, Source, Unit, Write, copy_units
from qlora_tools.finite import refuse_non_finite
from qlora_tools.models.family import Family
from qlora_tools.names import split_tensor
from qlora_tools.quant.calibrated import encode_calibrated
from qlora_tools.quant.codec import MIN_ELEMENTS, Codec
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.sums import relative_error


@dataclass(frozen=True)
class QuantizeReport:
    """What storing one weight in its codec did. ``relative_error`` is ||Q(W) - W|| / ||W|| (Frobenius).

    With calibration ``method`` names the candidate that won, and ``output_errors`` what each candidate left of the layer's output on held-out text:
    E|(Q(W) - W) x|^2 / E|W x|^2.
    """

    name: str
    relative_error: float
    dense_bytes: int
    stored_bytes: int
    method: str = ""
    output_errors: Mapping[str, float] = field(default_factory=dict)


def quantized_names(source: Source, family: Family, codec: Codec | None, keep: Collection[str] = ()) -> list[str]:
    """The tensors of ``source`` that ``codec`` will store: linears that are neither embedding nor head nor an expert's, nor named in ``keep``."""
    if codec is None:
        return []

    def fits(name: str, spec: TensorSpec) -> bool:
        return family.is_storable(name, spec.shape) and spec.numel >= MIN_ELEMENTS and spec.torch_dtype.is_floating_point

    return [name for name, spec in source.specs.items() if name not in keep and fits(name, spec)]


def plan_quantize(
    source: Source, family: Family, codec: Codec | None, *, statistics: Statistics | None = None, keep: Collection[str] = (), decoded: bool = False
) -> Plan:
    """Store the linears of ``source`` with ``codec`` and copy the rest, with them what ``keep`` names. ``codec=None`` writes everything dense.

    ``decoded``: store what the codes mean, in the dtype of the source, instead of the codes; not with statistics. ``statistics`` is the source ``statistics`` of the run. Units of quantized weights report a :class:`QuantizeReport`, the others nothing.
    """
    chosen = set(quantized_names(source, family, codec, keep))
    outputs: list[TensorSpec] = []
    units: list[Unit] = []
    for name, spec in source.specs.items():
        if name in chosen:
            assert codec is not None
            outputs.extend([spec] if decoded else codec.part_specs(stored_spec(spec, family)))
            units.append(encode_unit(codec, spec, family, decoded=True) if decoded else _unit(codec, spec, family, statistics))
        else:
            outputs.append(spec)
            units.extend(copy_units("model", spec))
    return Plan(tuple(outputs), tuple(units))


def _unit(codec: Codec, spec: TensorSpec, family: Family, statistics: Statistics | None) -> Unit:
    moments = statistics.name_of(INPUT, spec.name) if statistics else None
    if statistics is None or moments is None:
        return encode_unit(codec, spec, family)
    return calibrated_unit(codec, spec, family, moments, statistics.name_of(HELD_OUT, spec.name))


def calibrated_unit(codec: Codec, spec: TensorSpec, family: Family, moments: str, judge: str | None) -> Unit:
    """One weight of the source ``model`` through ``codec``, under ``moments`` of the source ``statistics`` and judged by ``judge`` there."""
    turn, stored = family.stores_inputs_first(spec.name, spec.shape), stored_spec(spec, family)

    def apply(dense: torch.Tensor, moments_II: torch.Tensor, judge_II: torch.Tensor | None = None) -> Outcome:
        dense = dense.T.contiguous() if turn else dense
        refuse_non_finite(stored.name, dense)
        choice = encode_calibrated(codec, stored, dense, moments_II, judge_II)
        error = relative_error(codec.decode(stored, choice.parts).to(dense.device), dense)
        stored_bytes = sum(part.nbytes for part in choice.parts.values())
        report = QuantizeReport(stored.name, error, stored.nbytes, stored_bytes, method=choice.name, output_errors=choice.errors)
        return Outcome(choice.parts, report)

    reads = [Read("model", stored.name), Read("statistics", moments), *([Read("statistics", judge)] if judge else [])]
    writes = tuple(Write(part.name) for part in codec.part_specs(stored))
    return Unit(f"{codec.name} {stored.name}", tuple(reads), writes, apply)


def encode_unit(codec: Codec, spec: TensorSpec, family: Family, *, decoded: bool = False) -> Unit:
    """One weight of the source ``model`` through ``codec``; an [in, out] weight is turned to the [out, in] of the parts.

    ``decoded``: and back, as a dense tensor like the source's.
    """
    turn = family.stores_inputs_first(spec.name, spec.shape)
    stored = stored_spec(spec, family)

    def apply(dense: torch.Tensor) -> Outcome:
        dense = dense.T.contiguous() if turn else dense
        parts = codec.encode(stored, dense)
        back = codec.decode(stored, parts)
        tensors = {spec.name: back.T.contiguous() if turn else back} if decoded else parts
        stored_bytes = sum(tensor.nbytes for tensor in tensors.values())
        return Outcome(tensors, QuantizeReport(stored.name, relative_error(back.to(dense.device), dense), stored.nbytes, stored_bytes))

    writes = (Write(spec.name),) if decoded else tuple(Write(part.name) for part in codec.part_specs(stored))
    return Unit(f"{codec.name} {stored.name}", (Read("model", stored.name),), writes, apply)


def stored_spec(spec: TensorSpec, family: Family) -> TensorSpec:
    """``spec`` in the [out, in] orientation that bitsandbytes layers store."""
    return TensorSpec(spec.name, spec.dtype, spec.shape[::-1]) if family.stores_inputs_first(spec.name, spec.shape) else spec


def quantization_config(codec: Codec | None, source: Source, family: Family, keep: Collection[str] = ()) -> dict[str, Any] | None:
    """The ``quantization_config`` of config.json; ``None`` for a dense checkpoint.

    The modules left dense are listed, so that transformers converts exactly the layers that are stored in parts.
    """
    if codec is None:
        return None
    chosen = set(quantized_names(source, family, codec, keep))
    described = codec.describe()
    dtypes = [source.specs[name].torch_dtype for name in chosen]
    if "bnb_4bit_compute_dtype" in described and dtypes:
        described["bnb_4bit_compute_dtype"] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    return {**described, "llm_int8_skip_modules": list(_dense_linears(source, family, chosen))}


def _dense_linears(source: Source, family: Family, chosen: set[str]) -> Iterator[str]:
    for name, spec in source.specs.items():
        module, leaf = split_tensor(name)
        if leaf == "weight" and len(spec.shape) == 2 and name not in chosen and family.role(module) != "embedding" and not family.is_bare(module):
            yield module
    for tied in family.tied:
        if f"{tied}.weight" not in source.specs:
            yield tied
