"""``qlt train``: a LoRA adapter in bf16 over a frozen, quantized base, as a PEFT folder.

While it runs, its state lies beside the output (``NAME.run``); the output appears whole at the end. What can be known without
weights (data, masks, targets, ranks, memory) is settled first and is all that a dry run does.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import Interrupted, OutOfMemory, OutputExistsError, UsageError
from qlora_tools.manifest import Manifest
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.training import events
from qlora_tools.training.config import STORED, TrainConfig
from qlora_tools.training.loop import train as run_loop
from qlora_tools.training.metrics import FILE_NAME as METRICS
from qlora_tools.training.metrics import MetricsLog, read_metrics
from qlora_tools.training.plot import FILE_NAME as PLOT
from qlora_tools.training.plot import plot_loss
from qlora_tools.training.state import RUN, checkpoints, load_state, read_ranks, read_run, run_folder, write_run
from qlora_tools.training.world import processes
from qlora_tools.verbs.calibrate import statistics_for
from qlora_tools.verbs.opening import describe_input, folder_name, given_paths, open_model, resolve_device
from qlora_tools.verbs.training_data import Data, prepare
from qlora_tools.verbs.training_run import Prepared, TrainPlan, plan_run, prepare_run, write_adapter
from qlora_tools.verbs.training_start import Start, open_start


@dataclass(frozen=True)
class TrainReport:
    """What a run did. Losses in nats per target. ``stopped``: ``done`` or ``early``."""

    steps: int
    first_loss: float
    final_loss: float
    best_loss: float | None
    best_step: int | None
    val_perplexity: float | None
    tokens: int
    seconds: float
    tokens_per_s: float
    peak_bytes: int
    estimate_bytes: int | None
    probe_bytes: int | None
    stopped: str


@dataclass(frozen=True)
class TrainResult:
    """``report`` is ``None`` in a dry run."""

    output: Path
    seconds: float
    plan: TrainPlan
    report: TrainReport | None


def train(
    *,
    base: str | Path,
    data: str | Path,
    config: TrainConfig,
    val: str | Path | None = None,
    teacher: str | Path | None = None,
    start: str | Path | None = None,
    spoken: Iterable[str] | None = None,
    calib: str | Path | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    resume: bool = False,
    listen: events.Listener = events.silent,
    progress: Progress = SILENT,
) -> TrainResult:
    """Train and write the adapter of the best evaluation, or of the last step where nothing is held out.

    ``resume`` continues the run beside ``output``; base, data and config must be those it was started with. Under torchrun each process
    calls this with the same arguments; the first one writes.

    ``start``: a PEFT folder to train on from. It brings its own targets, ranks and scales; ``spoken`` names the fields of ``config`` that must agree with
    it (default: those that are not at their own default). ``calib``: for ``init="qera"``, a file of statistics, a text, ``self`` or ``builtin``.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is saved. OutOfMemory: with alternatives. OutputExistsError: the output, or an
        interrupted run, is there. IncompatibleError: ``resume`` with something else than the run was started with. And what reading raises.
    """
    began = time.perf_counter()
    with processes(resolve_device(device)) as (world, place), ExitStack() as stack:
        checkpoint = open_model(base, progress)
        origin = open_start(start, checkpoint, config, spoken) if start is not None else None
        config = origin.settled() if origin is not None else config
        _check_start(config, origin, calib)
        dest = output or Path("adapters") / slug(f"{folder_name(checkpoint.folder)}-lora-r{config.rank}")
        teacher_model = open_model(teacher, progress) if teacher is not None else None
        inputs = [*_folders(checkpoint, teacher_model, origin), *given_paths(data, val, calib)]
        _check(dest, inputs, force, resume, dry_run)
        world.any(False)  # no process goes on, and makes a folder, before all have looked
        made = prepare(checkpoint, Path(data), Path(val) if val is not None else None, config, progress)
        plan = plan_run(checkpoint, made, config, place, world.size, teacher_model, origin, timed=dry_run)
        if dry_run:
            return TrainResult(dest, time.perf_counter() - began, plan, None)
        listen = listen if world.rank == 0 else events.silent
        listen(events.Planned(plan, str(dest)))
        with _explained_memory(plan, progress):
            measured = read_ranks(dest) if resume else None
            stats = stack.enter_context(statistics_for(checkpoint, calib, device=place, beside=dest, progress=progress)) if calib is not None else None
            ready = prepare_run(checkpoint, made, plan, config, place, world, teacher_model, run_folder(dest), progress, measured, origin, stats)
            words: dict[str, Any] = {"base": base, "data": data, "val": val, "teacher": teacher, "start": start, "calib": calib}
            words = {name: str(value) if value else None for name, value in words.items()}
            _begin(ready, dest, words, resume)
            with _swept(ready, dest):
                stopped = _go(ready, listen, progress)
        if stopped == "interrupted":
            raise Interrupted(
                f"stopped at step {ready.run.progressed.step} of {ready.run.steps}; everything is saved in {run_folder(dest)}",
                hint="to go on: qlt train --resume",
                folder=dest,
            )
        report = _report(ready, plan, stopped)
        if world.rank == 0:
            _finish(ready, dest, inputs, made, checkpoint, words, report, force)
    return TrainResult(dest, time.perf_counter() - began, plan, report)


def _check_start(config: TrainConfig, start: Start | None, calib: str | Path | None) -> None:
    if config.init == STORED and start is None:
        raise UsageError("no adapter is given to start from", hint="give its folder with --init")
    if config.init == "qera" and calib is None:
        raise UsageError("--init qera weighs what was lost by the layers' inputs", hint="give --calib TEXT, a file of `qlt calibrate`, or --calib self")
    if config.init != "qera" and calib is not None:
        raise UsageError(f"--calib is for --init qera, not for --init {config.init}", hint="leave it out")


def _folders(checkpoint: LogicalCheckpoint, teacher: LogicalCheckpoint | None, start: Start | None) -> list[Path]:
    """Of the models and the adapter that are read until the end."""
    models = [model.folder for model in (checkpoint, teacher) if model is not None]
    return [*models, start.folder] if start is not None else models


def _check(dest: Path, inputs: Sequence[Path], force: bool, resume: bool, dry_run: bool) -> None:
    check_output(dest, force=force, inputs=inputs)
    folder = run_folder(dest)
    if resume:
        read_run(dest)
    elif folder.exists() and not dry_run:
        if not (folder / RUN).is_file():
            raise OutputExistsError(f"{folder}, where the run would keep its checkpoints, holds something else", hint="choose another output with -o")
        if not force:
            raise OutputExistsError(f"an interrupted run lies in {folder}", hint="continue it with --resume, or start anew with --force")


def _begin(ready: Prepared, dest: Path, words: Mapping[str, Any], resume: bool) -> None:
    """Put the run where it stood, or make a new folder for it."""
    folder = run_folder(dest)
    if resume:
        stored, _ = read_run(dest)
        stored.check(ready.identity)
        if saved := checkpoints(folder):
            ready.restore(saved[-1])
    elif ready.run.world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        write_run(dest, ready.identity, words, ready.plan.ranks if ready.run.config.rank_budget is not None else None)


@contextmanager
def _swept(ready: Prepared, dest: Path) -> Iterator[None]:
    """A run that fails before its first checkpoint leaves no folder behind: there is nothing to continue."""
    folder = run_folder(dest)
    try:
        yield
    except Exception:
        if ready.run.world.rank == 0 and not checkpoints(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _go(ready: Prepared, listen: events.Listener, progress: Progress) -> str:
    run = ready.run
    if run.world.rank:
        return run_loop(run, SILENT)
    log = MetricsLog(ready.folder / METRICS, run.progressed.step)

    def tell(event: events.Event) -> None:
        log(event)
        listen(event)

    run.listen = tell
    try:
        tell(ready.started())
        return run_loop(run, progress)
    finally:
        log.close()


def _report(ready: Prepared, plan: TrainPlan, stopped: str) -> TrainReport:
    state = ready.run.progressed
    recent = state.recent_losses
    best = state.best_loss
    return TrainReport(
        steps=state.step,
        first_loss=state.first_loss if state.first_loss is not None else math.nan,
        final_loss=sum(recent) / max(1, len(recent)),
        best_loss=best,
        best_step=state.best_step,
        val_perplexity=math.exp(min(best, 700.0)) if best is not None and plan.task == "language" else None,
        tokens=state.tokens,
        seconds=state.seconds,
        tokens_per_s=state.tokens / max(state.seconds, 1e-9),
        peak_bytes=ready.run.peak_bytes(),
        estimate_bytes=plan.estimate.total_bytes if plan.estimate is not None else None,
        probe_bytes=ready.probe_bytes,
        stopped=stopped,
    )


def _finish(
    ready: Prepared,
    dest: Path,
    inputs: Sequence[Path],
    made: Data,
    checkpoint: LogicalCheckpoint,
    words: Mapping[str, Any],
    report: TrainReport,
    force: bool,
) -> None:
    folder = run_folder(dest)
    values = {name: value.detach() for name, value in ready.run.masters.values.items()}
    state = ready.run.progressed
    if state.best_step is not None and state.best_step != state.step:
        tensors, _, _ = load_state(folder / f"step-{state.best_step:06}")
        values = {name.removeprefix("master/"): tensor for name, tensor in tensors.items() if name.startswith("master/")}
    with output_folder(dest, force=force, inputs=inputs) as partial:
        write_adapter(partial, ready, values, str(words["base"]))
        shutil.copyfile(folder / METRICS, partial / METRICS)
        plot_loss(read_metrics(folder / METRICS), partial / PLOT)
        described = {"base": describe_input(checkpoint), "data": {"name": Path(words["data"]).name, "sha256": made.rows.sha256}}
        command = {"verb": "train", **ready.run.config.record(), "labels": list(made.labels)}
        if ready.start is not None:
            described["start"] = ready.start.described()
            command["start"] = ready.start.origin()
        measured = {"steps": report.steps, "best_step": report.best_step, "best_loss": report.best_loss, "final_loss": report.final_loss}
        seal(partial, Manifest("adapter", command, inputs=described, base_tensors=ready.base_tensors(), report=measured))
    shutil.rmtree(folder)


@contextmanager
def _explained_memory(plan: TrainPlan, progress: Progress) -> Iterator[None]:
    """Out of memory, with what would fit."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        options = [f"{change}: {total / 1e9:.2f} GB" for change, total in (plan.estimate.alternatives(progress) if plan.estimate is not None else [])]
        estimate = f", {plan.estimate.total_bytes / 1e9:.2f} GB were estimated" if plan.estimate is not None else ""
        raise OutOfMemory(f"out of memory{estimate}", hint=f"less would do: {'; '.join(options[:4])}" if options else "lower --batch or --max-len") from error
