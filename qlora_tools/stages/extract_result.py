"""From what the comparison found to the adapter: ranks, stored tensors, configuration and the report.

Second half of extraction; ``extract.py`` holds the first and the table of what becomes of which tensor.

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qlora_tools.adapters.peft_files import Target, adapter_config, saved_key, task_type_of
from qlora_tools.engine.plan import Outcome, Plan, Unit, Write, copy_units
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.lowrank.certificate import Certificate, Total, total_of
from qlora_tools.lowrank.ranks import Spectrum, rank_above_noise, rank_for_energy, ranks_for_bytes
from qlora_tools.names import shortened, split_tensor
from qlora_tools.specs import TensorSpec, dtype_of
from qlora_tools.stages.extract import Extraction, sides
from qlora_tools.stages.extract_units import Compared, Factored


@dataclass(frozen=True)
class TensorRow:
    """One factored tensor of the report. ``capped``: ``max_rank`` cut off what the rule for ranks wanted to keep. ``weighted``: the
    certificate under the metric of calibration statistics. ``kept_change``: how much of tuned - base the product has along it, where it
    approximates more than that. ``singular_values``: the kept ones, of what was approximated, to five digits."""

    name: str
    shape: tuple[int, ...]
    certificate: Certificate
    capped: bool = False
    weighted: Certificate | None = None
    kept_change: float | None = None
    singular_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A tensor that changed and is not in the adapter: why, and how large the change was (Frobenius norm)."""

    name: str
    reason: str
    delta_norm: float


@dataclass(frozen=True)
class ExtractReport:
    """What extraction did with every tensor that changed, and how many did not. ``total`` covers the factored ones, ``weighted_total`` those that
    were weighed."""

    rows: tuple[TensorRow, ...]
    total: Total
    saved_whole: tuple[str, ...]
    biases: tuple[str, ...]
    dropped: tuple[Dropped, ...]
    frozen: int
    adapter_bytes: int
    notes: tuple[str, ...] = ()
    weighted_total: Total | None = None


@dataclass(frozen=True)
class Extracted:
    """The second plan (source ``tuned``; outputs are the tensors of ``adapter_model.safetensors``), the content of
    ``adapter_config.json``, sha256 of the base tensors by name, and the report."""

    plan: Plan
    config: Mapping[str, Any]
    base_tensors: Mapping[str, str]
    report: ExtractReport


def finish(
    extraction: Extraction,
    reports: Iterable[Any],
    tuned_specs: Mapping[str, TensorSpec],
    *,
    base_config: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> Extracted:
    """Choose ranks and lay out the adapter from the reports of ``extraction.plan``.

    ``base_config``: the base's config.json, for the class that PEFT will wrap. ``base_model``: what the adapter says its
    base is.

    Raises:
        IncompatibleError: nothing that could be factored changed. UsageError: ``max_bytes`` does not hold what must be
        saved whole.
    """
    return _Result(extraction, list(reports), tuned_specs, dict(base_config or {})).build(base_model)


class _Result:
    """The reports of one extraction, sorted; each method answers one question about the adapter."""

    def __init__(self, extraction: Extraction, reports: list[Any], tuned_specs: Mapping[str, TensorSpec], base_config: Mapping[str, Any]) -> None:
        self._extraction, self._tuned, self._base_config = extraction, tuned_specs, base_config
        self._pieces = extraction.pieces
        self._factored = {report.name: report for report in reports if isinstance(report, Factored) and report.factors is not None}
        self._frozen = sum(isinstance(report, Factored) and report.factors is None for report in reports)
        self._compared = _tiles_added(report for report in reports if isinstance(report, Compared))
        self._live = extraction.family.live_names(base_config, extraction.base_specs)

    def build(self, base_model: str | None) -> Extracted:
        biases = [name for name in self._of_role("bias") if self._compared[name].changed]
        whole = self._saved_whole()
        ranks = self._ranks(self._whole_bytes(whole, biases))
        kept = {name: rank for name, rank in ranks.items() if rank}
        if not kept:
            found = f"; changed but not factored: {shortened([*whole, *biases])}" if whole or biases else ""
            raise IncompatibleError(
                f"no targeted linear differs between base and tuned{found}", hint="PEFT needs at least one; check --base, --tuned and --targets"
            )
        as_lora = bool(biases) and self._biases_fit_lora(kept, biases)
        targets = {name: self._targets(name, rank, as_lora) for name, rank in kept.items()}
        outputs, units = self._factor_units(targets, as_lora)
        for name, key in self._copies(whole, [] if as_lora else biases, kept):
            spec = TensorSpec(key, self._tuned[name].dtype, self._tuned[name].shape)
            outputs.append(spec)
            units.extend(copy_units("tuned", self._tuned[name], spec))
        config = adapter_config(
            [target for group in targets.values() for target in group],
            {self._live(split_tensor(name)[0]) for name in (*self._extraction.base_specs, *self._extraction.tied)},
            modules_to_save={self._live(split_tensor(name)[0]) for name in whole},
            bias="all" if biases and not as_lora else "none",
            ensure_weight_tying=any(name in self._extraction.tied.values() for name in (*whole, *kept)),
            base_model=base_model,
            task_type=task_type_of(self._base_config),
        )
        hashes = {self._pieces[name].base_name: digest for name in kept if (digest := self._factored[name].base_sha256)}
        plan = Plan(tuple(outputs), tuple(units))
        return Extracted(plan, config, dict(sorted(hashes.items())), self._report(ranks, whole, biases, plan))

    def _of_role(self, *roles: str) -> list[str]:
        return [name for name, piece in self._pieces.items() if piece.role in roles]

    def _saved_whole(self) -> list[str]:
        """Tensors of every module of which one tensor changed (PEFT saves modules, not tensors), and tied names of changed owners."""
        candidates = self._of_role("whole", "grown")
        modules = {self._pieces[name].module for name in candidates if self._compared[name].changed}
        found = [name for name in candidates if self._pieces[name].module in modules]
        return found + [tied for tied, owner in self._extraction.tied.items() if owner in found]

    def _stored_spec(self, name: str) -> TensorSpec:
        """The tuned tensor behind ``name``, which may be tied there."""
        return self._tuned[self._pieces[name].tuned_name if name in self._pieces else self._extraction.tied[name]]

    def _whole_bytes(self, whole: list[str], biases: list[str]) -> int:
        return sum(self._stored_spec(name).nbytes for name in (*whole, *biases))

    def _spectrum(self, name: str) -> Spectrum:
        """The spectrum that ranks are chosen by: the weighted one, except against rounding noise, which is known of the plain one alone."""
        report, by_noise = self._factored[name], self._extraction.config.rank == "auto" and self._extraction.config.max_bytes is None
        assert report.found is not None and report.factors is not None
        found = report.found if report.weighted is None or by_noise else report.weighted.found
        return Spectrum(sides(self._pieces[name].spec), found.spectrum[: report.factors.rank], found.energy, report.noise)

    def _ranks(self, whole_bytes: int) -> dict[str, int]:
        """Rank of every tensor that changed; 0 leaves it out."""
        config, spectra = self._extraction.config, {name: self._spectrum(name) for name in self._factored}
        if config.fixed_rank is not None:
            return dict.fromkeys(spectra, config.fixed_rank)
        if config.spreads and config.mean_rank is not None:
            return dict(
                zip(spectra, ranks_for_bytes(list(spectra.values()), config.mean_rank * sum(sum(found.shape) for found in spectra.values()), 1), strict=True)
            )
        if config.energy is not None:
            return {name: rank_for_energy(spectrum, config.energy) for name, spectrum in spectra.items()}
        if config.max_bytes is None:
            return {name: rank_above_noise(spectrum) for name, spectrum in spectra.items()}
        if whole_bytes >= config.max_bytes:
            raise UsageError(
                f"max_bytes {config.max_bytes} does not hold the {whole_bytes} bytes of norms, biases and embeddings that changed",
                hint="raise it, or leave some out with --drop or --embeddings drop",
            )
        width = max((self._factored[name].factors.a_RI.element_size() for name in spectra), default=2)  # type: ignore[union-attr]
        return dict(zip(spectra, ranks_for_bytes(list(spectra.values()), config.max_bytes - whole_bytes, width), strict=True))

    def _biases_fit_lora(self, kept: Mapping[str, int], biases: list[str]) -> bool:
        """``lora_bias`` is one switch for all targets, and PEFT merges it only where each base layer has a bias."""
        modules = {self._pieces[name].module for name in kept}
        has_bias = all(f"{module}.bias" in self._extraction.base_specs and not self._pieces[f"{module}.weight"].embedding for module in modules)
        return has_bias and {self._pieces[name].module for name in biases} <= modules

    def _targets(self, name: str, rank: int, with_bias: bool) -> list[Target]:
        """The module's target; for a tied embedding also the head's, whose factors are the same ones turned."""
        piece = self._pieces[name]
        found = [Target(self._live(piece.module), piece.spec.shape, rank, piece.transposed, piece.embedding, with_bias)]
        return found + [
            Target(self._live(split_tensor(tied)[0]), piece.spec.shape, rank)
            for tied, owner in self._extraction.tied.items()
            if owner == name and piece.embedding
        ]

    def _factor_units(self, targets: Mapping[str, list[Target]], with_bias: bool) -> tuple[list[TensorSpec], list[Unit]]:
        outputs: list[TensorSpec] = []
        units: list[Unit] = []
        for name, group in targets.items():
            factors = self._factored[name].factors
            assert factors is not None
            for target in group:
                specs = target.specs(dtype_of(factors.a_RI.dtype).name)
                outputs.extend(specs)
                cut = factors.cut(target.rank)
                left, right = (cut.b_OR.T, cut.a_RI.T) if target.transposed or target.embedding else (cut.a_RI, cut.b_OR)
                values = [left, right, *([self._bias_change(f"{self._pieces[name].module}.bias", specs[2])] if with_bias else [])]
                tensors = {spec.name: value.reshape(spec.shape).contiguous() for spec, value in zip(specs, values, strict=True)}
                units.append(Unit(f"write {target.module}", (), tuple(Write(spec.name) for spec in specs), _giving(tensors)))
        return outputs, units

    def _bias_change(self, name: str, spec: TensorSpec) -> torch.Tensor:
        report = self._compared.get(name)
        return torch.zeros(spec.shape, dtype=spec.torch_dtype) if report is None or report.change is None else report.change.to(spec.torch_dtype)

    def _copies(self, whole: list[str], biases: list[str], kept: Mapping[str, int]) -> list[tuple[str, str]]:
        """(tuned tensor, stored key) of what is saved whole."""
        wrapped = {self._pieces[name].module for name in kept}
        found = [(self._stored_spec(name).name, saved_key(self._live(name))) for name in whole]
        return found + [(self._stored_spec(name).name, saved_key(self._live(name), wrapped=split_tensor(name)[0] in wrapped)) for name in biases]

    def _is_capped(self, name: str, rank: int) -> bool:
        config, spectrum = self._extraction.config, self._spectrum(name)
        if config.fixed_rank is not None or rank < spectrum.known or spectrum.known == min(spectrum.shape):
            return False
        return config.energy is None or float(spectrum.singular_values.double().square().sum()) < config.energy * spectrum.energy

    def _kept_values(self, name: str, rank: int) -> tuple[float, ...]:
        found = self._factored[name].found
        assert found is not None
        return tuple(float(f"{value:.5g}") for value in found.spectrum[:rank].tolist())

    def _report(self, ranks: Mapping[str, int], whole: list[str], biases: list[str], plan: Plan) -> ExtractReport:
        config = self._extraction.config
        rows, dropped = [], []
        for name, rank in sorted(ranks.items()):
            certificate = self._factored[name].at(rank)
            if rank:
                factored, shape = self._factored[name], self._pieces[name].spec.shape
                capped, values = self._is_capped(name, rank), self._kept_values(name, rank)
                rows.append(TensorRow(name, shape, certificate, capped, factored.weighted_at(rank), factored.kept_change, values))
            else:
                noise = config.rank == "auto" and config.max_bytes is None
                reason = "below the rounding noise of the checkpoint" if noise else "did not fit into what the other tensors left of the size"
                dropped.append(Dropped(name, reason, certificate.delta_norm))
        for name in self._of_role("unwanted"):
            if self._compared[name].changed:
                dropped.append(Dropped(name, self._pieces[name].reason, math.sqrt(self._compared[name].delta_energy)))
        notes = []
        capped_rows = sum(row.capped for row in rows)
        if capped_rows:
            way_out = "give --max-bytes for a wider spread" if config.spreads else "raise --max-rank"
            notes.append(f"{capped_rows} tensors would have kept more than the largest rank allowed, {config.largest_rank}: {way_out}")
        grown = [name for name in self._of_role("grown") if name in whole]
        if grown:
            rows_now = self._stored_spec(grown[0]).shape[0]
            notes.append(
                f"{shortened(grown)} changed to {rows_now} rows: before PEFT loads the adapter, call model.resize_token_embeddings({rows_now}); qlt merge does it by itself"
            )
        return ExtractReport(
            tuple(rows),
            total_of([row.certificate for row in rows]),
            tuple(whole),
            tuple(biases),
            tuple(dropped),
            self._frozen,
            sum(spec.nbytes for spec in plan.outputs),
            tuple(notes),
            total_of(weighted) if (weighted := [row.weighted for row in rows if row.weighted is not None]) else None,
        )


def _tiles_added(reports: Iterable[Compared]) -> dict[str, Compared]:
    """Tiles of one tensor become one report."""
    found: dict[str, Compared] = {}
    for report in reports:
        known = found.get(report.name)
        found[report.name] = report if known is None else Compared(report.name, known.changed or report.changed, known.delta_energy + report.delta_energy)
    return found


def _giving(tensors: Mapping[str, torch.Tensor]) -> Callable[[], Outcome]:
    return lambda: Outcome(tensors)
