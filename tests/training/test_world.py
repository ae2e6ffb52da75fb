"""Who a process is, as torchrun's environment says it."""

from __future__ import annotations

import os

import pytest
import torch

from qlora_tools.errors import UsageError
from qlora_tools.training.world import World, processes
from tests.children import call_in_children, torchrun_environments

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_torchrun_there_is_one_process() -> None:
    with processes("cpu") as (world, device):
        assert (world, device) == (World(0, 1), "cpu")
        value = torch.ones(2)
        world.sum(value)
        assert torch.equal(value, torch.ones(2)) and world.any(True) and not world.any(False)
    assert not torch.distributed.is_initialized()


def test_a_world_of_one_needs_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes("cpu") as (world, _):
        assert world.size == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which is no number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK='x'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK 2 is not one of 2"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message) as raised, processes("cpu"):
        pass
    assert "torchrun" in str(raised.value.hint)


def sums_and_agrees() -> None:
    """What each process of the test below sees."""
    with processes("cpu") as (world, device):
        assert (world.rank, world.size, device) == (int(os.environ["RANK"]), 2, "cpu")
        values, count = torch.tensor([1.0, 10.0]) * (world.rank + 1), torch.tensor(2.0, dtype=torch.float64)
        world.sum(values, count)
        assert values.tolist() == [3.0, 30.0] and float(count) == 4.0
        assert world.any(world.rank == 1) and not world.any(False)
    assert not torch.distributed.is_initialized()


def test_two_processes_sum_and_agree() -> None:
    call_in_children(f"{__name__}.sums_and_agrees", [(), ()], torchrun_environments(2))
