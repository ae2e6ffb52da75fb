"""``qlt extract``: a LoRA adapter out of a full fine-tune, with the error it has and the best any rank could reach.

With ``objective="auto"`` an adapter is made by each objective and judged on held-out text (``extract_judge.py``); with ``refine`` the one that
was written is distilled in its place (``refine.py``), which an interruption leaves as it was, with a run to resume beside it.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tools.adapters.merged import base_fingerprint
from qlora_tools.adapters.peft_files import WEIGHTS, write_config
from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.checkpoint.writer import SafetensorsWriter
from qlora_tools.engine.plan import Source
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.stages.extract import ExtractConfig, plan_extract
from qlora_tools.stages.extract_result import Extracted, ExtractReport, finish
from qlora_tools.verbs.opening import describe_input, folder_name, open_model, resolve_device
from qlora_tools.verbs.quantize import base_codec

if TYPE_CHECKING:
    from qlora_tools.verbs.refine import RefineReport

#: What ``objective="auto"`` compares, the first being taken where nothing can be measured.
CANDIDATES = ("delta", "total", "split")


@dataclass(frozen=True)
class Contender:
    """An objective that was tried: KL(tuned || base as it will be stored + its adapter), in nats a token of held-out text, and its 95 % interval.
    ``more_than_best``: how much larger it is than the winner's, as a factor with the interval of the pairs of windows. ``perplexity``: on that text,
    which can say otherwise: mending the base lowers the divergence even where it costs some of what was learnt."""

    objective: str
    kl: float
    ci95: tuple[float, float] | None
    more_than_best: float
    more_ci95: tuple[float, float] | None
    perplexity: float


@dataclass(frozen=True)
class ExtractResult:
    """What was (or would be) written. ``report`` is ``None`` in a dry run: what an adapter holds depends on the weights. ``contenders``: what was
    measured, best first, where the objective was to be found. ``refined``: what distillation did, where it was asked for."""

    output: Path
    base: Path
    tuned: Path
    dry_run: bool
    compared_tensors: int
    report: ExtractReport | None
    seconds: float
    objective: str = "delta"
    contenders: tuple[Contender, ...] = ()
    refined: RefineReport | None = None


@dataclass(frozen=True, eq=False)
class _Pair:
    """The two models, opened, and what weighs their difference."""

    base: LogicalCheckpoint
    tuned: LogicalCheckpoint
    base_name: str
    stats: Statistics | None
    codec: Codec | None
    device: str
    progress: Progress

    def extract(self, config: ExtractConfig, *, dry_run: bool = False) -> tuple[int, Extracted | None]:
        """(tensors compared, the adapter by ``config``; ``None`` in a dry run)."""
        fingerprint = base_fingerprint(self.base)
        known = {name: fingerprint(name) for name in self.base.quantized}
        ties = {"base_ties": self.base.ties, "tuned_ties": self.tuned.ties}
        extraction = plan_extract(self.base, self.tuned, self.base.family, config, known_hashes=known, moments=self.stats, codec=self.codec, **ties)
        if dry_run:
            return len(extraction.pieces), None
        sources: dict[str, Source] = {"base": self.base, "tuned": self.tuned, **({"stats": self.stats} if self.stats else {})}
        reports = run(extraction.plan, sources, device=self.device, title="extract", progress=self.progress)
        return len(extraction.pieces), finish(extraction, reports, self.tuned.specs, base_config=self.base.config, base_model=self.base_name)


def extract(
    *,
    base: str | Path,
    tuned: str | Path,
    config: ExtractConfig | None = None,
    calib: str | Path | None = None,
    text: str | Path | None = None,
    refine: int | None = None,
    by_block: bool = False,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ExtractResult:
    """Decompose ``tuned - base`` into a PEFT adapter; see :class:`ExtractConfig` for ranks, targets, embeddings, weights and objectives.

    ``calib``: what errors are weighed with: a file of statistics of either model, a text file, ``self`` (the tuned model's own text) or
    ``builtin``. ``text``: what objectives are judged on and distillation learns from, likewise; default: ``calib`` where that is a text.
    ``refine``: so many steps of distillation, with ``by_block`` of each block, one block in memory at a time.

    Raises:
        IncompatibleError: shapes or names differ, nothing changed, something changed that an adapter cannot hold, or statistics of another
        model. UsageError: a rank or a target that makes no sense, or weights without statistics. And what reading and writing raise.
    """
    began = time.perf_counter()
    config = config or ExtractConfig()
    first, second = open_model(base, progress), open_model(tuned, progress)
    dest = output or Path("adapters") / slug(f"{folder_name(second.folder)}-{_setting(config)}")
    inputs = [first.folder, second.folder]
    check_output(dest, force=force, inputs=inputs)
    text = _text_of(text, calib)
    _check_options(config, first, calib, text, refine)
    _check_by_block(by_block, refine, text)
    contenders: tuple[Contender, ...] = ()
    refined, report = None, None
    with ExitStack() as stack:
        resolved = resolve_device(device)
        stats = None if dry_run else _statistics(stack, config, first, second, calib, resolved, dest, progress)
        pair = _Pair(first, second, str(base), stats, base_codec(config.base_format), resolved, progress)
        compared, extracted = 0, None
        if config.objective == "auto" and text is not None and not dry_run:
            compared, extracted, contenders = _best(pair, config, text, dest)
            config = replace(config, objective=contenders[0].objective, rest_rank=config.rest_rank if contenders[0].objective == "split" else None)
        else:
            config = replace(config, objective=CANDIDATES[0], rest_rank=None) if config.objective == "auto" else config
            compared, extracted = pair.extract(config, dry_run=dry_run)
        if extracted is not None:
            _write(extracted, dest, config, pair, contenders, force=force)
            report = extracted.report
    if refine is not None and not dry_run:
        refined = _refine(dest, base, tuned, config, str(text), refine, by_block, device, progress)
    return ExtractResult(dest, first.folder, second.folder, dry_run, compared, report, time.perf_counter() - began, config.objective, contenders, refined)


def _text_of(text: str | Path | None, calib: str | Path | None) -> str | Path | None:
    if text is not None or calib is None:
        return text
    from qlora_tools.verbs.calibrate import is_statistics

    return None if is_statistics(calib) else calib


def _check_options(config: ExtractConfig, base: LogicalCheckpoint, calib: str | Path | None, text: str | Path | None, refine: int | None) -> None:
    if config.weight != "none" and calib is None:
        raise UsageError(
            f"weight {config.weight} needs statistics of what the layers read", hint="give --calib TEXT, a file of `qlt calibrate`, or --calib self"
        )
    if config.base_format is not None and base.quantized:
        held = ", ".join(sorted({item.codec.name for item in base.quantized.values()}))
        raise IncompatibleError(
            f"{base.folder} is stored in {held} already, tuned - base contains what it lost", hint="leave out --for, or give the 16-bit base"
        )
    if refine is not None and text in (None, "builtin"):
        raise UsageError("refine needs text of the model's own domain to learn from", hint="give --text FILE, or --text self")
    if refine is not None and refine < 1:
        raise UsageError(f"refine {refine}: distillation takes at least one step")


def _check_by_block(by_block: bool, refine: int | None, text: str | Path | None) -> None:
    if by_block and refine is None:
        raise UsageError("by block is a way to refine, which was not asked for", hint="add --refine")
    if by_block and text == "self":
        raise UsageError("block by block there is never a whole teacher to write text", hint="give --text FILE")


def _statistics(
    stack: ExitStack,
    config: ExtractConfig,
    base: LogicalCheckpoint,
    tuned: LogicalCheckpoint,
    calib: str | Path | None,
    device: str,
    dest: Path,
    progress: Progress,
) -> Statistics | None:
    """Of the tuned model, whose outputs the adapter is to reproduce; a file may be of either."""
    if config.weight == "none" or calib is None:
        return None
    from qlora_tools.verbs.calibrate import statistics_for

    fisher = config.weight == "fisher"
    return stack.enter_context(statistics_for(tuned, calib, fisher=fisher, device=device, beside=dest, also=[base], progress=progress))


def _best(pair: _Pair, config: ExtractConfig, text: str | Path, dest: Path) -> tuple[int, Extracted, tuple[Contender, ...]]:
    """(tensors compared, the adapter that comes nearest to the tuned model, all contenders from best to worst)."""
    from qlora_tools.quality.intervals import mean_interval, perplexity_interval, ratio_interval
    from qlora_tools.verbs.extract_judge import judge

    made: dict[str, Extracted] = {}
    compared = 0
    with tempfile.TemporaryDirectory(prefix=".qlt-candidates-", dir=dest.resolve().parent if dest.resolve().parent.is_dir() else None) as scratch:
        for objective in CANDIDATES:
            if objective == "split" and (config.mean_rank or 0) < 2:
                continue
            chosen = replace(config, objective=objective, rest_rank=config.rest_rank if objective == "split" else None)
            compared, extracted = pair.extract(chosen)
            assert extracted is not None
            made[objective] = extracted
            folder = Path(scratch, objective)
            folder.mkdir()
            _write_adapter(extracted, folder, pair)
        found = judge(pair.base, pair.tuned, {name: Path(scratch, name) for name in made}, pair.codec, text, device=pair.device, progress=pair.progress)
    order = sorted(made, key=lambda name: (sum(found[name].kl), CANDIDATES.index(name)))
    contenders = []
    for name in order:
        kl, more = mean_interval(found[name].kl, found[name].tokens), ratio_interval(found[name].kl, found[order[0]].kl)
        contenders.append(Contender(name, kl.value, kl.bounds, more.value, more.bounds, perplexity_interval(found[name].nll, found[name].tokens).value))
    return compared, made[order[0]], tuple(contenders)


def _write_adapter(extracted: Extracted, folder: Path, pair: _Pair) -> None:
    with SafetensorsWriter(folder / WEIGHTS, extracted.plan.outputs) as writer:
        run(extracted.plan, {"tuned": pair.tuned}, writer, title="write adapter", progress=pair.progress)
    write_config(folder, extracted.config)


def _write(extracted: Extracted, dest: Path, config: ExtractConfig, pair: _Pair, contenders: tuple[Contender, ...], *, force: bool) -> None:
    with output_folder(dest, force=force, inputs=[pair.base.folder, pair.tuned.folder]) as folder:
        _write_adapter(extracted, folder, pair)
        report = asdict(extracted.report)
        if contenders:
            report["contenders"] = [asdict(contender) for contender in contenders]
        inputs = {"base": describe_input(pair.base), "tuned": describe_input(pair.tuned)}
        if pair.stats is not None:
            inputs["calibration"] = {"name": pair.stats.origin.text, "sha256": pair.stats.origin.text_sha256}
        command = {"verb": "extract", **asdict(config)}
        seal(folder, Manifest("adapter", command, inputs=inputs, base_tensors=extracted.base_tensors, report=report))


def _refine(
    dest: Path, base: str | Path, tuned: str | Path, config: ExtractConfig, text: str, steps: int, by_block: bool, device: str, progress: Progress
) -> RefineReport:
    """Distil the written adapter in its place, for the base that it will live on."""
    from qlora_tools.training.distill import RefineConfig
    from qlora_tools.verbs.refine import refine_adapter

    settings = RefineConfig(steps=steps, text=text, by_block=by_block, base_format=config.base_format or "bf16")
    return refine_adapter(dest, base=base, teacher=tuned, config=settings, device=device, progress=progress)


def _setting(config: ExtractConfig) -> str:
    """``r16``, ``auto``, ``energy0.9`` or ``20000000B``, with weights and base: the part of an output's name that tells settings apart."""
    if config.energy is not None:
        ranks = f"energy{config.energy:g}"
    elif config.max_bytes is not None:
        ranks = f"{config.max_bytes}B"
    else:
        ranks = "auto" if config.mean_rank is None else f"r{config.mean_rank}"
    extra = [config.weight if config.weight != "none" else "spread" if config.spreads else "", config.base_format or "", config.objective]
    return "-".join([ranks, *(part for part in extra if part and part != "delta")])
