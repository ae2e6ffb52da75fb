"""Adapters added, cut to a lower rank and compared, layer by layer, from their factors alone.

A sum is ``sum w_j s_j B_j A_j``: exact with the ranks added up, or the best adapter of a rank asked for. What has no sum is
refused by name: DoRA rescales rows of one base weight, and whole tensors (``modules_to_save``, token rows) can only be taken
over, once, where all adapters agree or one alone has them. Leaves out files, and how ranks share a budget (``lowrank/ranks.py``).

Axes: O outputs, I inputs (a convolution's kernel flattened into them), R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from qlora_tools.adapters.portable import CONV, EMBEDDING, Layer, Portable
from qlora_tools.adapters.portable_peft import scale_baked
from qlora_tools.engine.plan import Outcome, Plan, Unit
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError, UnsupportedError, UsageError
from qlora_tools.lowrank.algebra import Agreement, CutError, Decomposed, agreement, cut_error, decompose, norm
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.ranks import Spectrum, rank_for_energy, ranks_for_bytes
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress, Task

T = TypeVar("T")
R = TypeVar("R")
Weighted = tuple[str, Portable, float]
_MERGE = "merge the adapters into the base with `qlt merge` instead"


@dataclass(frozen=True)
class Row:
    """One layer of a result: the rank it had (of a sum: all ranks added) and what the new one costs."""

    module: str
    full_rank: int
    cut: CutError


@dataclass(frozen=True)
class LayerAgreement:
    """How two adapters agree on one module."""

    module: str
    agreement: Agreement


@dataclass(frozen=True)
class Compared:
    """Layers that both adapters change; cosine and size ratio of the whole changes, where what one adapter leaves alone counts as
    zero in it; and the modules that only one changes."""

    rows: tuple[LayerAgreement, ...]
    cosine: float
    ratio: float
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def factors_of(layer: Layer) -> LowRank:
    """The update without its scale as a matrix: [O, I k...], or [D, V] for an embedding."""
    return LowRank(layer.a.reshape(layer.rank, -1), layer.b.reshape(layer.b.shape[0], -1))


def sum_of(terms: Sequence[Weighted], rank: int | None = None, *, progress: Progress = SILENT) -> tuple[Portable, list[Row]]:
    """The weighted sum of adapters (name, adapter, weight), exact or cut to ``rank``.

    One adapter with weight 1 and no cut comes back as it is. Factors keep the widest dtype of their sources where weights and
    scales are exact in it, else fp32.

    Raises:
        UnsupportedError: DoRA. IncompatibleError: shapes or whole tensors that differ. UsageError: nothing to add.
    """
    if not terms:
        raise UsageError("no adapter to add", hint="name at least one")
    if len(terms) == 1 and terms[0][2] == 1.0 and rank is None:
        return terms[0][1], []
    refuse_dora([(name, portable) for name, portable, _ in terms], "added")
    modules = sorted({module for _, portable, _ in terms for module in portable.layers})

    def add(module: str) -> tuple[Layer, Row]:
        return _added(module, [(name, portable.layers[module], weight) for name, portable, weight in terms if module in portable.layers], rank)

    added = _each(modules, add, "add", progress)
    result = Portable(
        {module: layer for module, (layer, _) in zip(modules, added, strict=True)},
        _taken_over([(name, portable.replacements, weight) for name, portable, weight in terms], torch.equal, "the whole tensor"),
        _taken_over([(name, portable.token_rows, weight) for name, portable, weight in terms], _same_rows, "token rows of"),
        next((portable.base_name for _, portable, _ in terms if portable.base_name), None),
        tuple(dict.fromkeys(note for _, portable, _ in terms for note in portable.notes)),
        inputs_first=any(portable.inputs_first for _, portable, _ in terms),
        tied=any(portable.tied for _, portable, _ in terms),
    )
    return result, [row for _, row in added]


def _added(module: str, held: list[tuple[str, Layer, float]], rank: int | None) -> tuple[Layer, Row]:
    first_name, first, _ = held[0]
    for name, layer, _ in held[1:]:
        if (layer.kind, layer.a.shape[1:], layer.b.shape[0]) != (first.kind, first.a.shape[1:], first.b.shape[0]):
            raise IncompatibleError(
                f"`{module}` is {first.b.shape[0]} x {list(first.a.shape[1:])} in {first_name} and {layer.b.shape[0]} x {list(layer.a.shape[1:])} in {name}",
                hint="only adapters of one base can be added",
            )
    exact = _concatenated(held)
    bias = None
    if any(layer.bias is not None for _, layer, _ in held):
        bias = torch.stack([layer.bias.float() * weight for _, layer, weight in held if layer.bias is not None]).sum(0)
    whole = factors_of(exact)
    if rank is None or rank >= exact.rank:
        return replace(exact, bias=bias), Row(module, exact.rank, CutError(norm(whole), exact.rank, 0.0, 0.0))
    layer, cut = _cut(exact, whole, rank, _widest([layer for _, layer, _ in held]))
    return replace(layer, bias=bias), Row(module, exact.rank, cut)


def _concatenated(held: list[tuple[str, Layer, float]]) -> Layer:
    """The exact sum at scale 1."""
    first = held[0][1]
    scaled = [scale_baked(replace(layer, scale=layer.scale * weight)) for _, layer, weight in held]
    dtype = _widest(scaled) if all(layer.scale == 1.0 for layer in scaled) else torch.promote_types(_widest(scaled), torch.float32)
    terms = [(factors_of(layer).to(dtype), layer.scale) for layer in scaled]
    a_RI = torch.cat([term.a_RI for term, _ in terms])
    b_OR = torch.cat([term.b_OR if scale == 1.0 else term.b_OR * scale for term, scale in terms], dim=1)
    return _shaped(first, LowRank(a_RI, b_OR))


def _widest(layers: Sequence[Layer]) -> torch.dtype:
    found = layers[0].b.dtype
    for layer in layers:
        found = torch.promote_types(torch.promote_types(found, layer.a.dtype), layer.b.dtype)
    return found


def _shaped(like: Layer, factors: LowRank) -> Layer:
    """Factors as a layer of the kind and kernel of ``like``, at scale 1, without its bias."""
    a = factors.a_RI.reshape(factors.rank, *like.a.shape[1:]).contiguous()
    b = factors.b_OR.reshape(-1, factors.rank, *(1 for _ in like.a.shape[2:])).contiguous()
    return Layer(a, b, 1.0, like.kind)


def _cut(layer: Layer, whole: LowRank, rank: int, dtype: torch.dtype) -> tuple[Layer, CutError]:
    """``layer`` (``whole`` is its product, scale and all) at ``rank`` in ``dtype``, and what that costs."""
    found = decompose(whole)
    stored = found.cut(rank).to(dtype)
    return _shaped(layer, stored), cut_error(whole, found, stored)


def _same_rows(first: tuple[tuple[int, ...], torch.Tensor], second: tuple[tuple[int, ...], torch.Tensor]) -> bool:
    return first[0] == second[0] and torch.equal(first[1], second[1])


def _taken_over(held: Sequence[tuple[str, Mapping[str, T], float]], same: Callable[[T, T], bool], what: str) -> dict[str, T]:
    """Things that cannot be weighted, each from the one adapter that has it, or from all that agree on it."""
    taken: dict[str, tuple[str, T]] = {}
    for name, things, weight in held:
        for tensor, value in things.items():
            if tensor in taken and not same(taken[tensor][1], value):
                raise IncompatibleError(f"{what} `{tensor}` differs in {taken[tensor][0]} and {name}: there is no sum of the two", hint=_MERGE)
            if tensor not in taken and weight != 1.0 and sum(tensor in others for _, others, _ in held) == 1:
                raise IncompatibleError(f"{what} `{tensor}` of {name} cannot be taken {weight:g} times", hint=f"give {name} weight 1, or {_MERGE}")
            taken.setdefault(tensor, (name, value))
    return {tensor: value for tensor, (_, value) in taken.items()}


def refuse_dora(adapters: Sequence[tuple[str, Portable]], done: str) -> None:
    """Raise UnsupportedError where an adapter holds DoRA magnitudes; ``done``: what was to be done with it."""
    for name, portable in adapters:
        dora = [module for module, layer in portable.layers.items() if layer.magnitude is not None]
        if dora:
            raise UnsupportedError(f"{name} is DoRA ({shortened(dora, 3)}): it rescales rows of the base, so it cannot be {done}", hint=_MERGE)


def resized(
    name: str,
    portable: Portable,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_bytes: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Portable, list[Row], list[str]]:
    """The best adapter of lower rank: ``rank`` everywhere, the smallest ranks that keep a share ``energy`` of each layer, or the ranks
    that lose least within ``max_bytes`` of factors. Also the rows of the report and the modules that keep nothing.

    Layers that are at or below their new rank keep their bits.

    Raises:
        UsageError: not exactly one of the three, or a value out of range, or nothing would be left. UnsupportedError: DoRA.
    """
    if sum(value is not None for value in (rank, energy, max_bytes)) != 1:
        raise UsageError("rank, energy and max_bytes each decide the ranks", hint="give one of --rank, --energy and --max-bytes")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank} keeps nothing", hint="give a rank of at least 1")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise UsageError(f"energy {energy} is not a share", hint="give a number above 0 and up to 1, such as 0.9")
    refuse_dora([(name, portable)], "cut")
    ranks = {} if max_bytes is None else _ranks_for_bytes(portable, max_bytes, progress)

    def resize(module: str) -> tuple[Layer, Row] | None:
        return _resized(module, portable.layers[module], rank if max_bytes is None else ranks[module], energy)

    found = dict(zip(portable.layers, _each(portable.layers, resize, "resize", progress), strict=True))
    layers = {module: kept[0] for module, kept in found.items() if kept is not None}
    rows = [kept[1] for kept in found.values() if kept is not None]
    dropped = [module for module in portable.layers if module not in layers]
    if not layers:
        raise UsageError("no layer would keep anything", hint="raise --max-bytes or --energy")
    biased = [module for module in dropped if portable.layers[module].bias is not None]
    if biased:
        raise UsageError(f"{shortened(biased, 3)} would lose all factors but holds a bias", hint="raise --max-bytes or --energy")
    return replace(portable, layers=layers), rows, dropped


def size_of(layer: Layer) -> float:
    """||scale B A||_F."""
    return norm(_scaled(layer))


def _scaled(layer: Layer) -> LowRank:
    """The product with its scale, in fp32 or wider."""
    factors = factors_of(layer)
    return LowRank(factors.a_RI, factors.b_OR.to(torch.promote_types(factors.b_OR.dtype, torch.float32)) * layer.scale)


def _resized(module: str, layer: Layer, rank: int | None, energy: float | None) -> tuple[Layer, Row] | None:
    """One layer at ``rank``, or at the smallest that keeps ``energy``; ``None`` where it keeps nothing."""
    found = decompose(_scaled(layer))
    wanted = rank_for_energy(_spectrum(layer, found), energy) if energy is not None else rank
    assert wanted is not None
    if wanted >= layer.rank:
        return layer, Row(module, layer.rank, CutError(found.energy**0.5, layer.rank, 0.0, 0.0))
    if not wanted:
        return None
    stored = found.cut(wanted).to(layer.b.dtype)
    return replace(_shaped(layer, stored), bias=layer.bias), Row(module, layer.rank, cut_error(_scaled(layer), found, stored))


def _spectrum(layer: Layer, found: Decomposed) -> Spectrum:
    return Spectrum(factors_of(layer).shape, found.s_R[: found.numerical_rank], found.energy)


def _ranks_for_bytes(portable: Portable, max_bytes: int, progress: Progress) -> dict[str, int]:
    whole = portable.nbytes - sum(tensor.numel() * tensor.element_size() for layer in portable.layers.values() for tensor in (layer.a, layer.b))
    if whole >= max_bytes:
        raise UsageError(f"max_bytes {max_bytes} does not hold the {whole} bytes that are no factors", hint="raise --max-bytes")
    layers = portable.layers
    spectra = _each(layers, lambda module: _spectrum(layers[module], decompose(_scaled(layers[module]))), "measure", progress)
    width = max(layer.b.element_size() for layer in layers.values())
    return dict(zip(layers, ranks_for_bytes(spectra, max_bytes - whole, width), strict=True))


def _each(modules: Iterable[str], work: Callable[[str], R], title: str, progress: Progress) -> list[R]:
    """``work`` done for every module, several at a time with one thread each, in order."""

    def unit(module: str) -> Unit:
        return Unit(f"{title} {module}", (), (), lambda: Outcome(report=work(module)))

    found: list[R] = run(Plan((), tuple(map(unit, modules))), {}, title=title, progress=_Layers(progress))
    return found


@dataclass(frozen=True)
class _Layers:
    """The engine counts bytes read; here nothing is read, and layers are counted."""

    heard: Progress

    def task(self, title: str, total: float | None = None, unit: str = "") -> AbstractContextManager[Task]:
        return self.heard.task(title, total, "layers")

    def note(self, message: str) -> None:
        self.heard.note(message)


def compared(first: Portable, second: Portable, *, progress: Progress = SILENT) -> Compared:
    """Compare the factors of two adapters. DoRA magnitudes and whole tensors are not looked at.

    Raises:
        IncompatibleError: a module has other shapes in the two.
    """

    def compare(module: str) -> LayerAgreement:
        x, y = _scaled(first.layers[module]), _scaled(second.layers[module])
        if x.shape != y.shape or first.layers[module].kind != second.layers[module].kind:
            raise IncompatibleError(f"`{module}` is {list(x.shape)} in the first and {list(y.shape)} in the second", hint="only adapters of one base compare")
        return LayerAgreement(module, agreement(x, y))

    rows = _each(sorted(first.layers.keys() & second.layers.keys()), compare, "compare", progress)
    product = sum(row.agreement.product for row in rows)
    energies = [
        sum(row.agreement.norms[position] ** 2 for row in rows)
        + sum(size_of(layer) ** 2 for module, layer in portable.layers.items() if module not in other.layers)
        for position, (portable, other) in enumerate(((first, second), (second, first)))
    ]
    norms = [math.sqrt(energy) for energy in energies]
    return Compared(
        tuple(rows),
        product / (norms[0] * norms[1]) if all(norms) else math.nan,
        norms[1] / norms[0] if norms[0] else math.nan,
        tuple(sorted(first.layers.keys() - second.layers.keys())),
        tuple(sorted(second.layers.keys() - first.layers.keys())),
    )


def kinds_of(portable: Portable) -> tuple[str, ...]:
    """What an adapter holds beside plain linear factors: ``DoRA``, ``bias``, ``convolution``, ``embedding``, ``whole tensors``, ``token rows``."""
    layers = portable.layers.values()
    found = {
        "DoRA": any(layer.magnitude is not None for layer in layers),
        "bias": any(layer.bias is not None for layer in layers),
        "convolution": any(layer.kind == CONV for layer in layers),
        "embedding": any(layer.kind == EMBEDDING for layer in layers),
        "whole tensors": bool(portable.replacements),
        "token rows": bool(portable.token_rows),
    }
    return tuple(name for name, there in found.items() if there)
