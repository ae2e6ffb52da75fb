"""Arenas from their log: recorded lines, and ONNX Runtime's own on the CPU beside its profile."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qlora_tools.bench.device.arena import ArenaWatch, read_log, record_of, torch_record

AT = "2026-11-22 00:23:48.676684150 [I:onnxruntime:Default, bfc_arena.cc:"
MIB = 1 << 20


def created(name, strategy):
    return f"{AT}28 BFCArena] Creating BFCArena for {name} with following configs: initial_chunk_size_bytes: 1048576 memory limit: 99 arena_extend_strategy: {strategy}"


def reserved(name, size):
    return f"{AT}281 Reserve] Reserving memory in BFCArena for {name} size: {size}"


def extended(name, size, total):
    return [
        f"{AT}335 AllocateRawInternal] Extending BFCArena for {name}. bin_num:5 (requested) num_bytes: 8192 (actual) rounded_bytes:8192",
        f"{AT}205 Extend] Extended allocation by {size} bytes.",
        f"{AT}208 Extend] Total allocated bytes: {total}",
        f"{AT}211 Extend] Allocated memory at 0x55bd9e98e280 to 0x55bd9ea8e280",
    ]


def test_totals_reservations_and_the_strategy_are_read():
    lines = [created("Cuda", 1), reserved("Cuda", 4000), reserved("Cuda", 500), *extended("Cuda", 256, 4756), *extended("Cuda", 512, 5268)]
    (arena,) = read_log(lines)
    assert (arena.name, arena.strategy, arena.most_bytes, arena.held_bytes, arena.reserved_bytes) == ("Cuda", "kSameAsRequested", 5268, 5268, 4500)


def test_memory_given_back_unseen_is_settled_by_the_next_total():
    lines = [created("Cuda", 0), *[reserved("Cuda", 4000)] * 3, *extended("Cuda", 256, 8256), reserved("Cuda", 1000)]
    (arena,) = read_log(lines)
    assert (arena.strategy, arena.most_bytes) == ("kNextPowerOfTwo", 9256)


def test_without_any_total_what_was_reserved_counts():
    assert read_log([created("Cuda", 1), reserved("Cuda", 4000)])[0].most_bytes == 4000


def test_two_arenas_of_one_name_are_told_apart_by_what_adds_up():
    lines = [created("Cuda", 1), reserved("Cuda", 4000), *extended("Cuda", 256, 4256), created("Cuda", 1), *extended("Cuda", 1000, 1000)]
    lines += [*extended("Cuda", 100, 4356), *extended("Cuda", 100, 1100), *extended("Cuda", 50, 3406)]  # the last: 1000 reserved bytes are gone
    session, values = read_log(lines)
    assert (session.most_bytes, session.held_bytes, values.most_bytes) == (4356, 3406, 1100)
    assert record_of([session, values], "cuda")["peak_bytes"] == 5456


def test_other_devices_and_pinned_memory_are_not_counted():
    lines = [created("Cpu", 0), created("CudaPinned", 0), created("Cuda", 1), *extended("Cpu", 7, 7), *extended("CudaPinned", 8, 8), *extended("Cuda", 9, 9)]
    record = record_of(read_log(lines), "cuda")
    assert record == {"peak_bytes": 9, "source": "log", "arenas": [{"name": "Cuda", "strategy": "kSameAsRequested", "peak_bytes": 9, "reserved_bytes": 0}]}


def test_an_arena_made_before_the_recording_is_still_read():
    assert read_log(extended("Cuda", 9, 99))[0].most_bytes == 99


def test_no_arena_is_a_reason_and_not_zero():
    assert record_of(read_log(["something else", "allocate nothing"]), "cuda") == {"peak_bytes": None, "reason": "onnxruntime logged no arena on cuda"}


def test_what_is_no_information_is_passed_on(capfd):
    with ArenaWatch() as watch:
        os.write(2, f"{created('Cuda', 1)}\n\x1b[0;93m2026-11-22 00:28:29 [W:onnxruntime:Default, x] careful\nTraceback\n{reserved('Cuda', 5)}\n".encode())
        sys.stderr.write("from Python\n")
    assert watch.record()["peak_bytes"] == 5
    seen = capfd.readouterr().err
    assert "careful" in seen and "Traceback" in seen and "from Python" in seen and "BFCArena" not in seen


def test_an_error_goes_through_with_the_lines_before_it(capfd):
    with pytest.raises(ValueError, match="no room"), ArenaWatch() as watch:
        os.write(2, f"{reserved('Cuda', 5)}\n".encode())
        raise ValueError("no room")
    assert watch.record()["peak_bytes"] == 5
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_torch_is_read_where_it_used_the_device():
    def torch(used, reserved=7):
        cuda = SimpleNamespace(is_initialized=lambda: used, max_memory_reserved=lambda: reserved, max_memory_allocated=lambda: 5)
        return {"torch": SimpleNamespace(cuda=cuda)}

    assert torch_record(torch(True)) == {"peak_bytes": 7, "allocated_peak_bytes": 5, "source": "torch"}
    assert torch_record(torch(False)) is None and torch_record({}) is None and torch_record(torch(True, 0)) is None


LIVE = """
import json, sys
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from pathlib import Path
from qlora_tools.bench.device.arena import ArenaWatch

folder = Path(sys.argv[1])
weights = [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in (("a", (256, 1024)), ("b", (1024, 256)))]
nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 256]) for name in "xy"]
graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
(folder / "m.onnx").write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString())
ort.set_default_logger_severity(1)
options = ort.SessionOptions()
options.log_severity_level, options.intra_op_num_threads, options.enable_profiling = 3, 1, True
options.profile_file_prefix = str(folder / "profile")
options.add_session_config_entry("session.disable_prepacking", "1")
with ArenaWatch("cpu") as watch:
    session = ort.InferenceSession(str(folder / "m.onnx"), options, providers=["CPUExecutionProvider"])
    for rows in (1, 64, 2000):
        session.run(None, {"x": np.ones((rows, 256), np.float32)})
events = json.loads(Path(session.end_profiling()).read_text())
held = [int(event["args"]["mem_arena_held"]) for event in events if "mem_arena_held" in event.get("args", {})]
print(json.dumps({"arena": watch.record(), "held": held}))
"""


def test_the_log_of_this_onnxruntime_agrees_with_its_profile(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIVE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120)
    said = json.loads(done.stdout)
    (arena,) = said["arena"]["arenas"]
    weights = 2 * 256 * 1024 * 4
    assert arena["reserved_bytes"] == weights and arena["strategy"] == "kNextPowerOfTwo"
    assert arena["peak_bytes"] > weights + 2000 * 1024 * 4
    assert said["held"], "without memory in the profile nothing is compared"
    assert arena["peak_bytes"] == max(said["held"])
    assert done.stderr == ""
