"""The parts of a training run put together: what it will be (from headers), and the model, loss and loop state in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from qlora_tools.adapters.merged import base_fingerprint
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.errors import IncompatibleError, UnsupportedError, UsageError
from qlora_tools.live.base import Base, build_empty, load_base
from qlora_tools.names import natural_key
from qlora_tools.progress import Progress
from qlora_tools.training import events
from qlora_tools.training.allocator import Heap, peak_bytes
from qlora_tools.training.config import CORRECTING, TrainConfig
from qlora_tools.training.distill_adapter import put_adapter
from qlora_tools.training.estimate import can_checkpoint
from qlora_tools.training.loop import Run, backward, restore, train_mode
from qlora_tools.training.lora import adapter_state, choose_modules, inject, rank_of, save_adapter, sides, trainable_parameters
from qlora_tools.training.loss import LanguageLoss, Loss, label_loss
from qlora_tools.training.masks import EncodeReport
from qlora_tools.training.optimizers import Masters
from qlora_tools.training.order import steps_in
from qlora_tools.training.packing import check_isolation
from qlora_tools.training.ranks import by_need, measure_need
from qlora_tools.training.samples import continue_text
from qlora_tools.training.state import RunIdentity, seed_everything
from qlora_tools.training.world import World
from qlora_tools.verbs.opening import folder_name
from qlora_tools.verbs.training_data import Data
from qlora_tools.verbs.training_memory import TASK_TYPES, codec_of, compute_dtype, estimate_run, heads_of, settle_forward
from qlora_tools.verbs.training_start import Start
from qlora_tools.verbs.training_time import seconds_per_step

_NEED_BATCHES = 4
_PROBE_STEPS = 2


@dataclass(frozen=True)
class TrainPlan:
    """The resolved run. ``config``: with the form of the adapter that it starts from, if it does; ``ranks``: module path -> rank (by measured need: the mean until it is measured). ``estimate``: of peak memory.

    ``seconds_per_step``: roughly, of a dry run; others show their own time.
    """

    base: str
    task: str
    modules: tuple[str, ...]
    ranks: Mapping[str, int]
    trainable_parameters: int
    total_parameters: int
    steps: int
    epochs: float
    rows: int
    data: EncodeReport
    preview: tuple[tuple[str, bool], ...]
    config: TrainConfig
    estimate: Any = None
    seconds_per_step: float | None = None


def plan_run(
    checkpoint: LogicalCheckpoint,
    made: Data,
    config: TrainConfig,
    device: str,
    processes: int,
    teacher: LogicalCheckpoint | None,
    start: Start | None = None,
    *,
    timed: bool = False,
) -> TrainPlan:
    """Settle targets, ranks, steps and memory from headers and data alone; ``timed``: and how long a step would take.

    ``start``: the adapter to start from, which brings targets and ranks.

    Raises:
        UsageError, UnsupportedError, IncompatibleError: targets, ranks, model or teacher do not fit.
    """
    empty = build_empty(checkpoint, made.task, made.labels)
    if teacher is not None and teacher.config.get("vocab_size") != checkpoint.config.get("vocab_size"):
        raise IncompatibleError(
            f"the teacher predicts {teacher.config.get('vocab_size')} tokens, the base {checkpoint.config.get('vocab_size')}",
            hint="a teacher shares the base's tokenizer",
        )
    if teacher is not None and made.task != "language":
        raise UnsupportedError(f"--teacher with the task {made.task}", hint="distillation is for language models")
    if config.pack and made.task != "language":
        raise UsageError(f"--pack with the task {made.task}", hint="rows of several examples are for language models; leave it out")
    if config.checkpointing == "on" and not can_checkpoint(empty):
        raise UnsupportedError(f"{type(empty).__name__} cannot compute its activations again", hint="leave out --checkpointing")
    if config.init == "qera" and made.task != "language":
        raise UnsupportedError(f"--init qera with the task {made.task}", hint="statistics are taken from language models; --init loftq needs none")
    ranks = start.ranks(empty, checkpoint) if start is not None else rank_of(empty, choose_modules(empty, checkpoint.family, config.targets), config)
    modules = sorted(ranks, key=natural_key)
    layers = dict(empty.named_modules())
    trainable = sum(rank * sum(sides(layers[path])) for path, rank in ranks.items())
    per_step = config.batch * config.accum * processes
    steps = config.steps or steps_in(config.epochs or 1.0, len(made.rows), per_step)
    return TrainPlan(
        base=folder_name(checkpoint.folder),
        task=made.task,
        modules=tuple(modules),
        ranks=ranks,
        trainable_parameters=trainable,
        total_parameters=sum(spec.numel for spec in checkpoint.specs.values()) + trainable,
        steps=steps,
        epochs=steps * per_step / len(made.rows),
        rows=len(made.rows),
        data=made.report,
        preview=made.preview,
        config=config,
        estimate=estimate_run(checkpoint, made, config, ranks, device, teacher),
        seconds_per_step=seconds_per_step(checkpoint, made, config, ranks, device, teacher) if timed else None,
    )


@dataclass
class Prepared:
    """A run in memory, with what its output needs to say about it."""

    run: Run
    base: Base
    plan: TrainPlan
    identity: RunIdentity
    folder: Path
    checkpointing: bool
    start: Start | None = None
    probe_bytes: int | None = None

    def restore(self, path: Path) -> None:
        """Put the run where the checkpoint at ``path`` stood."""
        restore(self.run, path)

    def started(self) -> events.Started:
        """The event that opens the run."""
        masters = self.run.masters.values
        return events.Started(
            steps=self.run.steps,
            resumed_at=self.run.progressed.step,
            trainable_parameters=sum(value.numel() for value in masters.values()),
            total_parameters=self.plan.total_parameters,
            rows=len(self.run.rows),
            tokens_per_epoch=self.run.rows.tokens_per_epoch,
            epochs=self.plan.epochs,
            base_bytes=self.base.bytes,
            checkpointing=self.checkpointing,
            estimate_bytes=self.plan.estimate.total_bytes if self.plan.estimate is not None else None,
            probe_bytes=self.probe_bytes,
        )

    def base_tensors(self) -> dict[str, str]:
        """sha256 of the base's stored tensors under the adapter, where it is known."""
        return _fingerprints(self.base, self.plan.modules)


def _fingerprints(base: Base, modules: Iterable[str]) -> dict[str, str]:
    recorded = base_fingerprint(base.checkpoint)
    found = {}
    for path in modules:
        name = base.tensor_of[path]
        sha256 = base.sha256.get(name) if name not in base.checkpoint.quantized else recorded(name)
        if sha256:
            found[name] = sha256
    return dict(sorted(found.items()))


def prepare_run(
    checkpoint: LogicalCheckpoint,
    made: Data,
    plan: TrainPlan,
    config: TrainConfig,
    device: str,
    world: World,
    teacher: LogicalCheckpoint | None,
    folder: Path,
    progress: Progress,
    measured: Mapping[str, int] | None = None,
    start: Start | None = None,
    stats: Statistics | None = None,
) -> Prepared:
    """Load the base, put the adapter on it, and measure two steps. ``measured``: ranks by need from the start of a run that goes on; ``start``: the
    adapter to start from; ``stats``: for a start that weighs by what layers read."""
    dtype, heap = compute_dtype(config, device), Heap(device)
    options: Any = {"dtype": dtype, "device": device, "tidy": heap.give_back, "progress": progress}
    base = load_base(checkpoint, made.task, codec_of(config), labels=made.labels, seed=config.seed, **options)
    if config.pack:
        check_isolation(lambda **inputs: base.model(**inputs, use_cache=False).logits, base.model.config.get_text_config().vocab_size, device)
    if start is not None:
        model, ranks = _started(base, made, plan, config, dtype, start), plan.ranks
    else:
        model, ranks = _adapted(base, made, plan, config, dtype, checkpoint, measured, stats)
    checkpointing = config.checkpointing == "on" or (config.checkpointing == "auto" and plan.estimate is not None and plan.estimate.checkpointing)
    if checkpointing:
        recompute_activations(model)
    settle_forward(model, config)
    heap.give_back()
    loss, teacher_sha256 = _loss(base, made.task, teacher, config, dtype, device, progress)
    run = Run(
        model=model,
        masters=Masters(trainable_parameters(model)),
        rows=made.rows,
        loss=loss,
        config=config,
        steps=plan.steps,
        folder=folder,
        held_out=made.held_out,
        world=world,
        sample=_sampler(model, made, config),
        peak_bytes=lambda: peak_bytes(device),
        tidy=heap.give_back,
    )
    identity = RunIdentity(
        config={
            **config.record(),
            **({"start_sha256": start.sha256} if start is not None else {}),
            **({"calib_sha256": stats.origin.text_sha256} if stats is not None else {}),
        },
        base_sha256=base.identity,
        data_sha256=made.rows.sha256,
        val_sha256=made.held_out.sha256 if made.held_out is not None else None,
        teacher_sha256=teacher_sha256,
        world=world.size,
    )
    prepared = Prepared(run, base, dataclasses.replace(plan, ranks=ranks), identity, folder, checkpointing, start)
    prepared.probe_bytes = _probe(run, device)
    return prepared


def recompute_activations(model: Any) -> None:
    """Keep only what enters each layer, and compute the layer again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # renamed by transformers 5
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def _started(base: Base, made: Data, plan: TrainPlan, config: TrainConfig, dtype: torch.dtype, start: Start) -> PeftModel:
    """The PEFT model with the values of ``start``."""
    start.check_base(_fingerprints(base, plan.modules))
    heads = base.fresh or heads_of(base.model, base.checkpoint, made.task)
    return put_adapter(base, start.adapter, dtype, config=config, task_type=TASK_TYPES[made.task], heads=heads).model


def _adapted(
    base: Base,
    made: Data,
    plan: TrainPlan,
    config: TrainConfig,
    dtype: torch.dtype,
    checkpoint: LogicalCheckpoint,
    measured: Mapping[str, int] | None,
    stats: Statistics | None,
) -> tuple[PeftModel, Mapping[str, int]]:
    """The PEFT model, at ranks by need where the config asks for it: ``measured`` ones where they are known and fit."""
    heads = base.fresh or heads_of(base.model, checkpoint, made.task)

    def moments(path: str) -> torch.Tensor | None:
        name = stats.name_of("input", base.tensor_of[path]) if stats is not None else None
        return stats.read(name) if stats is not None and name is not None else None

    def put(ranks: Mapping[str, int], chosen: TrainConfig) -> PeftModel:
        originals: Callable[[str], torch.Tensor] | None = None
        if chosen.init in CORRECTING and not checkpoint.quantized:
            originals = lambda path: checkpoint.read(base.tensor_of[path])  # noqa: E731
        return inject(base.model, ranks, chosen, TASK_TYPES[made.task], heads=heads, originals=originals, moments=moments, dtype=dtype)

    if config.rank_budget is None:
        return put(plan.ranks, config), plan.ranks
    if measured is not None and measured.keys() == plan.ranks.keys() and max(measured.values()) <= config.rank:
        return put(measured, config), measured
    ranks = _ranks_by_need(base, made, plan, config, put)
    return put(ranks, config), ranks


def _ranks_by_need(
    base: Base, made: Data, plan: TrainPlan, config: TrainConfig, put: Callable[[Mapping[str, int], TrainConfig], PeftModel]
) -> Mapping[str, int]:
    """Ranks from the gradients of a few batches. The base has its own layers again when this returns."""
    assert config.rank_budget is not None
    model = put(plan.ranks, dataclasses.replace(config, init="default", start_rank=None, rank_budget=None))
    loss = _task_loss(base.model, made.task)
    seed_everything(config.seed, "need")
    numbers = range(0, len(made.rows), max(1, len(made.rows) // (_NEED_BATCHES * config.batch)))
    chosen_rows = list(numbers)[: _NEED_BATCHES * config.batch]
    groups = [chosen_rows[at : at + config.batch] for at in range(0, len(chosen_rows), config.batch)]
    device = next(model.parameters()).device
    norms = measure_need(model, (made.rows.batch(group).to(device) for group in groups), lambda m, batch: loss(m, batch)[0])
    layers = dict(model.get_base_model().named_modules())
    dims = {path: sides(layers[path].base_layer) for path in norms}
    ranks = by_need(norms, dims, config.rank_budget, config.rank)
    model.unload()
    return ranks


def _task_loss(causal: Any, task: str) -> Loss:
    return LanguageLoss(causal) if task == "language" else label_loss


def _loss(
    base: Base, task: str, teacher: LogicalCheckpoint | None, config: TrainConfig, dtype: torch.dtype, device: str, progress: Progress
) -> tuple[Loss, str | None]:
    """(the loss, the hash of the teacher that it follows)."""
    if task != "language" or teacher is None:
        return _task_loss(base.model, task), None
    guide = load_base(teacher, "language", teacher.codec, dtype=dtype, device=device, progress=progress)
    return LanguageLoss(base.model, teacher=guide.model, teacher_weight=config.teacher_weight, temperature=config.temperature), guide.identity


def _sampler(model: Any, made: Data, config: TrainConfig) -> Callable[[str], str] | None:
    if not config.samples or made.task != "language":
        return None
    return lambda prompt: continue_text(model, made.tokenizer, prompt, config.sample_tokens, chat=made.chat)


def _probe(run: Run, device: str) -> int:
    """Peak bytes after forward and backward passes over the batch with the longest rows; nothing of the run changes."""
    longest = run.rows.longest()
    train_mode(run.model)
    for number in range(_PROBE_STEPS):
        seed_everything(run.config.seed, "probe", number)
        backward(run, run.rows.batch([longest] * run.config.batch), 1)
    run.masters.clear()
    return peak_bytes(device)


def write_adapter(folder: Path, ready: Prepared, values: Mapping[str, torch.Tensor], base_name: str) -> None:
    """The PEFT files of the run's adapter, from fp32 ``values``."""
    config, tensors = adapter_state(ready.run.model, values, base_model=base_name)
    if ready.start is not None:
        ready.start.hand_on(config, tensors)
    save_adapter(folder, config, tensors)
