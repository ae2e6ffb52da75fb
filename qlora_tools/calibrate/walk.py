"""One walk of all batches through a model, block by block, and back again where gradients are wanted.

All passages reach a block, its weights are read, every batch runs through it, what its layers heard is handed on and the weights go.
Between blocks only hidden states live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qlora_tools.calibrate.gradients import Tape, backward_through, draw_and_go_back
from qlora_tools.calibrate.moments import Moments
from qlora_tools.calibrate.recorder import InputRecorder, OutputRecorder
from qlora_tools.checkpoint.statistics import HELD_OUT, INPUT, OUTPUT
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.parking import Parking, map_tensors
from qlora_tools.live.relay import Call, Passage, end, intercept, release
from qlora_tools.live.weights import Weights, head_of, stops_of
from qlora_tools.progress import SILENT, Progress, Task

Hand = Callable[[str, str, Moments], None]


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the model. ``inputs``: its keyword arguments; ``keep``: bool [batch, tokens], the positions that are no padding (``None``: all)."""

    inputs: Mapping[str, torch.Tensor]
    keep: torch.Tensor | None = None
    held_out: bool = False


class Walk:
    """``hand(kind, weight, moments)`` is called with what was heard, as soon as it is complete. ``fisher_seed``: draw labels and go back, too.
    ``tidy`` is called after each block, to give back what it took in passing."""

    def __init__(
        self,
        weights: Weights,
        batches: Sequence[Batch],
        hand: Hand,
        parking: Parking,
        *,
        fisher_seed: int | None = None,
        tidy: Callable[[], Any] = lambda: None,
        progress: Progress = SILENT,
    ) -> None:
        self._tidy = tidy
        self._weights, self._batches, self._hand, self._parking, self._seed = weights, batches, hand, parking, fisher_seed
        self._model = weights.model
        self._progress = progress
        self._head = head_of(self._model)
        self._ends = {*weights.missing, *([self._head] if self._head and fisher_seed is None else [])}
        if weights.missing and fisher_seed is not None:
            raise UnsupportedError(
                f"{weights.checkpoint.folder} has no head (`{weights.missing[0]}`), so nothing to draw labels from", hint="leave out --fisher"
            )
        self.blocks, self._embeddings = stops_of(self._model)
        self._inputs = InputRecorder(self._model, weights.weight_of, weights.device)
        self._outputs = None if fisher_seed is None else OutputRecorder(self._model, weights.weight_of, self._head, weights.device)
        self._tape = Tape()
        self._original: dict[str, Callable[..., Any]] = {}

    @property
    def shared(self) -> dict[str, str]:
        """Weight -> the weight under whose name its input's moments were handed over, itself or another."""
        return dict(sorted(self._inputs.owner.items()))

    def run(self) -> None:
        """There and back.

        Raises: whatever the model raises, with a note naming the block.
        """
        stops = sorted({*self.blocks, *self._embeddings, *self._ends, *([self._head] if self._head else [])})
        self._weights.fill("", leaving=stops)
        passages = [Passage(number, self._forward_of(batch), grad=self._has_tape(number)) for number, batch in enumerate(self._batches)]
        total = len(self.blocks) * (len(passages) + sum(map(self._has_tape, range(len(passages)))))
        with self._stopped(stops), self._progress.task("calibrate", total or None, "batches") as task, torch.no_grad():
            try:
                self._there(passages, task)
                self._back(task)
            finally:
                end(passages)
                self._inputs.close()
                if self._outputs:
                    self._outputs.close()

    def _has_tape(self, number: int) -> bool:
        return self._seed is not None and not self._batches[number].held_out

    def _there(self, passages: list[Passage], task: Task) -> None:
        for passage in passages:
            self._begin(passage.number)
            passage.start()
            self._finish(passage)
        while waiting := [passage for passage in passages if passage.call]:
            assert waiting[0].call is not None
            self._stage(waiting[0].call.path, waiting, task)
        for kind in (INPUT, HELD_OUT):
            self._write(kind, self._inputs.take(None, held_out=kind == HELD_OUT))
        self._inputs.close()

    def _stage(self, path: str, waiting: list[Passage], task: Task) -> None:
        """All passages that wait at ``path`` go through it."""
        if path not in self._embeddings and path not in self._ends:
            self._weights.fill(path)
        for kind in (INPUT, HELD_OUT):
            for passage in waiting:
                if passage.call and passage.call.path == path and self._batches[passage.number].held_out == (kind == HELD_OUT):
                    self._begin(passage.number)
                    self._pass(path, passage)
                    if path in self.blocks:
                        task.advance(1, path)
            self._write(kind, self._inputs.take(path, held_out=kind == HELD_OUT))
        self._weights.empty(path)
        self._tidy()

    def _pass(self, path: str, passage: Passage) -> None:
        call = passage.call
        assert call is not None
        if path in self._ends or (path == self._head and not self._has_tape(passage.number)):  # its input was heard on the way here
            passage.stop()
            return
        if path == self._head:
            with torch.enable_grad():
                passage.resume(self._original[path](*call.args, **call.kwargs))
        else:
            output = map_tensors(self._parking.park, self._compute(path, call))
            passage.resume(self._tape.note(path, passage.number, call, output) if self._has_tape(passage.number) else output)
        self._finish(passage)

    def _finish(self, passage: Passage) -> None:
        """A passage that has run to its end gives the gradients of its predictions."""
        if passage.call is None and self._has_tape(passage.number):
            assert self._seed is not None
            draw_and_go_back(passage.result, self._batches[passage.number].keep, self._seed + passage.number)
        if passage.call is None:
            passage.result = None

    def _compute(self, path: str, call: Call) -> Any:
        if path in self._embeddings and self._weights.streamed:
            return self._weights.lookup(path, self._model.get_submodule(path), call.args[0] if call.args else call.kwargs["input"])
        try:
            return self._original[path](*call.args, **call.kwargs)
        except Exception as error:
            error.add_note(f"in {path}")
            raise

    def _back(self, task: Task) -> None:
        """The tape in reverse: its blocks once more, with gradients."""
        if self._outputs is None:
            return
        while self._tape.stages:
            path, steps = self._tape.stages.pop()
            if path in self._embeddings:
                continue
            self._weights.fill(path)
            for step in steps:
                self._outputs.keep = self._batches[step.number].keep
                backward_through(step, self._original[path])
                task.advance(1, path)
            steps.clear()
            if not any(path == earlier for earlier, _ in self._tape.stages):
                self._write(OUTPUT, self._outputs.take(path))
            self._weights.empty(path)
            self._tidy()
        self._write(OUTPUT, self._outputs.take(None))

    def _write(self, kind: str, taken: Iterator[tuple[str, Moments]]) -> None:
        for weight, moments in taken:
            self._hand(kind, weight, moments)

    def _begin(self, number: int) -> None:
        batch = self._batches[number]
        self._inputs.begin(held_out=batch.held_out, keep=batch.keep)
        if self._outputs:
            self._outputs.keep = batch.keep

    def _forward_of(self, batch: Batch) -> Callable[[], Any]:
        inputs = {name: value.to(self._weights.device, self._weights.dtype if value.is_floating_point() else None) for name, value in batch.inputs.items()}
        settings = {"use_cache": False} if hasattr(self._model.config.get_text_config(), "use_cache") and "input_ids" in inputs else {}
        if self._seed is not None and not batch.held_out:
            inputs = {name: value.clone().requires_grad_() if value.is_floating_point() else value for name, value in inputs.items()}
        return lambda: self._model(**inputs, **settings)

    @contextmanager
    def _stopped(self, stops: Sequence[str]) -> Iterator[None]:
        modules = {path: self._model.get_submodule(path) for path in stops}
        self._original = {path: intercept(module, path) for path, module in modules.items()}
        try:
            yield
        finally:
            for module in modules.values():
                release(module)
