import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qlora_tools.bench.launch import run_worker, worker_environment

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}
WORK = {"prompt_tokens": 4, "new_tokens": 3, "batch": 1, "repeats": 2, "warmup": 1, "most_warmup": 3, "seed": 0, "ids": None}


def launch(engine, timeout_s=60.0, **options):
    job = {"job": "latency", "engine": f"fake_engine:{engine}", "options": options, "threads": 1, "workload": WORK}
    return run_worker(job, timeout_s=timeout_s, environment=ENVIRONMENT)


def test_a_worker_reports_times_and_memory_per_phase():
    found = launch("load", ballast_bytes=60_000_000)
    assert (found["status"], found["reason"]) == ("ok", None)
    assert len(found["runs"]) == 2
    assert found["info"]["vocab_size"] == 32
    assert found["wall_s"] > found["load_s"] > 0
    if sys.platform == "linux":
        memory = found["memory"]
        assert memory["loaded"]["anon_bytes"] - memory["imported"]["anon_bytes"] > 50_000_000
        assert memory["baseline"]["rss_bytes"] < memory["imported"]["rss_bytes"] < memory["steady"]["rss_bytes"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_childs_own_and_loading_is_told_from_running():
    ballast = bytearray(400_000_000)  # a large parent: ru_maxrss of a child would show it
    found = launch("spiky", spike_bytes=200_000_000)
    del ballast
    memory = found["memory"]
    assert memory["baseline"]["peak_bytes"] < 60_000_000
    assert memory["loaded"]["peak_bytes"] > 200_000_000
    if memory["peak_was_reset"]:
        assert memory["steady"]["peak_bytes"] < 150_000_000


@pytest.mark.parametrize(
    ("engine", "status", "reason"),
    [
        ("out_of_memory", "oom", "MemoryError: no room for 12 GB"),
        ("runtime_out_of_memory", "oom", "Failed to allocate memory"),
        ("unsupported", "unsupported", "no kernel for this"),
        ("crash", "error", "the process died of SIGSEGV"),
        ("exits", "error", "ended with code 7 and left no result: gone early"),
        ("killed", "error", "the process died of SIGKILL"),
        ("bounded", "oom", "Unable to allocate"),
        ("no_such_factory", "error", "has no `no_such_factory`"),
    ],
)
def test_each_way_to_fail_has_its_own_words(engine, status, reason):
    found = launch(engine)
    assert found["status"] == status
    assert reason in found["reason"]


def test_a_hanging_worker_is_ended_with_its_children(tmp_path):
    started = time.monotonic()
    found = launch("hang", timeout_s=4.0, pid_file=str(tmp_path / "pids"))
    assert time.monotonic() - started < 30
    assert (found["status"], found["reason"]) == ("timeout", "no result within 4 s")
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        assert until(lambda pid=pid: not is_running(pid), 5)


def until(fulfilled, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not fulfilled() and time.monotonic() < deadline:
        time.sleep(0.02)
    return fulfilled()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_worker_does_not_outlive_a_parent_that_was_killed(tmp_path):
    """It would compute beside the benchmark that goes on."""
    pids = tmp_path / "pids"
    job = {"job": "latency", "engine": "fake_engine:hang", "options": {"pid_file": str(pids)}, "threads": 1, "workload": WORK}
    script = f"from qlora_tools.bench.launch import run_worker; run_worker({job!r}, timeout_s=60.0, environment={ENVIRONMENT!r})"
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    finally:
        parent.kill()
        parent.wait()
    worker, grandchild = map(int, pids.read_text().split())
    try:
        assert until(lambda: not is_running(worker))
    finally:
        for pid in (worker, grandchild):  # what a worker started itself is beyond this
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_wait_without_end_is_a_long_one():
    assert launch("load", timeout_s=math.inf)["status"] == "ok"


def is_running(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    if sys.platform != "linux":
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
    return False


def test_threads_are_pinned_before_the_interpreter_starts():
    assert {worker_environment(3)[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}
    assert worker_environment(3, {"OMP_NUM_THREADS": "5"})["OMP_NUM_THREADS"] == "5"


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="polls where there is no process descriptor")
def test_the_parent_sleeps_while_the_child_works():
    before = time.process_time()
    found = launch("load", step_s=0.25)
    assert found["wall_s"] > 1.0
    assert time.process_time() - before < 0.3
