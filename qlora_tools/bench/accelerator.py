"""The accelerators that settings run on: found once, before anything is measured, so that a missing one is a reason in a row and not a surprise.

How a device is read is ``bench/device``'s; it is reached by import path, so that tests run without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_tools.bench.engine import locate
from qlora_tools.bench.record import Setting
from qlora_tools.errors import MissingError, UsageError

if TYPE_CHECKING:
    from qlora_tools.bench.device import Meter


@dataclass(frozen=True)
class Instruments:
    """Import paths: ``meter(device) -> Meter | None``; ``arena()``, a context manager with ``record()``; ``context(engine, meter, options) -> reading``."""

    meter: str = "qlora_tools.bench.device:open_meter"
    arena: str = "qlora_tools.bench.device.arena:ArenaWatch"
    context: str = "qlora_tools.bench.device.context:hold_context"


@dataclass(frozen=True)
class Accelerator:
    """One opened device. ``facts`` as it described itself before the first measurement."""

    meter: Meter
    facts: Mapping[str, Any]
    instruments: Instruments

    @property
    def uuid(self) -> str:
        return self.meter.uuid

    @property
    def is_shared(self) -> bool:
        """Other processes were there before us."""
        return bool(self.facts.get("others_running"))

    def read(self) -> dict[str, Any]:
        return dict(self.meter.read())

    def environment(self) -> dict[str, str]:
        """What confines a worker to this device."""
        return self.meter.environment()


class Accelerators:
    """Those of all settings, each opened once. A setting without one runs on the CPU, or cannot run at all (:meth:`missing`)."""

    def __init__(self, settings: Iterable[Setting], instruments: Instruments) -> None:
        self._found: dict[str, Accelerator | None] = {"cpu": None}
        self._missing: dict[str, str] = {}
        for device in dict.fromkeys(map(device_of, settings)):
            if device not in self._found:
                self._open(device, instruments)

    def of(self, setting: Setting) -> Accelerator | None:
        return self._found.get(device_of(setting))

    def missing(self, setting: Setting) -> str | None:
        """Why the setting's device cannot be used; ``None`` if it can."""
        return self._missing.get(device_of(setting))

    def all_facts(self) -> list[dict[str, Any]]:
        """What each device said of itself, one entry per device."""
        return list({found.uuid: dict(found.facts) for found in self._found.values() if found is not None}.values())

    def facts(self) -> dict[str, Any]:
        """For the record's machine: ``gpu``, and ``gpus`` where settings run on several."""
        listed = self.all_facts()
        return {} if not listed else {"gpu": listed[0], **({"gpus": listed} if len(listed) > 1 else {})}

    def _open(self, device: str, instruments: Instruments) -> None:
        wanted = "cuda" if device == "auto" else device
        try:
            meter = locate(instruments.meter)(wanted)
            self._found[device] = None if meter is None else Accelerator(meter, dict(meter.describe()), instruments)
        except (MissingError, UsageError) as error:
            if device == "auto":
                self._found[device] = None  # the CPU is what is left
            else:
                self._missing[device] = str(error) if error.hint is None else f"{error}; {error.hint}"


def device_of(setting: Setting) -> str:
    """``cpu``, ``auto``, ``cuda``, ``cuda:1``, or a GPU's UUID."""
    return str(setting.options.get("device") or "cpu")
