"""Distillation for models that fit in memory only block by block: teacher and student walk side by side, and each block of the student learns to
put out what the teacher's puts out.

A block sees what the student's earlier blocks really give it, so it also makes up for their losses. Its loss is the squared distance from
the teacher's output over that output's power. After its steps a block keeps what it learnt only if held-out windows say that it got closer, in the
rounding that will be stored. At the end KL(teacher || student) on the held-out windows, of what was learnt and of the start, decides about the whole:
for that the start walks along on those windows. Resident are one block, hidden states (parked in files beyond a budget), and the head at the end.

Axes: N windows, L tokens of a window, D hidden width, V vocabulary, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from qlora_tools.errors import IncompatibleError, NonFiniteError
from qlora_tools.live.parking import Parking, map_tensors, tensors_in
from qlora_tools.live.relay import Call, Passage, end, intercept, release
from qlora_tools.live.text import TextWindows, evenly
from qlora_tools.live.weights import Weights, head_of, stops_of
from qlora_tools.progress import SILENT, Progress, Task
from qlora_tools.training.block_journal import BlockError, BlockJournal
from qlora_tools.training.distill_config import RefineConfig
from qlora_tools.training.optimizers import rate_factor
from qlora_tools.training.student_blocks import Factors, Student, below

#: A batch of held-out predictions takes no more than this, unless a single window does.
LOGITS_BYTES = 64 << 20
_ROWS = 256
TEACHER, START, STUDENT = "teacher", "start", "student"
NOTHING_KEPT = BlockJournal()


@dataclass(frozen=True, eq=False)
class BlocksDistilled:
    """``factors`` by path of the layer: the start's where ``kept_start``. KL in nats per position on held-out windows."""

    factors: Factors
    blocks: tuple[BlockError, ...]
    start_kl: float
    end_kl: float
    kept_start: bool


@dataclass(eq=False)
class _Traveller:
    """One batch on its way through one of the models."""

    model: str
    batch: int
    passage: Passage


def distill_blocks(
    teacher: Weights,
    student: Student,
    text: TextWindows,
    config: RefineConfig,
    parking: Parking,
    *,
    journal: BlockJournal = NOTHING_KEPT,
    tidy: Callable[[], Any] = lambda: None,
    progress: Progress = SILENT,
) -> BlocksDistilled:
    """Train ``student.factors`` block after block on ``text``. Blocks that ``journal`` holds are passed through; it keeps each one that is finished.

    Raises:
        IncompatibleError: the two models have not the same blocks, or the journal is another run's. NonFiniteError: a block puts out NaN or infinity.
    """
    blocks, others = stops_of(student.model)[0], stops_of(teacher.model)[0]
    if blocks != others or not blocks:
        raise IncompatibleError(f"the student has {len(blocks)} blocks, the teacher {len(others)}, or other ones", hint="leave out --by-block")
    with progress.task("refine block by block", len(blocks), "blocks") as task:
        return _Lockstep(teacher, student, text, config, parking, journal, tidy, task).run()


class _Lockstep:
    """The walk: every traveller waits at a stop, the stop's weights are read, all pass, the weights go."""

    def __init__(
        self,
        teacher: Weights,
        student: Student,
        text: TextWindows,
        config: RefineConfig,
        parking: Parking,
        journal: BlockJournal,
        tidy: Callable[[], Any],
        task: Task,
    ) -> None:
        self._weights: dict[str, Weights] = {TEACHER: teacher, STUDENT: student}
        self._student, self._config, self._parking, self._journal, self._tidy, self._task = student, config, parking, journal, tidy, task
        self._blocks, embeddings = stops_of(student.model)
        self._embeddings = {TEACHER: stops_of(teacher.model)[1], STUDENT: embeddings}
        self._heads = {name: head_of(weights.model) for name, weights in self._weights.items()}
        self._original: dict[str, dict[str, Callable[..., Any]]] = {}
        vocab = int(getattr(student.model.config.get_text_config(), "vocab_size", 1))
        few = max(1, min(config.batch, LOGITS_BYTES // (4 * vocab * text.length)))
        self._learn, self._held_out = list(text.learn_NL.split(config.batch)), list(evenly(text.held_out_NL, config.held_out).split(few))
        self._errors: list[BlockError] = []
        self._generator = torch.Generator().manual_seed(config.seed)
        self._start: Factors = dict(student.start)

    def run(self) -> BlocksDistilled:
        """From the embedding to the head."""
        batches = [*self._learn, *self._held_out]
        travellers = [
            _Traveller(model, number, Passage(number, self._forward_of(model, ids_NL)))
            for model in (TEACHER, START, STUDENT)
            for number, ids_NL in enumerate(batches)
            if model != START or number >= len(self._learn)
        ]
        with ExitStack() as stack, torch.no_grad():
            for name, weights in self._weights.items():
                stack.enter_context(self._stopped(name, weights))
            try:
                return self._walk(travellers)
            finally:
                end(traveller.passage for traveller in travellers)

    def _walk(self, travellers: list[_Traveller]) -> BlocksDistilled:
        for traveller in travellers:
            traveller.passage.start()
        while True:
            waiting = [traveller for traveller in travellers if traveller.passage.call]
            paths = {_call(traveller).path for traveller in waiting if traveller.model != TEACHER}
            if not waiting:
                break
            path = next((_call(traveller).path for traveller in waiting if _call(traveller).path not in self._blocks), None)
            if path is None:
                (path,) = paths
                self._block(path, waiting)
            elif path in self._heads.values():
                return self._judge(path, travellers)
            else:
                self._plain(path, waiting)
        raise IncompatibleError(f"{self._student.checkpoint.folder} has no head that predicts tokens", hint="leave out --by-block")

    def _plain(self, path: str, waiting: list[_Traveller]) -> None:
        """An embedding, or the like."""
        for traveller in waiting:
            call = _call(traveller)
            if call.path == path:
                weights = self._weights[_owner(traveller.model)]
                if weights.streamed:
                    output = weights.lookup(path, weights.model.get_submodule(path), call.args[0] if call.args else call.kwargs["input"])
                else:
                    output = self._original[_owner(traveller.model)][path](*call.args, **call.kwargs)
                traveller.passage.resume(map_tensors(self._parking.park, output))

    def _block(self, path: str, waiting: list[_Traveller]) -> None:
        """The teacher's block, then the student's: how it was, how it learns, how it goes on."""
        by_model = {model: [one for one in waiting if one.model == model] for model in (TEACHER, START, STUDENT)}
        self._weights[TEACHER].fill(path)
        wanted: dict[int, torch.Tensor] = {}
        for one in by_model[TEACHER]:
            call = _call(one)
            wanted[one.batch] = _hidden(output := map_tensors(self._parking.park, self._original[TEACHER][path](*call.args, **call.kwargs)))
            one.passage.resume(output)
        self._weights[TEACHER].empty(path)
        self._tidy()
        self._student.fill(path)
        now, self._student.factors = self._student.factors, self._start
        start = self._error(path, by_model[START], wanted, advance=True)
        self._student.factors = now
        self._errors.append(self._learnt(path, by_model[STUDENT], wanted, start))
        self._error(path, by_model[STUDENT], wanted, advance=True)
        self._student.empty(path)
        self._tidy()
        self._task.advance(1, path)

    def _error(self, path: str, ones: Sequence[_Traveller], wanted: Mapping[int, torch.Tensor], *, advance: bool = False) -> float:
        """How far the outputs are off, relative; with ``advance`` they are handed on."""
        distance = power = 0.0
        for one in ones:
            call = _call(one)
            output = self._original[STUDENT][path](*call.args, **call.kwargs)
            distance, power = distance + _squares(_hidden(output) - wanted[one.batch]), power + _squares(wanted[one.batch])
            if advance:
                one.passage.resume(map_tensors(self._parking.park, output))
        return distance / max(power, 1e-30)

    def _learnt(self, path: str, ones: Sequence[_Traveller], wanted: Mapping[int, torch.Tensor], start: float) -> BlockError:
        """Train the factors of one block; they stay changed only if held-out windows agree."""
        judges = [one for one in ones if one.batch >= len(self._learn)]
        before = self._error(path, judges, wanted)
        if not math.isfinite(before):
            raise NonFiniteError(f"`{path}` puts out NaN or infinity", hint="check the models, or compute in another dtype")
        layers = below(self._student.factors, path)
        if not layers or self._student.factors[layers[0]] is not self._start[layers[0]]:  # nothing to learn, or a block that comes again
            return BlockError(path, start, before, before, True)
        order = self._order(len(self._learn))
        if found := self._journal.find(path, start, before):
            self._student.factors.update(found[1])
            return found[0]
        self._train(path, layers, [one for one in ones if one.batch < len(self._learn)], wanted, order)
        for layer in layers:
            self._student.factors[layer] = self._student.stored(layer, self._student.factors[layer])
        after = self._error(path, judges, wanted)
        error = BlockError(path, start, before, after, False) if after < before else BlockError(path, start, before, before, True)
        if error.kept_start:
            self._student.factors.update({layer: self._start[layer] for layer in layers})
        self._journal.keep(error, {} if error.kept_start else {layer: self._student.factors[layer] for layer in layers})
        return error

    def _order(self, batches: int) -> list[int]:
        """Which batch each step of a block takes: every one before any comes again. Drawn for every block, also for one that need not learn any more."""
        order: list[int] = []
        while len(order) < self._config.steps:
            order += reversed(torch.randperm(batches, generator=self._generator).tolist())
        return order[: self._config.steps]

    @torch.enable_grad()
    def _train(self, path: str, layers: Sequence[str], ones: Sequence[_Traveller], wanted: Mapping[int, torch.Tensor], order: Sequence[int]) -> None:
        config, settings = self._config, self._config.train_config()
        for layer in layers:
            a, b = (value.clone().requires_grad_() for value in self._student.factors[layer])
            self._student.factors[layer] = (a, b)
        leaves = [value for layer in layers for value in self._student.factors[layer]]
        optimizer = torch.optim.Adam(leaves, lr=config.lr)
        power = sum(_squares(wanted[one.batch]) for one in ones) / sum(wanted[one.batch].numel() for one in ones)
        for step, number in enumerate(order):
            one = ones[number]
            found = _hidden(self._original[STUDENT][path](*_call(one).args, **_call(one).kwargs))
            loss = (found.float() - wanted[one.batch].float()).square().mean() / max(power, 1e-30)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate_factor(settings, step, config.steps)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _judge(self, head: str, travellers: list[_Traveller]) -> BlocksDistilled:
        """The head: predictions on held-out windows, of all three."""
        for one in travellers:
            if one.batch < len(self._learn):
                one.passage.stop()
        for weights in self._weights.values():
            weights.fill(head)
        kl = {START: 0.0, STUDENT: 0.0}
        ones = {(one.model, one.batch): one for one in travellers}
        positions = 0
        for number, ids_NL in enumerate(self._held_out, start=len(self._learn)):
            logits = {model: self._predict(head, ones[model, number]) for model in (TEACHER, START, STUDENT)}
            positions += ids_NL[:, 1:].numel()
            for model in kl:
                kl[model] += _divergence(logits[TEACHER], logits[model])
        start_kl, end_kl = kl[START] / positions, kl[STUDENT] / positions
        if not math.isfinite(start_kl):
            raise NonFiniteError(f"the divergence from the teacher is {start_kl} at the start", hint="check the adapter and the two models")
        kept = not end_kl < start_kl
        return BlocksDistilled(self._start if kept else self._student.factors, tuple(self._errors), start_kl, end_kl, kept)

    def _predict(self, head: str, one: _Traveller) -> torch.Tensor:
        call = _call(one)
        one.passage.resume(self._original[_owner(one.model)][head](*call.args, **call.kwargs))
        logits: torch.Tensor = one.passage.result.logits
        one.passage.result = None
        return logits[:, :-1].flatten(0, 1)

    def _forward_of(self, model: str, ids_NL: torch.Tensor) -> Callable[[], Any]:
        weights = self._weights[_owner(model)]
        settings = {"use_cache": False} if hasattr(weights.model.config.get_text_config(), "use_cache") else {}
        return lambda: weights.model(input_ids=ids_NL.to(weights.device), **settings)

    @contextmanager
    def _stopped(self, name: str, weights: Weights) -> Iterator[None]:
        head = self._heads[name]
        stops = sorted({*self._blocks, *self._embeddings[name], *([head] if head else [])})
        weights.fill("", leaving=stops)
        modules = {path: weights.model.get_submodule(path) for path in stops}
        self._original[name] = {path: intercept(module, path) for path, module in modules.items()}
        try:
            yield
        finally:
            for module in modules.values():
                release(module)


def _owner(model: str) -> str:
    return TEACHER if model == TEACHER else STUDENT


def _call(traveller: _Traveller) -> Call:
    assert traveller.passage.call is not None
    return traveller.passage.call


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states among what a block gives."""
    return next(tensor for tensor in tensors_in(output) if tensor.is_floating_point())


def _squares(value: torch.Tensor) -> float:
    return float(value.detach().float().square().sum(dtype=torch.float64))


def _divergence(wanted_TV: torch.Tensor, found_TV: torch.Tensor) -> float:
    """Sum over positions of KL(wanted || found), some rows at a time."""
    total = 0.0
    for wanted, found in zip(wanted_TV.split(_ROWS), found_TV.split(_ROWS), strict=True):
        shares = functional.log_softmax(wanted.float(), dim=-1)
        total += float(functional.kl_div(functional.log_softmax(found.float(), dim=-1), shares, reduction="sum", log_target=True))
    return total
