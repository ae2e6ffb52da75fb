"""The training loop: one for decoders, encoders and images; rows give the batches, a loss gives the sum over targets.

A step takes ``accum`` micro-batches per process, divides the summed loss by the number of targets in all of them on all processes (so batch 8
and 8 x 1 are the same step), clips, moves the masters and rounds them into the model. Under torchrun every process holds
the frozen base and its share of the rows; the one exchange of a step is the sum of the adapter's gradients. Everything that
happens is an event for the listener; this file draws nothing and knows no files but the run's checkpoints.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_tools.errors import NonFiniteError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.training import events
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.loss import Loss
from qlora_tools.training.optimizers import Masters, at_home, export_state, import_state, make_optimizer, rate_factor, set_rate
from qlora_tools.training.order import batches
from qlora_tools.training.ranks import growth, pad_state, widen
from qlora_tools.training.rows import Batch, Indices, Rows
from qlora_tools.training.state import Progressed, load_state, save_state, seed_everything
from qlora_tools.training.world import World

#: A signal that follows another sooner than this asks for nothing new.
SAME_WISH_SECONDS = 1.0
_EVALUATIONS = 10


@dataclass
class Run:
    """One run in motion. ``model`` is PEFT's, on its device, with the parameters that ``masters`` copies; ``folder`` takes checkpoints."""

    model: Any
    masters: Masters
    rows: Rows
    loss: Loss
    config: TrainConfig
    steps: int
    folder: Path | None = None
    held_out: Rows | None = None
    listen: events.Listener = events.silent
    world: World = field(default_factory=World)
    sample: Callable[[str], str] | None = None
    progressed: Progressed = field(default_factory=Progressed)
    peak_bytes: Callable[[], int] = lambda: 0
    tidy: Callable[[], Any] = lambda: None  # between a forward and a backward pass

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.masters, self.config)
        self.growth = dict(growth(self.config, self.steps))
        self.rank = self.config.start_rank

    @property
    def device(self) -> torch.device:
        return next(iter(self.masters.values.values())).device

    @property
    def eval_every(self) -> int:
        return self.config.eval_every or max(1, self.steps // _EVALUATIONS)

    @property
    def save_every(self) -> int:
        return self.config.save_every or self.eval_every

    @property
    def rows_per_step(self) -> int:
        return self.config.batch * self.config.accum * self.world.size


def train(run: Run, progress: Progress = SILENT) -> str:
    """Train from where ``run.progressed`` stands to the end. Returns ``done``, ``early`` (no better evaluation in sight) or ``interrupted``.

    On an interruption the step in flight is finished and the state saved.

    Raises:
        NonFiniteError: the loss is no longer a number.
    """
    started, before = time.perf_counter(), run.progressed.seconds
    source = micro_batches(run)
    with interruptions() as interrupted, neftune(run.model, run.config.neftune), progress.task("train", run.steps, "steps") as task:
        task.advance(run.progressed.step, "")
        while run.progressed.step < run.steps:
            if _gave_up(run):
                return "early"
            grow(run)
            record = _step(run, next(source))
            run.progressed.seconds = before + time.perf_counter() - started
            run.listen(record)
            task.advance(1, f"loss {record.loss:.3f}  lr {record.lr:.2g}  |g| {record.grad_norm:.2g}  {record.tokens_per_s:,.0f} tok/s")
            at_end = run.progressed.step == run.steps
            judged = at_end or run.progressed.step % run.eval_every == 0
            best = judged and run.held_out is not None and _evaluate(run)
            if judged and run.sample:
                _show_samples(run)
            stopping = run.world.any(interrupted())
            if best or stopping or at_end or _gave_up(run) or run.progressed.step % run.save_every == 0:
                _save(run)
            if stopping and not at_end and not _gave_up(run):
                return "interrupted"
    return "done"


def _gave_up(run: Run) -> bool:
    """Whether evaluations have not improved for as long as the run's patience lasts."""
    return run.config.patience is not None and run.progressed.stale >= run.config.patience


def micro_batches(run: Run) -> Iterator[list[Indices]]:
    """For each step from the present one on: this process's row numbers, micro-batch by micro-batch."""
    per_process = run.config.batch * run.config.accum
    start = run.progressed.step * run.rows_per_step
    for chosen in batches(len(run.rows), run.rows_per_step, run.config.seed, start=start):
        mine = chosen[run.world.rank :: run.world.size]
        assert len(mine) == per_process, (len(mine), per_process)
        yield [mine[at : at + run.config.batch] for at in range(0, per_process, run.config.batch)]


def _step(run: Run, chosen: list[Indices]) -> events.Step:
    began = time.perf_counter()
    step = run.progressed.step
    loaded = [run.rows.batch(rows) for rows in chosen]
    counts = torch.tensor([sum(batch.count for batch in loaded), sum(batch.tokens for batch in loaded)], dtype=torch.float64, device=run.device)
    run.world.sum(counts)
    targets, tokens = (int(value) for value in counts.tolist())
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    train_mode(run.model)
    for number, batch in enumerate(loaded):
        seed_everything(run.config.seed, "step", step, number, run.world.rank)
        total += backward(run, batch, targets)
    if run.world.size > 1:
        flat = run.masters.flat_gradients()
        run.world.sum(flat, total)
        run.masters.set_flat_gradients(flat)
    loss = float(total)
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss} at step {step + 1}", hint="lower --lr, raise --warmup, or look at the rows of this step")
    norm = run.masters.clip(run.config.clip)
    if not math.isfinite(norm):
        raise NonFiniteError(f"the gradient's norm is {norm} at step {step + 1}, at a loss of {loss:.4g}", hint="lower --lr, or raise --warmup")
    lr = set_rate(run.optimizer, rate_factor(run.config, step, run.steps))
    run.optimizer.step()
    run.masters.publish()
    run.masters.clear()
    seconds = time.perf_counter() - began
    run.progressed.step += 1
    run.progressed.tokens += tokens
    run.progressed.note_loss(loss)
    epoch = run.progressed.step * run.rows_per_step / len(run.rows)
    return events.Step(run.progressed.step, run.steps, epoch, loss, lr, norm, tokens, targets, tokens / seconds, run.peak_bytes(), seconds, run.rank)


def train_mode(model: torch.nn.Module) -> None:
    """Dropout on; the statistics of batch norms stay the base's, as all of the base does."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def backward(run: Run, batch: Batch, targets: int) -> torch.Tensor:
    """One micro-batch: its share of the loss of a step with ``targets`` targets, detached; gradients go to the masters."""
    loss, _ = run.loss(run.model, batch.to(run.device))
    share = loss / max(1, targets)
    run.tidy()
    share.backward()
    run.masters.gather()
    return share.detach().double()


def grow(run: Run) -> None:
    """Widen the adapter where the run's ranks grow at this step; new directions have no effect yet."""
    rank = run.growth.get(run.progressed.step)
    if rank is None or rank == run.rank:
        return
    states = {name: dict(run.optimizer.state.get(value, {})) for name, value in run.masters.values.items()}
    old = run.masters
    _widen(run, rank)
    for name, value in run.masters.values.items():
        before = old.values[name]
        with torch.no_grad():  # the masters keep what bf16 rounded away
            value[tuple(slice(0, extent) for extent in before.shape)] = before
    for name, state in states.items():
        if state:
            value = run.masters.values[name]
            padded = pad_state(state, value.shape)
            resized = {entry: at_home(run.optimizer, value, found) for entry, found in padded.items() if getattr(found, "shape", None) == value.shape}
            run.optimizer.state[value] = padded | resized


def _widen(run: Run, rank: int) -> None:
    """The adapter at ``rank``, with masters that are copies of it and an optimizer that knows nothing yet."""
    run.masters = Masters(widen(run.model, rank, run.config.seed))
    run.optimizer = make_optimizer(run.masters, run.config)
    run.rank = rank


@torch.no_grad()
def evaluate(run: Run, rows: Rows) -> tuple[float, float | None]:
    """(mean loss per target, accuracy where the loss counts one) over ``rows``, shared out over the processes."""
    run.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)
    counted = False
    mine = range(run.world.rank, len(rows), run.world.size)
    for start in range(0, len(mine), run.config.batch):
        batch = rows.batch(list(mine[start : start + run.config.batch]))
        loss, correct = run.loss(run.model, batch.to(run.device))
        sums[0] += loss
        sums[1] += batch.count
        if correct is not None:
            sums[2] += correct
            counted = True
    run.world.sum(sums)
    total, count, correct_sum = sums.tolist()
    return total / max(1.0, count), correct_sum / max(1.0, count) if counted else None


def _evaluate(run: Run) -> bool:
    """Judge the adapter on the held-out rows; whether it is the best so far."""
    assert run.held_out is not None
    loss, accuracy = evaluate(run, run.held_out)
    state = run.progressed
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss on held-out rows is {loss} after step {state.step}", hint="lower --lr, or look at the held-out rows")
    best = state.best_loss is None or loss < state.best_loss
    if best:
        state.best_loss, state.best_step, state.stale = loss, state.step, 0
    else:
        state.stale += 1
    run.listen(events.Evaluation(state.step, loss, best, accuracy))
    return best


def _show_samples(run: Run) -> None:
    assert run.sample is not None
    for prompt in run.config.samples:
        run.listen(events.Sample(run.progressed.step, prompt, run.sample(prompt)))


def _save(run: Run) -> None:
    if run.folder is None or run.world.rank:
        return
    tensors, plain = export_state(run.optimizer, run.masters.values, run.masters)
    masters = {f"master/{name}": value for name, value in run.masters.values.items()}
    name = save_state(run.folder, {**masters, **{f"optimizer/{key}": value for key, value in tensors.items()}}, plain, run.progressed, run.config.keep)
    run.listen(events.Saved(run.progressed.step, name))


def restore(run: Run, path: Path) -> None:
    """Put ``run`` where the checkpoint at ``path`` stood."""
    tensors, plain, progressed = load_state(path)
    run.progressed = progressed
    reached = [rank for step, rank in sorted(run.growth.items()) if step < progressed.step]
    if reached and reached[-1] != run.rank:
        _widen(run, reached[-1])
    adopt(run.masters, tensors)
    states = {key.removeprefix("optimizer/"): value for key, value in tensors.items() if key.startswith("optimizer/")}
    import_state(run.optimizer, states, plain, run.masters)


def adopt(masters: Masters, tensors: Mapping[str, torch.Tensor]) -> None:
    """Take the masters of a checkpoint and publish them."""
    with torch.no_grad():
        for name, value in masters.values.items():
            value.copy_(tensors[f"master/{name}"])
    masters.publish()


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Inside the block the first SIGINT, SIGTERM or SIGHUP only raises a flag, which the yielded function reads; a later one interrupts at once.

    Ctrl-C on torchrun comes twice, from the terminal and from torchrun: what follows within moments is the same wish.
    """
    flag = threading.Event()
    first = [0.0]
    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return

    def note(number: int, frame: Any) -> None:
        if not flag.is_set():
            first[0] = time.monotonic()
            flag.set()
        elif time.monotonic() - first[0] >= SAME_WISH_SECONDS:
            raise KeyboardInterrupt

    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in known if signal.getsignal(number) is not signal.SIG_IGN}  # which nohup makes of the last
    try:
        yield flag.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def neftune(model: Any, alpha: float) -> Iterator[None]:
    """Uniform noise of ``alpha / sqrt(T D)`` on the embeddings while training (Jain et al. 2023)."""
    if not alpha:
        yield
        return

    def disturb(module: torch.nn.Module, inputs: Any, embedded_BTD: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded_BTD
        extent = alpha / math.sqrt(embedded_BTD.shape[1] * embedded_BTD.shape[2])
        return embedded_BTD + torch.empty_like(embedded_BTD).uniform_(-extent, extent)

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()
