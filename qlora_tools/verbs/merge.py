"""``qlt merge``: base plus adapters as a checkpoint, dense or quantized, by the method that keeps most of the adapter.

============  ================================================================================================================
``requant``   fresh scales from the merged weights: the way where the 16-bit base is at hand
``keep-grid`` the base's own scales, codes by error feedback that knows what the adapter reads: the way where only quantized weights
              are at hand, since those sit on their grid and rounding to the nearest point would put them back
``residual``  one of these two, and what it lost as a small LoRA adapter beside the merged checkpoint
============  ================================================================================================================

``auto`` takes ``keep-grid`` where the target holds quantized weights in the form that is asked for, else ``requant``. A merge that loses most of the
adapter is refused unless told otherwise. ``heal`` (``verbs/heal.py``) comes before either: it moves A and B so that rounding does less harm.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_tools.checkpoint.folder import check_output
from qlora_tools.checkpoint.statistics import HELD_OUT, INPUT, Statistics
from qlora_tools.engine.plan import Plan, Source
from qlora_tools.errors import CheckFailed, UsageError
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.stages.merge import Storing, branches, merge_reports, plan_merge
from qlora_tools.stages.merge_sums import MergeReport, Retention, summarize
from qlora_tools.stages.merge_units import Directions, MomentsOf, OnGrid, Requantized, Rounding
from qlora_tools.stages.quantize import quantization_config
from qlora_tools.verbs.merge_branch import branch_folder, write_branch
from qlora_tools.verbs.merging import TARGETS, Merged, open_merged
from qlora_tools.verbs.opening import given_paths, resolve_device, side_paths
from qlora_tools.verbs.quantize import codec_for
from qlora_tools.verbs.saving import save_checkpoint

if TYPE_CHECKING:
    from qlora_tools.verbs.heal import HealConfig, Healed
    from qlora_tools.verbs.merge_gain import Gain

METHODS = ("auto", "requant", "keep-grid", "residual")
#: Below this share the merged model has lost most of what the adapter taught it.
LOW_RETENTION = 0.5
#: Rank of the branch beside a merged checkpoint.
BRANCH_RANK = 8


@dataclass(frozen=True)
class MergeConfig:
    """How to merge. ``calib``: a text, a file of `qlt calibrate`, ``self`` or ``builtin``: inputs are then weighed by it, and
    losses measured in outputs. ``text``: what the end-to-end gain is measured on. ``branch_rank``: of ``residual``. ``anyway``: store also what is
    refused. ``heal``: train through the rounding first.

    Raises:
        UsageError: an unknown word.
    """

    method: str = "auto"
    target: str | None = None
    calib: str | Path | None = None
    text: str | Path | None = None
    branch_rank: int = BRANCH_RANK
    anyway: bool = False
    heal: HealConfig | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method!r} is not known", hint=f"choose one of {', '.join(METHODS)}")
        if self.target not in (None, *TARGETS):
            raise UsageError(f"--target {self.target!r} is not known", hint=f"choose one of {', '.join(TARGETS)}")
        if self.heal is not None and self.method == "residual":
            raise UsageError("healing and a residual branch are two ways to bring back the same loss", hint="choose one")
        if self.branch_rank < 1:
            raise UsageError(f"a branch of rank {self.branch_rank} is none", hint="give --branch-rank 1 or more")

    @property
    def paths(self) -> list[Path]:
        """The texts, statistics and models named here that lie on this machine: inputs."""
        heal = (self.heal.text, self.heal.teacher) if self.heal is not None else ()
        return given_paths(self.calib, self.text, *heal)


@dataclass(frozen=True)
class TensorRetention:
    """How one changed tensor fared; see ``stages/merge_sums.py``."""

    name: str
    retention: float
    delta_ratio: float | None
    dead_zone: float | None = None
    output_retention: float | None = None


@dataclass(frozen=True)
class MergeResult:
    """What was (or would be) written. ``method``: what was done with quantized weights, ``None`` in a dense merge. ``retention`` is ``None`` in a dry run,
    or when no tensor changed in place. ``branch``: the adapter that holds what storing lost. ``gain``: end to end, on the text that was given."""

    output: Path
    base: Path
    adapters: tuple[Path, ...]
    scheme: str | None
    method: str | None
    target: str
    dry_run: bool
    changed_tensors: int
    stored_bytes: int
    retention: Retention | None
    tensors: tuple[TensorRetention, ...]
    untied: tuple[str, ...]
    branch: Path | None
    gain: Gain | None
    healed: Healed | None
    seconds: float

    @property
    def erased(self) -> bool:
        """True when storing the result lost most of the adapter."""
        return _erased(self.retention)


@dataclass(frozen=True, eq=False)
class _Ready:
    """Everything decided from headers: the view, how it is stored, where from and where to."""

    merged: Merged
    codec: Codec | None
    method: str | None
    storing: Storing
    sources: dict[str, Source] = field(default_factory=dict)

    def with_healed(self, source: Source) -> _Ready:
        """The same with weights that training through the quantizer arrived at."""
        return replace(self, storing=replace(self.storing, healed=frozenset(source.specs)), sources={**self.sources, "healed": source})

    def plan(self) -> Plan:
        source = self.merged.source
        return plan_merge(source, self.merged.base, source.changed, self.merged.checkpoint.family, self.storing)

    def config(self) -> dict[str, Any]:
        """config.json: the base's own description where its own scales are kept."""
        config = self.merged.config
        if self.storing.held:
            config["quantization_config"] = dict(self.merged.checkpoint.config["quantization_config"])
        elif self.codec:
            config["quantization_config"] = quantization_config(self.codec, self.merged.source, self.merged.checkpoint.family)
        return config


def merge(
    *,
    base: str | Path,
    adapters: Sequence[tuple[str | Path, float]],
    scheme: str | None = None,
    config: MergeConfig | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> MergeResult:
    """Merge ``adapters`` (folder, weight) into ``base`` and store the result dense or with ``scheme`` (``nf4``, ``int8``).

    Raises:
        UsageError: choices that do not go together. CheckFailed: storing would lose most of the adapter; nothing is left behind.
    """
    began = time.perf_counter()
    config = config or MergeConfig()
    if not adapters:
        raise UsageError("no adapter to merge", hint="give one with --adapter")
    codec = codec_for(scheme) if scheme else None
    merged = open_merged(base, adapters, config.target, codec or codec_for("nf4"), progress, anyway=config.anyway)
    merged.check_asked(calib=config.calib, text=config.text, heal=config.heal)
    ready = _prepare(merged, codec, config)
    dest = output or Path("checkpoints") / slug(merged.name.replace("+", "-") + (f"-{scheme}" if scheme else "-merged"))
    inputs = [merged.checkpoint.folder, *merged.adapter_folders, *config.paths]
    check_output(dest, force=force, inputs=inputs)
    if config.method == "residual":
        check_output(branch_folder(dest), force=force, inputs=inputs)
    side_paths(merged.checkpoint.folder)
    plan, reports, healed, gain, branch = ready.plan(), [], None, None, None
    if not dry_run:
        place = resolve_device(device)
        if config.heal is not None:
            from qlora_tools.verbs.heal import heal  # brings the training loop with it

            source, healed = heal(merged, ready.storing, config.heal, device=place, progress=progress)
            ready = ready.with_healed(source)
        weights = [weight for _, weight in adapters]
        reports = _save(ready, config, dest, inputs, healed=healed, weights=weights, force=force, device=place, progress=progress)
        if found := branches(reports):
            branch = write_branch(found, merged, dest, force=force, inputs=inputs)
        if config.text is not None:
            from qlora_tools.verbs.merge_gain import gain_kept

            gain = gain_kept(merged, dest, config.text, branch=branch, device=place, progress=progress)
    sums = merge_reports(reports)
    return MergeResult(
        output=dest,
        base=merged.checkpoint.folder,
        adapters=merged.adapter_folders,
        scheme=scheme,
        method=ready.method,
        target=merged.target,
        dry_run=dry_run,
        changed_tensors=len(merged.source.changed),
        stored_bytes=plan.output_bytes,
        retention=summarize(sums),
        tensors=tuple(_tensors(sums)),
        untied=merged.source.untied,
        branch=branch,
        gain=gain,
        healed=healed,
        seconds=time.perf_counter() - began,
    )


def _prepare(merged: Merged, codec: Codec | None, config: MergeConfig) -> _Ready:
    """Choose the method; see the module's docstring."""
    if codec is None:
        if config.method != "auto":
            raise UsageError(f"--method {config.method} is about quantized weights, and the merge is stored dense", hint="add --nf4 or --int8")
        if config.heal is not None:
            raise UsageError("a dense merge loses nothing that could be healed", hint="add --nf4 or --int8")
        return _Ready(merged, None, None, Storing())
    held = {name: item for name, item in merged.checkpoint.quantized.items() if item.codec.name == codec.name}
    on_grid = bool(held) or (merged.simulated is not None and merged.simulated.name == codec.name)
    if config.method == "keep-grid" and not on_grid:
        raise UsageError(
            f"there is no {codec.name} grid to keep: the target is the {merged.target} weights of {merged.checkpoint.folder}",
            hint="use --method requant, which keeps more where the 16-bit weights are at hand, or --target trained",
        )
    keep = on_grid and config.method != "requant"
    rank = config.branch_rank if config.method == "residual" else 0
    if not keep:
        return _Ready(merged, codec, "requant", Storing(codec, rounding=Requantized(), branch_rank=rank))
    family = merged.checkpoint.family
    rounding = OnGrid(simulated=not held, inputs_first=lambda name: family.stores_inputs_first(name, merged.base.specs[name].shape))
    stored = merged.checkpoint.stored
    storing = Storing(codec, held=held, held_specs=stored.specs, rounding=rounding, branch_rank=rank)
    forms = storing.forms(merged.source, family)
    shapes = {name: (form.spec.shape[0], form.spec.numel // form.spec.shape[0]) for name, form in forms.items() if name in merged.source.changed}
    sources: dict[str, Source] = {"directions": Directions(merged.adapters, shapes), "parts": stored, "original": merged.checkpoint}
    return _Ready(merged, codec, "keep-grid", storing, sources)


def _save(
    ready: _Ready,
    config: MergeConfig,
    dest: Path,
    inputs: Sequence[Path],
    *,
    healed: Healed | None,
    weights: list[float],
    force: bool,
    device: str,
    progress: Progress,
) -> list[Any]:
    merged = ready.merged

    def manifest(done: list[Any]) -> Manifest:
        sums = merge_reports(done)
        if not config.anyway:
            _refuse_erased(summarize(sums), ready)
        command: dict[str, Any] = {
            "verb": "merge",
            "scheme": ready.codec.name if ready.codec else None,
            "method": ready.method,
            "target": merged.target,
            "weights": weights,
        }
        command |= {"calib": Path(config.calib).name} if config.calib is not None else {}
        command |= {"heal": config.heal.record()} if config.heal is not None else {}
        return Manifest(
            "checkpoint", command, inputs=merged.inputs(dest), report={**_report(sums), **merged.report, **({"healed": asdict(healed)} if healed else {})}
        )

    with _statistics(ready, config, dest, device, progress) as stats:
        sources: dict[str, Source] = {"model": merged.source, "base": merged.base, **ready.sources}
        if stats is not None:
            ready, sources["stats"] = replace(ready, storing=_weighed(ready.storing, stats)), stats
        return save_checkpoint(
            ready.plan(),
            sources,
            dest,
            config=ready.config(),
            side_files=merged.checkpoint.folder,
            manifest=manifest,
            force=force,
            inputs=inputs,
            device=device,
            title="merge",
            progress=progress,
        )


@contextmanager
def _statistics(ready: _Ready, config: MergeConfig, dest: Path, device: str, progress: Progress) -> Iterator[Statistics | None]:
    if config.calib is None or ready.codec is None:
        yield None
        return
    from qlora_tools.verbs.calibrate import statistics_for

    with statistics_for(ready.merged.checkpoint, config.calib, device=device, beside=dest, progress=progress) as stats:
        yield stats


def _weighed(storing: Storing, stats: Statistics) -> Storing:
    """``storing`` with losses measured under held-out moments, and rounding weighed by the others."""

    def of(kind: str) -> MomentsOf:
        return lambda name: stats.name_of(kind, name)

    rounding: Rounding = storing.rounding
    if isinstance(rounding, Requantized):
        rounding = Requantized(of(INPUT), of(HELD_OUT))
    elif isinstance(rounding, OnGrid):
        rounding = replace(rounding, moments_of=of(INPUT))
    return replace(storing, rounding=rounding, judged_by=of(HELD_OUT))


def _erased(retention: Retention | None) -> bool:
    return retention is not None and retention.retention < LOW_RETENTION


def _refuse_erased(retention: Retention | None, ready: _Ready) -> None:
    """Raises CheckFailed where most of the adapter would be rounded away."""
    if retention is None or not _erased(retention):
        return
    zone = "" if retention.dead_zone is None else f"; the change is {retention.dead_zone:.2f} of half a step of the grid"
    raise CheckFailed(
        f"only {100 * retention.retention:.1f} % of the adapter would survive being stored by {ready.method or 'rounding'}{zone}",
        hint="leave out --method, give the 16-bit model as --base, or keep the adapter beside the base (--anyway stores it all the same)",
    )


def _tensors(sums: list[MergeReport]) -> list[TensorRetention]:
    found = ((report.name, summarize([report])) for report in sums)
    return [TensorRetention(name, total.retention, total.delta_ratio, total.dead_zone, total.output_retention) for name, total in found if total is not None]


def _report(sums: list[MergeReport]) -> dict[str, Any]:
    total = summarize(sums)
    return {"total": asdict(total) if total else None, "tensors": [asdict(row) for row in _tensors(sums)]}
