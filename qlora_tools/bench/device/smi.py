"""A GPU through ``nvidia-smi``, which comes with the driver: where ``nvidia-ml-py`` is not installed.

It rounds to mebibytes, knows no part of a divided GPU by itself, and tells no energy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_tools.bench.device.cards import Card, choose, confinement
from qlora_tools.bench.device.nvml import is_our_namespace
from qlora_tools.errors import MissingError

_MIB = 1 << 20
_PROGRAM = "nvidia-smi"
_PATIENCE_S = 30
_NO_MORE = "[N/A]", "[Not Supported]", "[Insufficient Permissions]", "[Unknown Error]", ""
_CUDA = re.compile(r"CUDA(?: UMD)? Version\s*:\s*([0-9.]+)")

Ask = Callable[[Sequence[str]], str]


def find() -> str | None:
    """The program's path, or ``None``."""
    return shutil.which(_PROGRAM)


def ask(arguments: Sequence[str]) -> str:
    """What the program says.

    Raises:
        MissingError: it fails or does not end.
    """
    try:
        done = subprocess.run([_PROGRAM, *arguments], capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"`{_PROGRAM}` does not run: {error}", hint="check NVIDIA's driver") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise MissingError(f"`{_PROGRAM}` fails: {said[0] if said else f'code {done.returncode}'}", hint="check NVIDIA's driver")
    return done.stdout


class SmiMeter:
    """See :class:`~qlora_tools.bench.device.meter.Meter`. ``ask`` runs the program; ``proc``: where processes are looked for.

    Raises:
        MissingError: the program fails, no such GPU, or a divided one. UsageError: not the name of a GPU.
    """

    def __init__(self, device: str, visible: str | None = None, ask: Ask = ask, proc: Path = Path("/proc")) -> None:
        self._ask, self._proc = ask, proc
        cards = [Card(uuid, name, mode == "Enabled") for uuid, name, mode in self._rows("gpu", ("uuid", "name", "mig.mode.current"))]
        if any(card.is_divided for card in cards):
            raise MissingError("a GPU here is divided (MIG), and nvidia-smi does not tell a part's memory", hint="run `pip install nvidia-ml-py`")
        self.uuid = choose(device, cards, visible)

    def describe(self) -> dict[str, Any]:
        fields = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "ecc.mode.current")
        name, driver, memory, sm, sm_most, memory_clock, ecc = self._rows("gpu", fields, self.uuid)[0]
        version = _CUDA.search(self._ask(["-q", "-i", self.uuid]))
        total = _number(memory)
        return {
            "name": name,
            "uuid": self.uuid,
            "driver": driver,
            "cuda": version.group(1) if version else None,
            "memory_bytes": None if total is None else total * _MIB,
            "clocks": {"sm_mhz": _number(sm), "sm_most_mhz": _number(sm_most), "memory_mhz": _number(memory_clock)},
            "ecc": None if ecc in _NO_MORE else ecc == "Enabled",
            "others_running": len([row for row in self._running() if row[0] != str(os.getpid())]),
            "meter": _PROGRAM,
        }

    def read(self, pid: int | None = None) -> dict[str, int | None]:
        """Raises:
        MissingError: the device is gone.
        """
        used = _number(self._rows("gpu", ("memory.used",), self.uuid)[0][0])
        if used is None:
            raise MissingError(f"GPU {self.uuid} does not tell its memory", hint="run `nvidia-smi`")
        return {"used_bytes": used * _MIB, "process_bytes": None if pid is None else self._process_bytes(pid), "energy_mj": None}

    def environment(self) -> dict[str, str]:
        return confinement(self.uuid)

    def _process_bytes(self, pid: int) -> int | None:
        running = self._running()
        ours = [_number(used) for found, used in running if found == str(pid)]
        if not ours or not ours[0] or not is_our_namespace([int(found) for found, _ in running if found.isdecimal()], self._proc):
            return None
        return ours[0] * _MIB

    def _running(self) -> list[list[str]]:
        return self._rows("compute-apps", ("pid", "used_memory"), self.uuid)

    def _rows(self, what: str, fields: Sequence[str], uuid: str | None = None) -> list[list[str]]:
        """Raises:
        MissingError: an answer of another form.
        """
        options = [f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
        said = self._ask([*options, *(["-i", uuid] if uuid else [])])
        rows = [[word.strip() for word in line.split(",")] for line in said.splitlines() if line.strip()]
        if any(len(row) != len(fields) for row in rows) or (what == "gpu" and not rows):
            raise MissingError(f"`{_PROGRAM} {options[0]}` says {said[:80]!r}, expected {len(fields)} words a line", hint="check NVIDIA's driver")
        return rows


def _number(word: str) -> int | None:
    return None if word in _NO_MORE or not word.replace(".", "", 1).isdecimal() else int(float(word))
