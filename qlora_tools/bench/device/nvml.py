"""A GPU through NVML, with the package ``nvidia-ml-py`` (module ``pynvml``), which is optional and imported here only.

The driver counts processes by the machine's numbers. In a container ours is another, and the same number may belong to a stranger: a figure
is believed in the machine's own namespace, or where every process that the driver lists is one that we can see. Otherwise it is ``None``,
never 0. A part of a divided GPU (MIG) tells its memory and its processes, but neither clocks nor energy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qlora_tools.bench.device.cards import Card, choose, confinement
from qlora_tools.errors import MissingError

#: The inode that Linux gives the first namespace of processes, fixed in its headers.
_MACHINES_OWN = "pid:[4026531836]"


def find() -> Any | None:
    """The module ``pynvml``, or ``None`` where it is not installed."""
    try:
        import pynvml
    except ModuleNotFoundError as error:
        if error.name != "pynvml":
            raise
        return None
    return pynvml


class NvmlMeter:
    """See :class:`~qlora_tools.bench.device.meter.Meter`. ``proc``: where processes are looked for.

    Raises:
        MissingError: no driver or no such GPU. UsageError: not the name of a GPU.
    """

    def __init__(self, nvml: Any, device: str, visible: str | None = None, proc: Path = Path("/proc")) -> None:
        self._nvml, self._proc = nvml, proc
        try:
            nvml.nvmlInit()
            self.uuid = choose(device, [self._card(number) for number in range(nvml.nvmlDeviceGetCount())], visible)
            self._handle = nvml.nvmlDeviceGetHandleByUUID(self.uuid)
        except nvml.NVMLError as error:
            raise MissingError(f"device `{device}`: NVIDIA's driver does not answer: {error}", hint="run `nvidia-smi`; it needs a driver and a GPU") from error

    def describe(self) -> dict[str, Any]:
        nvml, cuda = self._nvml, self._asked("nvmlSystemGetCudaDriverVersion_v2")
        memory = self._asked("nvmlDeviceGetMemoryInfo", self._handle)
        ecc = self._asked("nvmlDeviceGetEccMode", self._handle)
        running = self._running()
        return {
            "name": self._text("nvmlDeviceGetName", self._handle),
            "uuid": self.uuid,
            "driver": self._text("nvmlSystemGetDriverVersion"),
            "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            "memory_bytes": None if memory is None else int(memory.total),
            "clocks": {
                "sm_mhz": self._asked("nvmlDeviceGetClockInfo", self._handle, nvml.NVML_CLOCK_SM),
                "sm_most_mhz": self._asked("nvmlDeviceGetMaxClockInfo", self._handle, nvml.NVML_CLOCK_SM),
                "memory_mhz": self._asked("nvmlDeviceGetClockInfo", self._handle, nvml.NVML_CLOCK_MEM),
            },
            "ecc": None if ecc is None else bool(ecc[0]),
            "others_running": None if running is None else len([process for process in running if process.pid != os.getpid()]),
            "meter": "nvml",
        }

    def read(self, pid: int | None = None) -> dict[str, int | None]:
        """Raises:
        MissingError: the device is gone.
        """
        try:
            used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError as error:
            raise MissingError(f"GPU {self.uuid} does not tell its memory: {error}", hint="run `nvidia-smi`") from error
        energy = self._asked("nvmlDeviceGetTotalEnergyConsumption", self._handle)
        return {"used_bytes": used, "process_bytes": None if pid is None else self._process_bytes(pid), "energy_mj": None if energy is None else int(energy)}

    def environment(self) -> dict[str, str]:
        return confinement(self.uuid)

    def _process_bytes(self, pid: int) -> int | None:
        running = self._running() or []
        ours = [process.usedGpuMemory for process in running if process.pid == pid]
        if not ours or ours[0] is None or not is_our_namespace([process.pid for process in running], self._proc):
            return None
        return int(ours[0]) or None

    def _running(self) -> list[Any] | None:
        found = self._asked("nvmlDeviceGetComputeRunningProcesses", self._handle)
        return None if found is None else list(found)

    def _card(self, number: int) -> Card:
        handle = self._nvml.nvmlDeviceGetHandleByIndex(number)
        mode = self._asked("nvmlDeviceGetMigMode", handle)
        divided = mode is not None and bool(mode[0])
        parts = []
        for part in range(self._asked("nvmlDeviceGetMaxMigDeviceCount", handle) or 0) if divided else ():
            inner = self._asked("nvmlDeviceGetMigDeviceHandleByIndex", handle, part)
            if inner is not None:
                parts.append(str(self._text("nvmlDeviceGetUUID", inner)))
        return Card(str(self._text("nvmlDeviceGetUUID", handle)), self._text("nvmlDeviceGetName", handle) or "GPU", divided, tuple(parts))

    def _asked(self, name: str, *arguments: Any) -> Any | None:
        """The answer, ``None`` where this driver or device has none."""
        try:
            return getattr(self._nvml, name)(*arguments)
        except self._nvml.NVMLError:
            return None

    def _text(self, name: str, *arguments: Any) -> str | None:
        found = self._asked(name, *arguments)
        return found.decode() if isinstance(found, bytes) else found  # older releases of the package give bytes


def is_our_namespace(pids: list[int], proc: Path = Path("/proc")) -> bool:
    """True where the driver's numbers of processes can be taken for ours."""
    try:
        if (proc / "self" / "ns" / "pid").readlink().name == _MACHINES_OWN:
            return True
    except OSError:  # no such thing on this system: numbers are the machine's
        return not (proc / "self").exists()
    return all((proc / str(pid)).exists() for pid in pids)
