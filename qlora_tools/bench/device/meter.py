"""Opening the meter of a GPU. Two sources, one protocol: NVML through the package ``nvidia-ml-py``, else the driver's own ``nvidia-smi``.

Neither makes a CUDA context, which would take some hundred megabytes of what is measured. A worker opens its meter by import path, so
that tests give it another.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

from qlora_tools.errors import MissingError


class Meter(Protocol):
    """Reads one GPU, or one part of a divided one."""

    uuid: str

    def describe(self) -> dict[str, Any]:
        """For the record's machine: ``name``, ``uuid``, ``driver``, ``cuda``, ``memory_bytes``, ``clocks``, ``ecc``, ``others_running`` (a number of
        processes), ``meter``; ``None`` for what is not told.
        """
        ...

    def read(self, pid: int | None = None) -> dict[str, int | None]:
        """``used_bytes`` of the whole device; ``process_bytes`` of ``pid``, ``None`` where the driver does not show it; ``energy_mj``, millijoules
        since the driver was loaded.
        """
        ...

    def environment(self) -> dict[str, str]:
        """What confines a process to this device."""
        ...


def open_meter(device: str) -> Meter | None:
    """The meter of ``device``: ``None`` for ``cpu``, else ``cuda``, ``cuda:<number>`` or a GPU's UUID.

    Raises:
        MissingError: no driver, neither source, or no such GPU. UsageError: not the name of a device.
    """
    if device == "cpu":
        return None
    from qlora_tools.bench.device import nvml, smi

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    library = nvml.find()
    if library is not None:
        return nvml.NvmlMeter(library, device, visible)
    if smi.find() is not None:
        return smi.SmiMeter(device, visible)
    raise MissingError(
        f"device `{device}`: there is neither the package nvidia-ml-py nor the program nvidia-smi, so its memory cannot be read",
        hint="run `pip install nvidia-ml-py`, and check that NVIDIA's driver is installed",
    )
