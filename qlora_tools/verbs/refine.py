"""``qlt refine``: an adapter's factors, trained until base and adapter predict what the tuned model predicts.

The teacher's own next-token distributions are all that is learnt from, on a text or on one that the teacher writes itself. The base is held as it will
be used, so the adapter also makes up for what the quantizer took. While it runs, its state lies beside the output (``NAME.run``). What
comes out is the same PEFT folder with other numbers, and on held-out text never worse than what went in.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qlora_tools.adapters.adapter import Adapter
from qlora_tools.adapters.peft_config import FILE_NAME as CONFIG
from qlora_tools.adapters.peft_files import WEIGHTS, read_adapter
from qlora_tools.checkpoint.folder import check_output, output_folder, seal
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import own_file
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.checkpoint.writer import SafetensorsWriter, write_tensors
from qlora_tools.errors import CorruptError, IncompatibleError, Interrupted, OutputExistsError, UsageError
from qlora_tools.live.base import Base, load_base
from qlora_tools.live.self_text import written_by
from qlora_tools.live.text import HELD_OUT_EVERY, TextWindows, evenly
from qlora_tools.manifest import FILE_NAME, Manifest, read_manifest, sha256_file
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.quant.codec import Codec
from qlora_tools.training import events
from qlora_tools.training.allocator import Heap, peak_bytes
from qlora_tools.training.block_journal import BlockError, BlockJournal
from qlora_tools.training.distill import DivergenceLoss, RefineConfig, WindowRows, distill
from qlora_tools.training.distill_adapter import Learner, put_adapter, ranks_in
from qlora_tools.training.estimate import Subject, empty_base, estimator
from qlora_tools.training.fused import fuse
from qlora_tools.training.loop import Run
from qlora_tools.training.lora import inject, trainable_parameters
from qlora_tools.training.optimizers import Masters
from qlora_tools.training.state import RUN, RunIdentity, checkpoints, read_run, run_folder, write_run
from qlora_tools.verbs.adapter_files import adapter_path
from qlora_tools.verbs.calibrate import SELF, windows_for
from qlora_tools.verbs.opening import copy_all, copy_side_files, describe_input, folder_name, given_paths, open_model, resolve_device, side_paths
from qlora_tools.verbs.quantize import base_codec
from qlora_tools.verbs.refine_blocks import estimate_blocks_bytes, refine_blocks
from qlora_tools.verbs.training_memory import compute_dtype

_TEXT = "text.safetensors"
_LEARN, _HELD_OUT = "learn", "held_out"


@dataclass(frozen=True)
class RefineReport:
    """What a run did. KL in nats per position on held-out windows. ``kept_start``: nothing was better, the adapter is as it was.

    ``blocks``: where it went block by block, how far each one's output is from the teacher's; ``steps`` are then of each.
    """

    start_kl: float
    end_kl: float
    kept_start: bool
    best_step: int
    steps: int
    stopped: str
    text: str
    tokens: int
    seconds: float
    peak_bytes: int
    estimate_bytes: int
    blocks: tuple[BlockError, ...] = ()


@dataclass(frozen=True)
class RefineResult:
    """``report`` is ``None`` in a dry run."""

    output: Path
    seconds: float
    trainable_parameters: int
    estimate_bytes: int
    report: RefineReport | None


def refine_adapter(
    folder: Path,
    *,
    base: str | Path,
    teacher: str | Path,
    config: RefineConfig | None = None,
    device: str = "auto",
    listen: events.Listener = events.silent,
    progress: Progress = SILENT,
) -> RefineReport:
    """Improve the adapter in ``folder``, which this package wrote, in place: the folder is exchanged as a whole at the end.

    An interruption leaves the adapter as it was and its state in ``NAME.run``; ``qlt refine --resume -o folder`` goes on.

    Raises:
        Interrupted: SIGINT or SIGTERM. And what :func:`refine` raises.
    """
    result = refine(adapter=folder, base=base, teacher=teacher, config=config, output=folder, force=True, device=device, listen=listen, progress=progress)
    assert result.report is not None
    return result.report


def refine(
    *,
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    teacher: str | Path | None = None,
    config: RefineConfig | None = None,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    resume: bool = False,
    listen: events.Listener = events.silent,
    progress: Progress = SILENT,
) -> RefineResult:
    """Train the factors of ``adapter`` on ``base`` after ``teacher`` and write the PEFT folder ``output``, which may be ``adapter`` itself: all else there stays.

    ``resume`` goes on with the run beside ``output``, which says itself what it was started with.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is saved. OutputExistsError: the output, or an interrupted run, is there.
        IncompatibleError: adapter, base and teacher do not belong together, or ``resume`` with something else. And what reading raises.
    """
    began = time.perf_counter()
    if resume:
        if output is None:
            raise UsageError("--resume does not say which run", hint="name its output with -o")
        adapter, base, teacher, config = _as_started(output)
    if adapter is None or base is None or teacher is None:
        raise UsageError("an adapter, --base and --teacher are needed", hint="or go on with a run: --resume -o OUTPUT")
    task = _open(adapter, base, teacher, config or RefineConfig(), output, resolve_device(device), progress)
    task = replace(task, force=force or task.in_place)
    _check(task, resume=resume, dry_run=dry_run)
    count = sum(delta.a.spec.numel + delta.b.spec.numel for delta in task.adapter.deltas.values())
    report = None
    estimate_bytes = task.estimate_bytes()
    if not dry_run:
        progress.note(f"refining takes about {estimate_bytes / 1e9:.2f} GB of memory")
        words = {"adapter": str(adapter), "base": str(base), "teacher": str(teacher)}
        if task.config.by_block:
            report = _refine_by_block(task, resume, estimate_bytes, words, progress)
        else:
            report = _refine(task, resume, estimate_bytes, words, listen, progress)
    return RefineResult(task.dest, time.perf_counter() - began, count, estimate_bytes, report)


@dataclass(frozen=True, eq=False)
class _Task:
    """What is refined, after what, and where it goes. ``force``: what is there already may be replaced, as in place it is."""

    folder: Path
    adapter: Adapter
    base: LogicalCheckpoint
    teacher: LogicalCheckpoint
    config: RefineConfig
    dest: Path
    device: str
    force: bool = False

    @property
    def in_place(self) -> bool:
        return self.dest.resolve() == self.folder.resolve()

    @property
    def inputs(self) -> list[Path]:
        """What the output must not replace."""
        return [self.base.folder, self.teacher.folder, *([] if self.in_place else [self.folder]), *given_paths(self.config.text)]

    @property
    def way_on(self) -> str:
        return f"qlt refine --resume -o {self.dest}{' --force' if self.force and not self.in_place else ''}"

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.config.train_config(), self.device)

    def codec(self) -> Codec | None:
        """How the base is held: as it is stored, else as the config says."""
        config = self.config
        if self.base.quantized:
            return self.base.codec
        return base_codec(config.base_format, block_size=config.block_size, double_quant=config.double_quant)

    def estimate_bytes(self) -> int:
        """Peak memory, from headers: the same adapter, teacher, loss and batch as the run's on tensors without content."""
        config, dtype = self.config, self.dtype
        if config.by_block:
            return estimate_blocks_bytes(self.base, config, dtype, self.device)

        def adapt(model: Any, chosen: Any) -> Subject:
            ranks = ranks_in(self.adapter, model)
            adapted = inject(model, ranks, replace(chosen, rank=max(ranks.values())), "CAUSAL_LM", dtype=dtype)
            fuse(adapted)
            guide = empty_base(self.teacher, "language", self.teacher.codec, dtype)
            return Subject(adapted, DivergenceLoss(model, guide, temperature=config.temperature), (guide,))

        batch = WindowRows(torch.zeros(1, config.length, dtype=torch.int64)).batch([0] * config.batch)
        codec, run_config = self.codec(), config.train_config()
        made = estimator(self.base, "language", batch, run_config, adapt=adapt, codec_of=lambda _: codec, dtype=dtype, device=self.device)
        return int(made.estimate().total_bytes)


def _open(adapter: str | Path, base: str | Path, teacher: str | Path, config: RefineConfig, output: Path | None, device: str, progress: Progress) -> _Task:
    first, second, folder = open_model(base, progress), open_model(teacher, progress), adapter_path(adapter)
    if first.config.get("vocab_size") != second.config.get("vocab_size"):
        raise IncompatibleError(
            f"the teacher predicts {second.config.get('vocab_size')} tokens, the base {first.config.get('vocab_size')}",
            hint="the teacher is the model that the adapter stands for, with the base's tokenizer",
        )
    dest = output or Path("adapters") / slug(f"{folder_name(folder)}-refined-{config.base_format}")
    return _Task(folder, read_adapter(folder, first.specs, first.family, ties=first.ties), first, second, config, dest, device)


def _check(task: _Task, *, resume: bool, dry_run: bool) -> None:
    check_output(task.dest, force=task.force, inputs=task.inputs)
    if not task.in_place:  # what will be copied is looked at before the work
        side_paths(own_file(task.folder / CONFIG).parent)
    folder = run_folder(task.dest)
    if folder.exists() and not resume and not dry_run:
        if not (folder / RUN).is_file():
            raise OutputExistsError(f"{folder}, where the run would keep its checkpoints, holds something else", hint="choose another output with -o")
        if not task.force or task.in_place:
            raise OutputExistsError(f"an interrupted run lies in {folder}", hint=f"go on with `{task.way_on}`, or remove it")


def _as_started(output: Path) -> tuple[str, str, str, RefineConfig]:
    """(adapter, base, teacher, config) of the run beside ``output``."""
    identity, words = read_run(output)
    known = {field.name for field in fields(RefineConfig)}
    try:
        return words["adapter"], words["base"], words["teacher"], RefineConfig(**{name: value for name, value in identity.config.items() if name in known})
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{run_folder(output)} is not a run of refine: {error}", hint="remove it and start anew") from error


def _refine(task: _Task, resume: bool, estimate_bytes: int, words: Mapping[str, str], listen: events.Listener, progress: Progress) -> RefineReport:
    folder, heap = run_folder(task.dest), Heap(task.device)
    options: Any = {"dtype": task.dtype, "device": task.device, "tidy": heap.give_back, "progress": progress}
    guide = load_base(task.teacher, "language", task.teacher.codec, **options)
    text = _load_text(folder) if resume else _text(task, guide, progress)
    base = load_base(task.base, "language", task.codec(), **options)
    learner = put_adapter(base, task.adapter, task.dtype)
    _share_equal_tensors(base.model, guide.model)
    fuse(learner.model)
    heap.give_back()
    run = _run(task, base, learner, guide, text, folder, listen, heap)
    _begin(task, resume, RunIdentity(_settings(task), base.identity, text.sha256, teacher_sha256=guide.identity), words, text)
    saved = checkpoints(folder) if resume else []
    try:
        made = distill(run, resume_from=saved[-1] if saved else None, stored=learner.stored, progress=progress)
    except BaseException:
        if not checkpoints(folder):  # nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if made.stopped == "interrupted":
        raise Interrupted(
            f"stopped at step {run.progressed.step} of {run.steps}; everything is saved in {folder}",
            hint=f"to go on: {task.way_on}",
            folder=task.dest,
        )
    state = run.progressed
    report = RefineReport(
        made.start_kl, made.end_kl, made.kept_start, made.best_step, state.step, made.stopped, text.name, state.tokens, state.seconds,
        peak_bytes(task.device), estimate_bytes,
    )  # fmt: skip
    learnt = {} if made.kept_start else {part.key: made.values[name].to("cpu", part.spec.torch_dtype) for name, part in learner.parts.items()}
    _write(task, learnt, report, text)
    shutil.rmtree(folder)
    return report


def _refine_by_block(task: _Task, resume: bool, estimate_bytes: int, words: Mapping[str, str], progress: Progress) -> RefineReport:
    """The models are told by their headers: reading them whole for a hash would take as long as the walk, which finds other weights by itself."""
    began, folder, heap = time.perf_counter(), run_folder(task.dest), Heap(task.device)
    text = _load_text(folder) if resume else _text(task, None, progress)
    base_sha256, teacher_sha256 = (model.stored.headers_sha256() for model in (task.base, task.teacher))
    _begin(task, resume, RunIdentity(_settings(task), base_sha256, text.sha256, teacher_sha256=teacher_sha256), words, text)
    try:
        made, learnt = refine_blocks(
            task.adapter, task.base, task.teacher, task.codec(), text, task.config,
            folder=folder, dtype=task.dtype, device=task.device, tidy=heap.give_back, progress=progress,
        )  # fmt: skip
    except BaseException as error:
        done = len(BlockJournal(folder).blocks)
        if not done:
            shutil.rmtree(folder, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"stopped after {done} blocks, which are saved in {folder}", hint=f"to go on: {task.way_on}", folder=task.dest) from error
        raise
    report = RefineReport(
        made.start_kl, made.end_kl if not made.kept_start else made.start_kl, made.kept_start, 0 if made.kept_start else task.config.steps,
        task.config.steps, "done", text.name, text.tokens, time.perf_counter() - began, peak_bytes(task.device), estimate_bytes, made.blocks,
    )  # fmt: skip
    _write(task, learnt, report, text)
    shutil.rmtree(folder)
    return report


def _begin(task: _Task, resume: bool, identity: RunIdentity, words: Mapping[str, str], text: TextWindows) -> None:
    """A new folder for the run, or the proof that the one there is this run's."""
    if resume:
        stored, _ = read_run(task.dest)
        stored.check(identity)
        return
    folder = run_folder(task.dest)
    shutil.rmtree(folder, ignore_errors=True)
    write_run(task.dest, identity, words)
    _save_text(folder, text)


def _run(task: _Task, base: Base, learner: Learner, guide: Base, text: TextWindows, folder: Path, listen: events.Listener, heap: Heap) -> Run:
    config = task.config
    return Run(
        model=learner.model,
        masters=Masters(trainable_parameters(learner.model)),
        rows=WindowRows(text.learn_NL),
        loss=DivergenceLoss(base.model, guide.model, temperature=config.temperature),
        config=config.train_config(),
        steps=config.steps,
        folder=folder,
        held_out=WindowRows(evenly(text.held_out_NL, config.held_out)),
        listen=listen,
        peak_bytes=lambda: peak_bytes(task.device),
        tidy=heap.give_back,
    )


def _settings(task: _Task) -> dict[str, Any]:
    return {**task.config.record(), "adapter_sha256": sha256_file(task.folder / WEIGHTS)}


def _text(task: _Task, guide: Base | None, progress: Progress) -> TextWindows:
    """The text to learn on: a file's, this package's, or the teacher's own, which ``guide`` writes."""
    config = task.config
    if config.text != SELF:
        wanted = (config.steps * config.batch + config.held_out) * HELD_OUT_EVERY // (HELD_OUT_EVERY - 1) + 1
        return windows_for(task.teacher, config.text, tokens=wanted * config.length, context=config.length, progress=progress)
    assert guide is not None, "a config by block has no text of its own"
    sampling: Any = {"windows": config.windows, "length": config.length, "seed": config.seed, "temperature": config.text_temperature}
    return written_by(guide.model, task.teacher.folder, **sampling, progress=progress)


def _save_text(folder: Path, text: TextWindows) -> None:
    """Kept with the run: text that was sampled is not sampled again."""
    tensors = {_LEARN: text.learn_NL.contiguous(), _HELD_OUT: text.held_out_NL.contiguous()}
    write_tensors(folder / _TEXT, tensors, {"name": text.name, "sha256": text.sha256})


def _load_text(folder: Path) -> TextWindows:
    with SafetensorsFile(folder / _TEXT) as file:
        return TextWindows(file.read(_LEARN), file.read(_HELD_OUT), file.metadata["name"], file.metadata["sha256"])


@torch.no_grad()
def _share_equal_tensors(base: Any, guide: Any) -> None:
    """What both models hold unquantized and equal, an embedding above all, is held once."""
    theirs = dict(guide.named_parameters())
    for name, mine in base.named_parameters():
        other = theirs.get(name)
        if other is not None and not mine.requires_grad and other.shape == mine.shape and other.dtype == mine.dtype and torch.equal(other, mine):
            other.data = mine.data


def _write(task: _Task, learnt: Mapping[str, torch.Tensor], report: RefineReport, text: TextWindows) -> None:
    """The adapter's files, and no others of a folder that it shares, with the learnt tensors, by key, in their place."""
    with output_folder(task.dest, force=task.force, inputs=task.inputs) as partial:
        if task.in_place:  # the folder is exchanged as a whole, so all that lies there goes along
            copy_all(task.folder, partial, but=(WEIGHTS, FILE_NAME))
        else:
            shutil.copyfile(own_file(task.folder / CONFIG), partial / CONFIG)
            copy_side_files(task.folder, partial)
        with SafetensorsFile(task.folder / WEIGHTS) as file, SafetensorsWriter(partial / WEIGHTS, file.specs.values(), metadata=file.metadata) as writer:
            for key in file.specs:
                writer.write(key, learnt[key].view(file.specs[key].shape).contiguous() if key in learnt else file.read(key))
        seal(partial, _manifest(task, report, text))


def _manifest(task: _Task, report: RefineReport, text: TextWindows) -> Manifest:
    before = read_manifest(task.folder)
    started = dict(before.command) if before else {"adapter": folder_name(task.folder)}
    measured = {name: value for name, value in asdict(report).items() if name not in ("seconds", "peak_bytes", "estimate_bytes")}
    command = {"verb": "refine", **task.config.record(), "text": text.name, "start": started}
    inputs: dict[str, Mapping[str, str]] = {"base": describe_input(task.base), "teacher": describe_input(task.teacher)}
    inputs["adapter"] = {"name": folder_name(task.folder), "sha256": sha256_file(task.folder / WEIGHTS)}
    inputs["text"] = {"name": text.name, "sha256": text.sha256}
    return Manifest(
        "adapter", command, inputs=inputs, base_tensors=before.base_tensors if before else {}, report={**(before.report if before else {}), "refine": measured}
    )
