"""One run of ``qlt quantize``: what is written, and what it is held against before it is.

With calibration every layer is stored in the way that disturbs its outputs least on held-out text, and the whole must lose less (KL against the
model in 16 bits) than plain quantization does, or plain quantization is what is written. Where the two models needed for that do not fit into
memory, or the statistics come from a file and no text is at hand, the layers' own comparison stands alone, and a note says so.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_tools.checkpoint.fingerprint import Fingerprinted
from qlora_tools.checkpoint.logical import LogicalCheckpoint, open_checkpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.engine.plan import Plan, Source, Unit, copy_units
from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.manifest import Manifest, sha256_file
from qlora_tools.names import split_tensor
from qlora_tools.progress import Progress
from qlora_tools.quality.divergence import Divergence
from qlora_tools.quality.intervals import ratio_interval
from qlora_tools.quant.calibrated import PLAIN
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec
from qlora_tools.stages.mixed_precision import FrontierPoint, Sensitivity, by_benefit, fewest_for, frontier, within_bytes
from qlora_tools.stages.quantize import QuantizeReport, plan_quantize, quantization_config, quantized_names, stored_spec
from qlora_tools.verbs.opening import describe_input, plain_config
from qlora_tools.verbs.saving import save_checkpoint

if TYPE_CHECKING:
    from qlora_tools.verbs.quantize_judge import WholeModel

#: Windows on which the KL of single layers is measured: it ranks them, no more.
_SOLO_WINDOWS = 4


@dataclass(frozen=True)
class LayerResult:
    """How one weight is stored. ``error_plain`` and ``error_stored``: of its output on held-out text, E|(Q(W) - W) x|^2 / E|W x|^2."""

    name: str
    method: str
    error_plain: float
    error_stored: float


@dataclass(frozen=True)
class KlResult:
    """KL(16 bits || quantized) in nats per token on held-out windows, plain and as stored; ``ratio`` of the two with its 95 % interval."""

    plain: float
    stored: float
    ratio: float
    ratio_ci95: tuple[float, float] | None
    top1_agreement: float
    tokens: int


@dataclass(frozen=True)
class QuantizeResult:
    """What was (or, in a dry run, would be) written. Bytes count tensors, not headers."""

    output: Path
    scheme: str
    dry_run: bool
    quantized_tensors: int
    copied_tensors: int
    dense_bytes: int
    stored_bytes: int
    bits_per_weight: float
    relative_error: float | None
    seconds: float
    search: str | None = None
    calib: str | None = None
    layers: tuple[LayerResult, ...] = ()
    kl: KlResult | None = None
    kept: tuple[str, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    bare_tensors: int = 0
    """Experts and routers of a mixture, which stay as they are: transformers cannot gather codes. Their bytes come next."""
    bare_bytes: int = 0


class _PlainIsBetter(Exception):
    """The calibrated model loses more than the plain one."""


@dataclass
class Job:
    """One run: what goes in, where it goes, and what was found on the way."""

    source: LogicalCheckpoint
    codec: Codec
    dest: Path
    force: bool
    device: str
    settings: Mapping[str, Any]
    progress: Progress
    statistics: Statistics | None = None
    judge: WholeModel | None = None
    layers: tuple[LayerResult, ...] = ()
    kl: KlResult | None = None
    kept: tuple[str, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    as_16bit: bool = False  # what the codes mean is written, not the codes
    stored: LogicalCheckpoint | None = None  # everything quantized, where the output is a mixture of it and the model
    sha256: Mapping[str, str] = field(default_factory=dict)  # of what was quantized
    began: float = field(default_factory=time.perf_counter)

    @property
    def plain(self) -> Codec:
        """The codec without anything learnt."""
        return replace(self.codec, search=None) if isinstance(self.codec, NF4) else self.codec

    def write(self, plan: Plan, *, checked: Callable[[Path], None] = lambda folder: None) -> QuantizeResult:
        """Run ``plan`` into the output."""
        hashed = Fingerprinted(self.source, frozenset(unit.reads[0].name for unit in plan.units if unit.label.startswith(self.codec.name)))
        found: list[QuantizeReport] = []

        def manifest(reports: list[Any]) -> Manifest:
            found.extend(report for report in reports if isinstance(report, QuantizeReport))
            self.layers = self.layers or _layers(found)
            self.sha256 = self.sha256 or ({} if self.as_16bit else dict(sorted(hashed.sha256.items())))
            return self._manifest(found)

        self._save(plan, hashed, manifest, checked)
        return self.result(plan, found)

    def write_calibrated(self) -> QuantizeResult:
        """Calibrated, unless plain loses less."""
        plan = plan_quantize(self.source, self.source.family, self.codec, statistics=self.statistics)
        try:
            return self.write(plan, checked=self._compare)
        except _PlainIsBetter:
            self.progress.note("calibrated, the whole model loses more than plainly quantized: the plain form is written")
            self.layers = ()
            return self.write(plan_quantize(self.source, self.source.family, self.plain))

    def write_mixed(self, max_bytes: int | None, max_kl: float | None) -> QuantizeResult:
        """Everything quantized first, measured layer by layer; then what is to stay in 16 bits does.

        Raises:
            UsageError: ``max_bytes`` is less than everything quantized takes. UnsupportedError: no memory to measure in.
        """
        if self.judge is None:
            raise UnsupportedError(
                "mixed precision is chosen by the KL of the whole model, which does not fit into memory", hint="leave --max-bytes and --max-kl out"
            )
        with tempfile.TemporaryDirectory(prefix=".qlt-quantized-", dir=self.dest.resolve().parent if self.dest.parent.is_dir() else None) as scratch:
            whole = replace(self, dest=Path(scratch, "whole"), settings={})
            all_stored = whole.write_calibrated()
            self.stored = stored = open_checkpoint(whole.dest)
            self._choose(stored, all_stored.stored_bytes, max_bytes, max_kl)
            self.layers = tuple(layer for layer in whole.layers if layer.name not in self.kept)
            self.sha256 = {name: digest for name, digest in whole.sha256.items() if name not in self.kept}
            return self.write(self._mixed_plan(stored), checked=self._compare)

    def _choose(self, stored: LogicalCheckpoint, all_stored_bytes: int, max_bytes: int | None, max_kl: float | None) -> None:
        spare = None if max_bytes is None else max_bytes - all_stored_bytes
        if spare is not None and spare < 0:
            raise UsageError(
                f"--max-bytes {max_bytes}: with every linear quantized it is {all_stored_bytes} bytes already",
                hint="quantize with larger blocks, or allow more",
            )
        ordered = by_benefit(self._sensitivities(stored))
        assert self.judge is not None
        judge, names = self.judge, [layer.name for layer in ordered]
        measured: dict[int, float] = {}

        def measure(kept: int) -> float:
            judge.put(names[kept:], stored.read)
            judge.restore(names[:kept])
            measured[kept] = judge.divergence().kl_mean
            return measured[kept]

        count = len(names) if max_kl is None else fewest_for(max_kl, len(names), measure)
        kept = ordered[:count] if spare is None else [layer for layer in ordered[:count] if layer.name in within_bytes(ordered[:count], spare)]
        self.kept = tuple(layer.name for layer in kept)
        if max_kl is not None and len(kept) < count:
            self.progress.note(f"{count} layers in 16 bits would keep KL within {max_kl}; {max_bytes} bytes are enough for {len(kept)}")
        self.frontier = tuple(replace(point, measured_kl=measured.get(point.kept)) for point in frontier(ordered, all_stored_bytes))

    def _sensitivities(self, stored: LogicalCheckpoint) -> list[Sensitivity]:
        """The KL that every quantized layer causes by itself."""
        assert self.judge is not None
        found = []
        with self.progress.task("sensitivity", len(stored.quantized), "layers") as task:
            for name, item in stored.quantized.items():
                self.judge.put([name], stored.read)
                kl = self.judge.divergence(_SOLO_WINDOWS).kl_mean
                self.judge.restore([name])
                parts = sum(stored.stored.specs[part].nbytes for part in item.parts)
                found.append(Sensitivity(name, self.source.specs[name].nbytes, parts, kl))
                task.advance(1, name)
        return found

    def _mixed_plan(self, stored: LogicalCheckpoint) -> Plan:
        """What stays dense from the model, everything else as it lies in ``stored``."""
        outputs: list[TensorSpec] = []
        units: list[Unit] = []
        for name, spec in self.source.specs.items():
            item = stored.quantized.get(name) if name not in self.kept else None
            specs = [stored.stored.specs[part] for part in item.parts] if item else [spec]
            outputs += specs
            for part in specs:
                units += copy_units("stored" if item else "model", part)
        return Plan(tuple(outputs), tuple(units))

    def _compare(self, folder: Path) -> None:
        """The whole model as it lies in ``folder`` against 16 bits, and beside it plain quantization.

        Raises:
            _PlainIsBetter: it loses more.
        """
        if self.judge is None:
            return
        written, family = open_checkpoint(folder), self.source.family

        def plainly(name: str) -> torch.Tensor:
            spec, dense = stored_spec(self.source.specs[name], family), self.source.read(name)
            turn = family.stores_inputs_first(name, self.source.specs[name].shape)
            decoded = self.plain.decode(spec, self.plain.encode(spec, dense.T.contiguous() if turn else dense))
            return decoded.T if turn else decoded

        names = quantized_names(self.source, family, self.codec)
        self.judge.put(names, plainly)
        plain = self.judge.divergence()
        self.judge.put(names, written.read)
        self.kl = _kl(plain, self.judge.divergence())
        self.judge.restore(names)
        if self.kl.stored > self.kl.plain:
            raise _PlainIsBetter

    def _save(self, plan: Plan, model: Source, manifest: Callable[[list[Any]], Manifest], checked: Callable[[Path], None]) -> None:
        sources: dict[str, Source] = {"model": model}
        if self.statistics is not None:
            sources["statistics"] = self.statistics
        if self.stored is not None:
            sources["stored"] = self.stored.stored
        save_checkpoint(
            plan,
            sources,
            self.dest,
            config=self._config(),
            side_files=self.source.folder,
            manifest=manifest,
            force=self.force,
            inputs=[self.source.folder],
            device=self.device,
            title=f"quantize to {self.codec.name}",
            progress=self.progress,
            checked=checked,
        )

    def _config(self) -> dict[str, Any]:
        """The config.json of what is written."""
        config = plain_config(self.source.config)
        if not self.as_16bit:
            config["quantization_config"] = quantization_config(self.codec, self.source, self.source.family, self.kept)
        return config

    def _manifest(self, reports: Collection[QuantizeReport]) -> Manifest:
        inputs = {"model": describe_input(self.source)}
        if self.statistics is not None:
            origin = self.statistics.origin
            inputs["statistics"] = {"name": origin.text, "sha256": sha256_file(self.statistics.path), "text_sha256": origin.text_sha256}
        report: dict[str, Any] = {"relative_error": {report.name: report.relative_error for report in reports}}
        if self.layers:
            report["layers"] = {layer.name: {"method": layer.method, "error_plain": layer.error_plain, "error": layer.error_stored} for layer in self.layers}
        if self.kl:
            report["kl"] = {"plain": self.kl.plain, "stored": self.kl.stored}
        if self.kept:
            report["kept"] = list(self.kept)
        command = {name: value for name, value in self.settings.items() if value is not None or name in ("block_size", "double_quant")}
        return Manifest("checkpoint", command, inputs=inputs, source_tensors=self.sha256, report=report)

    def result(self, plan: Plan, reports: Collection[QuantizeReport] = (), *, dry_run: bool = False) -> QuantizeResult:
        """What the caller learns."""
        specs, quantized = self.source.specs, quantized_names(self.source, self.source.family, self.codec, self.kept)
        weights = sum(specs[name].numel for name in quantized)
        copied = sum(spec.nbytes for name, spec in specs.items() if name not in set(quantized))
        bare = [spec.nbytes for name, spec in specs.items() if len(spec.shape) > 1 and self.source.family.is_bare(split_tensor(name)[0])]
        return QuantizeResult(
            output=self.dest,
            scheme=self.codec.name,
            dry_run=dry_run,
            quantized_tensors=len(quantized),
            copied_tensors=len(specs) - len(quantized),
            dense_bytes=sum(spec.nbytes for spec in specs.values()),
            stored_bytes=plan.output_bytes,
            bits_per_weight=8 * (plan.output_bytes - copied) / max(weights, 1),
            relative_error=(sum(report.relative_error**2 for report in reports) / len(reports)) ** 0.5 if reports else None,
            seconds=time.perf_counter() - self.began,
            search=self.settings.get("search"),
            calib=self.settings.get("calib"),
            layers=self.layers,
            kl=self.kl,
            kept=self.kept,
            frontier=self.frontier,
            bare_tensors=len(bare),
            bare_bytes=sum(bare),
        )


def _layers(reports: Collection[QuantizeReport]) -> tuple[LayerResult, ...]:
    calibrated = [report for report in reports if report.output_errors]
    return tuple(LayerResult(report.name, report.method, report.output_errors[PLAIN], report.output_errors[report.method]) for report in calibrated)


def _kl(plain: Divergence, stored: Divergence) -> KlResult:
    ratio = ratio_interval(stored.windows.kl, plain.windows.kl)
    return KlResult(plain.kl_mean, stored.kl_mean, ratio.value, ratio.bounds, stored.top1_agreement, stored.n_tokens)
