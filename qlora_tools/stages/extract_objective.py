"""Factors of one tensor for the base that the adapter will live on, with errors weighed by calibration statistics.

``extract_units.py`` has the plain case, the SVD of tuned - base. Here more is known: what the base becomes once it is
quantized, and which inputs and outputs of a layer matter. With Q(base) the base as it will compute:

==========  ==================================================================================================
``delta``   the change tuned - base alone; what quantization lost stays lost
``total``   tuned - Q(base): the rank goes wherever the error is, at small ranks into the noise of quantization
``split``   most of the rank on the change, ``rest_rank`` of it on what then remains of tuned - Q(base)
==========  ==================================================================================================

Errors are measured against what the objective approximates, plainly and under the metric.

Axes: O rows and I columns of the delta as a matrix, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qlora_tools.checkpoint.reader import tensor_sha256
from qlora_tools.engine.plan import Outcome
from qlora_tools.lowrank.certificate import Certificate, certify, error_curve
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import Truncated, seed_of, truncated_svd
from qlora_tools.lowrank.weighted import Metric, square_root, weighted_svd
from qlora_tools.quant.codec import Codec
from qlora_tools.specs import TensorSpec, spec_of
from qlora_tools.stages.extract_units import Factored, Weighed, check_finite, is_same, scan_delta, slimmed

OBJECTIVES = ("delta", "total", "split", "auto")
WEIGHTS = ("none", "input", "fisher")
FORMATS = ("nf4", "int8", "int4")


@dataclass(frozen=True)
class Task:
    """How to factor the tensor ``spec``. ``transposed``: it stores [inputs, outputs]. ``moments``: which statistics are given, in order, of ``input``
    and ``output``. ``plain``: they rank and judge components, which are still those of the plain SVD. ``codec``: stores the base, ``None``: as it is.

    ``rank``, ``adaptive``, ``base_sha256`` and ``hash_base`` as in ``extract_units.factor``.
    """

    spec: TensorSpec
    rank: int
    dtype: torch.dtype
    adaptive: bool
    base_sha256: str | None
    hash_base: bool
    transposed: bool = False
    moments: tuple[str, ...] = ()
    plain: bool = False
    objective: str = "delta"
    rest_rank: int = 0
    codec: Codec | None = None


def factor_for(task: Task) -> Callable[..., Outcome]:
    """The unit function of a targeted tensor: (base, tuned, the moments that ``task`` names) -> :class:`Factored`."""
    name = task.spec.name

    def apply(base: torch.Tensor, tuned: torch.Tensor, *moments: torch.Tensor) -> Outcome:
        whole = task.codec is not None and task.objective != "delta"
        if is_same(base, tuned) and not whole:
            return Outcome(report=Factored(name))
        delta_OI, energy, weight_energy, noise = scan_delta(base.reshape(base.shape[0], -1), tuned.reshape(base.shape[0], -1))
        check_finite(name, energy, base, tuned)
        digest = tensor_sha256(base.cpu()) if task.hash_base else task.base_sha256
        target_OI = delta_OI
        if task.codec is not None and whole:
            missing = base.float() - held(task.codec, name, base, transposed=task.transposed).float()
            target_OI = delta_OI + missing.reshape(delta_OI.shape)
        found = truncated_svd(target_OI, task.rank, seed=seed_of(name))
        if found.energy == 0.0:
            return Outcome(report=Factored(name))
        metric = metric_of(task, moments)
        best = None if metric is None else weighted_svd(target_OI, metric, task.rank, seed=seed_of(name))
        chosen = found.factors if best is None or task.plain else best.factors
        if task.objective == "split" and whole and energy > 0.0:
            chosen = _split(task, metric, delta_OI, target_OI)
        stored = chosen.to(task.dtype)
        lost, certificate = _judged(target_OI, found, stored, task, weight_norm=weight_energy**0.5, noise=noise)
        weighed = None if metric is None or best is None else _weighed(metric, best.found, target_OI, stored, task)
        kept = float((delta_OI * stored.dense()).sum(dtype=torch.float64)) / energy if whole and energy > 0.0 else None
        factors = LowRank(stored.a_RI.cpu(), stored.b_OR.cpu())
        return Outcome(report=Factored(name, weight_energy**0.5, noise, digest, slimmed(found, factors), factors, certificate, lost, weighed, kept))

    return apply


def metric_of(task: Task, moments: tuple[torch.Tensor, ...]) -> Metric | None:
    """The metric of the tensor as it is stored; ``None`` without statistics."""
    roots = {kind: square_root(moment) for kind, moment in zip(task.moments, moments, strict=True)}
    inputs, outputs = roots.get("input"), roots.get("output")
    if inputs is None and outputs is None:
        return None
    return Metric(outputs, inputs) if task.transposed else Metric(inputs, outputs)


def held(codec: Codec, name: str, weight: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """``weight`` as a base stored by ``codec`` computes with it, in the orientation it came in."""
    upright = weight.T.contiguous() if transposed else weight
    spec = spec_of(name, upright)
    decoded = codec.decode(spec, codec.encode(spec, upright)).to(weight.device)
    return decoded.T.contiguous() if transposed else decoded


def _split(task: Task, metric: Metric | None, delta_OI: torch.Tensor, target_OI: torch.Tensor) -> LowRank:
    """fp32 factors: those of the change first, then those of what they leave."""
    first = _best(task, metric, delta_OI, task.rank - task.rest_rank)
    second = _best(task, metric, target_OI - first.dense(), task.rest_rank)
    return LowRank(torch.cat([first.a_RI, second.a_RI]), torch.cat([first.b_OR, second.b_OR], dim=1))


def _best(task: Task, metric: Metric | None, matrix_OI: torch.Tensor, rank: int) -> LowRank:
    seed = seed_of(task.spec.name)
    if metric is None or task.plain:
        return truncated_svd(matrix_OI, rank, seed=seed).factors
    return weighted_svd(matrix_OI, metric, rank, seed=seed).factors


def _judged(
    matrix_OI: torch.Tensor, found: Truncated, stored: LowRank, task: Task, *, weight_norm: float = 0.0, noise: float = 0.0
) -> tuple[torch.Tensor | None, Certificate | None]:
    if task.adaptive:
        return error_curve(matrix_OI, stored), None
    return None, certify(matrix_OI, found, stored, weight_norm=weight_norm, noise=noise)


def _weighed(metric: Metric, best: Truncated, target_OI: torch.Tensor, stored: LowRank, task: Task) -> Weighed:
    lost, certificate = _judged(metric.image(target_OI), best, metric.image_of(stored), task)
    return Weighed(slimmed(best, LowRank(stored.a_RI.cpu(), stored.b_OR.cpu())), certificate, lost)
