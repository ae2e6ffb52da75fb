"""The search for the least limit, against cases whose answer is known."""

import json
import subprocess
import sys

import pytest

from qlora_tools.bench.device import kept_within, smallest_limit
from qlora_tools.errors import OutOfMemory, UsageError
from qlora_tools.export.runtime.loading import named_failure

GB = 1_000_000_000


@pytest.mark.parametrize("answer", [1.0, 1.01, 1.3, 2.9, 5.55, 9.99, 0.4])
def test_the_answer_is_found_to_one_percent_in_few_tries(answer):
    found = smallest_limit(lambda limit: limit >= answer * GB, GB, most_bytes=10 * GB)
    assert found.reason is None and answer * GB <= found.bytes <= 1.011 * answer * GB and len(found.tries) <= 24
    assert found.tries[0] == (GB, answer <= 1) and max(limit for limit, _ in found.tries) <= 10 * GB


def test_a_case_that_never_fits_has_no_number():
    found = smallest_limit(lambda limit: False, GB, most_bytes=3 * GB)
    assert found.bytes is None and "does not run within the device's" in found.reason and found.tries[-1][0] == 3 * GB


def test_weights_larger_than_the_device_are_tried_once():
    found = smallest_limit(lambda limit: False, 5 * GB, most_bytes=3 * GB)
    assert found.tries == ((3 * GB, False),) and found.bytes is None


def test_tries_are_bounded():
    found = smallest_limit(lambda limit: limit >= 40 * GB, 1, most_bytes=80 * GB, most_tries=6)
    assert len(found.tries) == 6 and "nothing ran in 6 tries" in found.reason
    found = smallest_limit(lambda limit: limit >= 1.2 * GB, GB, most_bytes=80 * GB, most_tries=4)
    assert "4 tries left it between" in found.reason and found.bytes is None


def test_a_success_that_does_not_come_again_is_reported():
    seen = []

    def runs(limit):
        seen.append(limit)
        return limit >= 2 * GB and seen.count(limit) == 1

    assert "ran once with" in smallest_limit(runs, GB, most_bytes=10 * GB).reason


def test_a_failure_that_does_not_come_again_is_reported():
    seen = []

    def runs(limit):
        seen.append(limit)
        return limit >= 2 * GB or seen.count(limit) == 2

    assert "a larger limit is not always better" in smallest_limit(runs, GB, most_bytes=10 * GB).reason


def test_senseless_bounds_are_refused():
    for arguments in ((0, 10), (10, 0)):
        with pytest.raises(UsageError):
            smallest_limit(lambda limit: True, arguments[0], most_bytes=arguments[1])


def test_a_run_counts_only_if_the_sessions_arena_kept_its_limit():
    arena = {"peak_bytes": 1000, "source": "log", "arenas": [{"peak_bytes": 100, "reserved_bytes": 60}, {"peak_bytes": 900, "reserved_bytes": 0}]}
    assert kept_within(arena, 100) and not kept_within(arena, 99)
    assert not kept_within({"peak_bytes": None, "reason": "none"}, 99) and not kept_within({**arena, "arenas": []}, 99)
    assert kept_within({"peak_bytes": 99, "source": "torch"}, 99) and not kept_within({"peak_bytes": 100, "source": "torch"}, 99)


LIVE = """
import json, sys
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from qlora_tools.bench.device.arena import ArenaWatch

limit = int(sys.argv[1])
weight = numpy_helper.from_array(np.ones((256, 4096), np.float32), "w")
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", size]) for name, size in (("x", 256), ("y", 4096))]
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:1], values[1:], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
ort.set_default_logger_severity(1)
memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
options = ort.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 4, 1
options.add_session_config_entry("session.use_env_allocators", "1")
options.add_session_config_entry("session.disable_prepacking", "1")
error = None
with ArenaWatch("cpu") as watch:
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg({"max_mem": limit, "arena_extend_strategy": 1}))
    try:
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": np.ones((1000, 256), np.float32)})
    except Exception as raised:
        error = str(raised)
print(json.dumps([error, watch.record()]))
"""
WEIGHT, OUTPUT = 256 * 4096 * 4, 1000 * 4096 * 4


@pytest.mark.parametrize(("limit", "counts"), [(WEIGHT + OUTPUT + 4096, True), (WEIGHT + OUTPUT // 2, False), (WEIGHT // 2, False)])
def test_a_limit_that_weights_alone_exceed_is_none_for_onnxruntime_and_not_for_us(limit, counts, tmp_path):
    done = subprocess.run([sys.executable, "-c", LIVE, str(limit)], capture_output=True, text=True, check=True, timeout=120)
    error, arena = json.loads(done.stdout)
    assert (error is None and kept_within(arena, limit)) is counts
    if error is not None:
        assert isinstance(named_failure(RuntimeError(error), tmp_path), OutOfMemory)
