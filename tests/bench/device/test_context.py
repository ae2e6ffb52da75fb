"""A process that holds next to nothing: which runtime, and that it is read while it is held."""

import os
import sys
import types

import numpy as np
import pytest

from qlora_tools.bench.device.context import hold_context, holder_of, open_one_tensor
from qlora_tools.errors import UsageError
from qlora_tools.export.runtime.loading import open_one_operator


class Meter:
    uuid = "GPU-fake"

    def __init__(self, alive):
        self.alive, self.read_while = alive, []

    def read(self, pid=None):
        self.read_while.append((pid, list(self.alive)))
        return {"used_bytes": 10, "process_bytes": 3, "energy_mj": None}


def test_each_engine_gets_its_own_runtimes_context():
    assert holder_of("qlora_tools.bench.hf_engine:load").endswith(":open_one_tensor") and holder_of("qlora_tools.bench.hf_forward:load").endswith(
        ":open_one_tensor"
    )
    assert holder_of("qlora_tools.export.runtime:open_engine") == holder_of("qlora_tools.export.runtime.forward:open_engine")


def test_it_is_read_by_our_number_while_it_is_held(monkeypatch):
    alive = []

    class Held:
        def __init__(self, **options):
            alive.append(options)

        def __del__(self):
            alive.clear()

    module = types.ModuleType("held_runtime")
    module.open = Held
    monkeypatch.setitem(sys.modules, "held_runtime", module)
    monkeypatch.setattr("qlora_tools.bench.device.context._ONNX", "held_runtime:open")
    meter = Meter(alive)
    assert hold_context("qlora_tools.export.runtime:open_engine", meter, {"folder": "x", "device": "cuda", "memory": "deployed"})["process_bytes"] == 3
    assert meter.read_while == [(os.getpid(), [{"device": "cuda", "memory": "deployed"}])] and alive == []


@pytest.mark.parametrize("engine", ["qlora_tools.export.runtime:open_engine", "qlora_tools.bench.hf_engine:load"])
def test_both_runtimes_hold_one_on_the_cpu(engine):
    assert hold_context(engine, Meter([]), {"device": "cpu"})["used_bytes"] == 10


def test_the_operator_computes():
    session = open_one_operator(device="cpu")
    x = np.eye(16, dtype=np.float32) * 3
    assert np.array_equal(session.run(None, {"x": x})[0], x @ x)
    assert open_one_tensor(device="cpu")[0, 0] == 16


def test_a_device_without_a_provider_is_refused():
    with pytest.raises(UsageError, match="device `tpu`"):
        hold_context("qlora_tools.export.runtime:open_engine", Meter([]), {"device": "tpu"})
