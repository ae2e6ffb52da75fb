"""The same claims on a real device: each needs a GPU that is ours alone."""

import json
import os
import subprocess
import sys

import pytest

from qlora_tools.bench.device import figure, open_meter
from qlora_tools.bench.device.smi import SmiMeter

pytestmark = pytest.mark.gpu
MIB = 1 << 20

HOLD = """
import json, os, sys
from qlora_tools.bench.device import open_meter
from qlora_tools.bench.device.arena import ArenaWatch
from qlora_tools.bench.device.context import hold_context
what, meter = sys.argv[1], open_meter("cuda")
if what == "torch":
    import torch
    with ArenaWatch() as watch:
        held = torch.ones(256 << 20, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
    print(json.dumps({"during": meter.read(os.getpid()), "arena": watch.record()}))
elif what == "onnx":
    from qlora_tools.export.runtime.loading import open_one_operator
    with ArenaWatch() as watch:
        held = open_one_operator(device="cuda", memory="lean")
    print(json.dumps({"during": meter.read(os.getpid()), "arena": watch.record()}))
else:
    print(json.dumps({"during": hold_context(what, meter, {"device": "cuda"})}))
"""


def process(what):
    """The readings of one process, by pid where the driver shows it, and the whole device around it."""
    meter = open_meter("cuda")
    before = meter.read()
    done = subprocess.run(
        [sys.executable, "-c", HOLD, what], capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **meter.environment()}
    )
    assert done.returncode == 0, done.stderr
    return {"before": before, **json.loads(done.stdout), "after": meter.read()}


def test_the_meter_describes_the_device():
    said = open_meter("cuda").describe()
    assert said["memory_bytes"] > 1 << 30 and said["uuid"].startswith(("GPU-", "MIG-")) and said["driver"] and said["cuda"]


def test_a_tensor_of_known_size_is_seen_by_the_meter_and_by_torch():
    found = process("torch")
    taken = figure(found)
    assert taken.reason is None and 256 * MIB < taken.bytes < 4096 * MIB
    assert found["arena"]["source"] == "torch" and 256 * MIB <= found["arena"]["peak_bytes"] <= 300 * MIB


@pytest.mark.skipif(os.path.realpath("/proc/self/ns/pid").partition("pid:")[2] != "[4026531836]", reason="the driver knows our process by another number")
def test_bracket_and_process_agree_where_both_are_known():
    found = process("torch")
    assert found["during"]["process_bytes"]
    hidden = {**found, "during": {**found["during"], "process_bytes": None}}
    assert abs(figure(hidden).bytes - figure(found).bytes) <= max(0.05 * figure(found).bytes, 16 * MIB)


def test_onnxruntime_logs_its_arena_on_the_device_and_grows_by_what_is_asked():
    found = process("onnx")["arena"]
    assert found["source"] == "log" and 0 < found["peak_bytes"] < 64 * MIB
    assert {arena["strategy"] for arena in found["arenas"]} == {"kSameAsRequested"}


@pytest.mark.parametrize("engine", ["qlora_tools.export.runtime:open_engine", "qlora_tools.bench.hf_engine:load"])
def test_a_context_costs_something_and_the_same_twice(engine):
    first, second = figure(process(engine)), figure(process(engine))
    assert 50 * MIB < first.bytes < 2048 * MIB and abs(first.bytes - second.bytes) <= max(0.05 * first.bytes, 16 * MIB)


def test_the_drivers_program_and_the_package_agree():
    pytest.importorskip("pynvml")
    meter = open_meter("cuda")
    other = SmiMeter(meter.uuid)
    assert other.uuid == meter.uuid and abs(other.read()["used_bytes"] - meter.read()["used_bytes"]) <= 16 * MIB
    assert other.describe()["memory_bytes"] == pytest.approx(meter.describe()["memory_bytes"], rel=0.01)
