"""The run loop: load, apply, write, one unit resident per worker.

Units run in parallel across tensors, each with single-threaded BLAS inside, so that results do not depend
on the number of workers. Bytes in flight are bounded: a unit starts only when its inputs fit the budget
(or when it is alone), which keeps the peak at about ``budget`` plus the outputs being written.

An exception stops the run: no new unit starts, those in flight finish, and the first error is raised with a
note naming its unit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from qlora_tools.cores import allowed_cores
from qlora_tools.engine.plan import Outcome, Plan, Source, Unit, read_bytes
from qlora_tools.progress import SILENT, Progress

#: Dense input bytes that may be resident at once, over all workers.
BUDGET_BYTES = 256 << 20


class Writer(Protocol):
    """Takes finished tensors, in any order, from any thread."""

    def write(self, name: str, tensor: torch.Tensor, row: int = 0) -> None:
        """Store ``tensor`` (on the CPU, in the planned dtype) as rows starting at ``row`` of output ``name``."""


def run(
    plan: Plan,
    sources: Mapping[str, Source],
    writer: Writer | None = None,
    *,
    workers: int | None = None,
    budget_bytes: int = BUDGET_BYTES,
    device: str = "cpu",
    title: str = "",
    progress: Progress = SILENT,
) -> list[Any]:
    """Run every unit of ``plan`` and return their reports in plan order.

    ``workers`` defaults to the number of usable cores on the CPU and to 1 on an accelerator, where units run
    one after another on ``device``. ``writer`` may be ``None`` for a plan without outputs.
    """
    plan.check(sources)
    assert writer is not None or not plan.outputs, "a plan with outputs needs a writer"
    workers = workers or (allowed_cores() if device == "cpu" else 1)
    reports: list[Any] = [None] * len(plan.units)
    total = sum(_cost(unit, sources) for unit in plan.units)
    with progress.task(title, total, "B") as task, single_threaded_blas():

        def work(position: int) -> int:
            unit = plan.units[position]
            reports[position] = _run_unit(unit, sources, writer, device)
            cost = _cost(unit, sources)
            task.advance(cost, unit.label)
            return cost

        if workers == 1:
            for position in range(len(plan.units)):
                work(position)
        else:
            _run_in_threads(plan, sources, work, workers, budget_bytes)
    return reports


def _run_unit(unit: Unit, sources: Mapping[str, Source], writer: Writer | None, device: str) -> Any:
    try:
        tensors = [sources[read.source].read(read.name, read.rows).to(device) for read in unit.reads]
        outcome: Outcome = unit.apply(*tensors)
        del tensors
        rows = {write.name: write.row for write in unit.writes}
        assert outcome.tensors.keys() == rows.keys(), f"{unit.label} promised {sorted(rows)}, gave {sorted(outcome.tensors)}"
        for name, tensor in outcome.tensors.items():
            assert writer is not None
            writer.write(name, tensor.to("cpu"), rows[name])
    except BaseException as error:
        error.add_note(f"while running: {unit.label}")
        raise
    return outcome.report


def _run_in_threads(plan: Plan, sources: Mapping[str, Source], work: Any, workers: int, budget_bytes: int) -> None:
    waiting = iter(range(len(plan.units)))
    upcoming = next(waiting, None)
    running: dict[Future[int], int] = {}
    resident = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="qlt", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            while upcoming is not None or running:
                while upcoming is not None and len(running) < workers:
                    cost = _cost(plan.units[upcoming], sources)
                    if running and resident + cost > budget_bytes:
                        break
                    running[pool.submit(work, upcoming)] = cost
                    resident += cost
                    upcoming = next(waiting, None)
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    resident -= running.pop(future)
                    future.result()
        except BaseException:
            for future in running:
                future.cancel()
            raise


def _cost(unit: Unit, sources: Mapping[str, Source]) -> int:
    return max(1, sum(read_bytes(read, sources) for read in unit.reads))


_blas_lock = threading.Lock()
_blas_users = 0
_blas_before = 1


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Pin torch's intra-op threads to one inside the block; re-entrant and safe from several threads."""
    global _blas_users, _blas_before
    with _blas_lock:
        if _blas_users == 0:
            _blas_before = torch.get_num_threads()
            torch.set_num_threads(1)
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0:
                torch.set_num_threads(_blas_before)
