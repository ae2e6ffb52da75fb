"""The processes of a run. torchrun starts them and says in the environment who is who; without it there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from qlora_tools.errors import UsageError

_HINT = "start several processes with torchrun"


@dataclass(frozen=True)
class World:
    """This process is ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def sum(self, *tensors: torch.Tensor) -> None:
        """Sum each tensor over all processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag))
        if dist.get_backend() == "nccl":
            value = value.cuda()
        dist.all_reduce(value)
        return bool(value > 0)


@contextmanager
def processes(device: str) -> Iterator[tuple[World, str]]:
    """(who this process is, its device). Joins the others that torchrun started, if it did.

    Raises:
        UsageError: the environment names processes but not all that is needed to reach them, or makes no sense.
    """
    size = _number("WORLD_SIZE", 1)
    if size < 1:
        raise UsageError(f"WORLD_SIZE is {size}, but there is at least one process", hint=_HINT)
    if size == 1:
        yield World(), device
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set", hint=_HINT)
    local, rank = _number("LOCAL_RANK", 0), _number("RANK", 0)
    if not 0 <= rank < size:
        raise UsageError(f"RANK {rank} is not one of {size} processes", hint=_HINT)
    place = f"cuda:{local}" if device == "cuda" else device
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield World(rank, size), place
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        raise UsageError(f"the environment says {name}={os.environ[name]!r}, which is no number", hint=_HINT) from None
