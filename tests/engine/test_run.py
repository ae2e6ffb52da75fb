"""The loop runs plans as written, whatever the number of workers, and stops at the first error."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

from qlora_tools.engine.plan import Outcome, Plan, Read, Unit, Write, copy_units, row_tiles
from qlora_tools.engine.run import run
from qlora_tools.errors import IncompatibleError, MissingError
from qlora_tools.specs import TensorSpec, spec_of


class Memory:
    """A source over tensors in memory that notes what was read."""

    def __init__(self, **tensors):
        self.tensors = tensors
        self.specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
        self.reads = []

    def read(self, name, rows=None):
        self.reads.append((name, rows))
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]


class Sink:
    """A writer into memory."""

    def __init__(self, plan):
        self.tensors = {spec.name: torch.full(spec.shape, -1, dtype=spec.torch_dtype) for spec in plan.outputs}

    def write(self, name, tensor, row=0):
        if tensor.ndim:
            self.tensors[name][row : row + tensor.shape[0]] = tensor
        else:
            self.tensors[name] = tensor


def double(name, source="m"):
    return Unit(f"double {name}", (Read(source, name),), (Write(name),), lambda w: Outcome({name: w * 2}, report=float(w.sum())))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_units_are_applied_and_reports_come_in_plan_order(workers):
    source = Memory(**{f"w{i}": torch.full((i + 1, 2), float(i)) for i in range(9)})
    plan = Plan(tuple(source.specs.values()), tuple(double(name) for name in source.specs))
    sink = Sink(plan)
    assert run(plan, {"m": source}, sink, workers=workers) == [float(tensor.sum()) for tensor in source.tensors.values()]
    assert all(torch.equal(sink.tensors[name], 2 * tensor) for name, tensor in source.tensors.items())


def test_a_large_tensor_is_copied_in_row_tiles():
    spec = TensorSpec("big", "F32", (1 << 20, 64))
    tiles = list(row_tiles(spec))
    assert tiles[0][0] == 0 and tiles[-1][1] == 1 << 20 and all(a[1] == b[0] for a, b in itertools.pairwise(tiles))
    assert max(stop - start for start, stop in tiles) * spec.row_bytes <= 64 << 20


@pytest.mark.parametrize(("rows", "multiple"), [(7, 1), (7, 4), (1, 1), (64, 64)])
def test_tiles_respect_the_row_multiple(rows, multiple):
    tiles = list(row_tiles(TensorSpec("x", "F32", (rows, 10)), tile_bytes=40, multiple=multiple))
    covered = [(0, rows)] if tiles == [None] else tiles
    assert covered[0][0] == 0 and covered[-1][1] == rows and all((stop - start) % multiple == 0 for start, stop in covered[:-1])


def test_copying_casts_once_to_the_target_dtype():
    source = Memory(w=torch.randn(5, 3))
    target = TensorSpec("w", "BF16", (5, 3))
    plan = Plan((target,), tuple(copy_units("m", source.specs["w"], target)))
    sink = Sink(plan)
    run(plan, {"m": source}, sink)
    assert torch.equal(sink.tensors["w"], source.tensors["w"].to(torch.bfloat16))


def test_a_plan_that_forgets_an_output_is_refused_before_any_read():
    source = Memory(a=torch.zeros(2), b=torch.zeros(2))
    plan = Plan(tuple(source.specs.values()), (double("a"),))
    with pytest.raises(IncompatibleError, match="`b` has 2 rows but 0 are written"):
        run(plan, {"m": source}, Sink(plan))
    assert source.reads == []


def test_rows_written_twice_are_refused():
    source = Memory(a=torch.zeros(2))
    plan = Plan(tuple(source.specs.values()), (double("a"), double("a")))
    with pytest.raises(IncompatibleError, match="written twice"):
        plan.check({"m": source})


def test_a_read_that_matches_nothing_names_the_nearest_tensors():
    source = Memory(**{"layers.0.q_proj.weight": torch.zeros(2)})
    plan = Plan((), (Unit("u", (Read("m", "layers.0.qproj.weight"),), (), lambda w: Outcome()),))
    with pytest.raises(MissingError) as caught:
        run(plan, {"m": source})
    assert "layers.0.q_proj.weight" in caught.value.hint


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exploding_unit_stops_the_run_and_is_named(workers):
    source = Memory(**{f"w{i}": torch.zeros(4) for i in range(50)})

    def explode(w):
        raise RuntimeError("boom")

    units = [double(name) for name in source.specs]
    units[3] = Unit("merge layers.3", (Read("m", "w3"),), (Write("w3"),), explode)
    plan = Plan(tuple(source.specs.values()), tuple(units))
    with pytest.raises(RuntimeError, match="boom") as caught:
        run(plan, {"m": source}, Sink(plan), workers=workers)
    assert caught.value.__notes__ == ["while running: merge layers.3"]
    assert len(source.reads) < 50


def test_bytes_in_flight_stay_within_the_budget():
    source = Memory(**{f"w{i}": torch.zeros(1000, 1000) for i in range(8)})
    active, most, lock = 0, 0, threading.Lock()

    def apply(w):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        threading.Event().wait(0.01)
        with lock:
            active -= 1
        return Outcome()

    units = tuple(Unit(name, (Read("m", name),), (), apply) for name in source.specs)
    run(Plan((), units), {"m": source}, workers=8, budget_bytes=9_000_000)
    assert most == 2


def test_threads_inside_a_unit_are_one_and_restored_after():
    before = torch.get_num_threads()
    source = Memory(w=torch.zeros(2), v=torch.zeros(2))
    seen = []
    units = tuple(Unit(name, (Read("m", name),), (), lambda w: seen.append(torch.get_num_threads()) or Outcome()) for name in source.specs)
    run(Plan((), units), {"m": source}, workers=2)
    assert seen == [1, 1] and torch.get_num_threads() == before
