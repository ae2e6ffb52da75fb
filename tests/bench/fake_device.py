"""A device that is a folder: one file per process with the bytes that it holds. Named by ``FAKE_DEVICE``."""

import contextlib
import os
import time
from pathlib import Path

from fake_engine import TableEngine

from qlora_tools.errors import MissingError

UUID = "GPU-fake"
CONTEXT, ARENA, DEPLOYED, MEMORY = 100 << 20, 40 << 20, 70 << 20, 1 << 30
OTHERS = 300 << 20


def folder():
    return Path(os.environ["FAKE_DEVICE"])


def hold(held_bytes):
    (folder() / str(os.getpid())).write_text(str(held_bytes))


def let_go():
    (folder() / str(os.getpid())).unlink(missing_ok=True)


class Meter:
    uuid = UUID

    def describe(self):
        return {"name": "Fake 1", "uuid": UUID, "memory_bytes": MEMORY, "others_running": int(os.environ.get("FAKE_OTHERS", "0"))}

    def environment(self):
        return {"CUDA_VISIBLE_DEVICES": UUID}

    def read(self, pid=None):
        held = {int(file.name): int(file.read_text()) for file in folder().iterdir() if file.name.isdecimal()}
        shown = None if "FAKE_HIDES" in os.environ else held.get(pid)
        counts = "FAKE_ENERGY" in os.environ
        return {"used_bytes": OTHERS + sum(held.values()), "process_bytes": shown, "energy_mj": int(time.monotonic() * 1e4) if counts else None}


def open_meter(device):
    if device not in ("cuda", UUID):
        raise MissingError(f"device `{device}`: 1 GPU is visible", hint="name cuda")
    return Meter()


class DeviceEngine(TableEngine):
    def __init__(self, memory, limit):
        super().__init__(step_s=0.001)
        self.arena = ARENA if memory == "lean" else DEPLOYED
        if limit is not None and self.arena > limit:
            raise RuntimeError(f"Available memory of {limit} is smaller than requested bytes of {self.arena}")
        hold(CONTEXT + self.arena)

    def info(self):
        return {**super().info(), "weights_bytes": ARENA // 2, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}

    def close(self):
        let_go()


def load(*, threads, device="cpu", memory="runtime", memory_limit=None):
    return DeviceEngine(memory, memory_limit) if device != "cpu" else TableEngine()


def load_unlimited(*, threads, device, memory="runtime"):
    assert device == "cuda"
    return DeviceEngine(memory, None)


class Watch:
    def record(self):
        return {"peak_bytes": ARENA, "source": "log", "arenas": [{"peak_bytes": ARENA, "reserved_bytes": 1}]}


@contextlib.contextmanager
def watch_arena():
    yield Watch()


def hold_context(engine, meter, options):
    assert options["device"] == "cuda"
    hold(CONTEXT)
    try:
        return meter.read(os.getpid())
    finally:
        let_go()
