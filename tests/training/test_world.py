"""Who a process is, as torchrun's environment says it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from qlora_tools.errors import UsageError
from qlora_tools.training.world import World, processes

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


SCRIPT = """
import torch
from qlora_tools.training.world import processes
with processes("cpu") as (world, device):
    values = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    count = torch.tensor(2.0, dtype=torch.float64)
    world.sum(values, count)
    print(world.rank, world.size, device, values.tolist(), float(count), world.any(world.rank == 1), world.any(False))
assert not torch.distributed.is_initialized()
"""


def test_two_processes_sum_and_agree() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    told = [process.communicate(timeout=120) for process in started]
    assert [out.strip() for out, _ in told] == [f"{rank} 2 cpu [3.0, 30.0] 4.0 True False" for rank in (0, 1)], told
