"""Start one worker, sleep until it ends, and say what became of it.

The parent blocks on a process descriptor, since a parent that polls competes with what it measures. The
worker leads its own session; a timeout or an interrupt kills the whole group. Worker output goes to files, not to
pipes that someone must empty. Threads are pinned through the environment before the interpreter starts,
because numerical libraries read it only once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_tools.bench.machine import cpu_stall_us, oom_kills

#: The longest that a process can be waited for: poll(2) takes milliseconds in 31 bits.
MOST_S = 2_000_000.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "NUMBA_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


def run_worker(config: Mapping[str, Any], *, timeout_s: float, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run one worker to its end. Never raises for what the worker did.

    Returns the worker's result, or ``status`` and ``reason`` where it left none; always with ``wall_s``,
    ``cpu_s`` (user and system time of the worker) and ``cpu_stall`` (the share of that time in which some
    task of the machine waited for a CPU, ``None`` where the kernel does not tell).
    """
    timeout_s = min(timeout_s, MOST_S)
    with tempfile.TemporaryDirectory(prefix="qlt-bench-") as scratch:
        folder = Path(scratch)
        config = {**config, "result": str(folder / "result.json"), "deadline_s": timeout_s, "parent": os.getpid()}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        kills, stalled_us, started = oom_kills(), cpu_stall_us(), time.perf_counter()
        exit_code, cpu_s = _spawn_and_wait(folder, timeout_s, worker_environment(int(config["threads"]), environment))
        wall_s = time.perf_counter() - started
        outcome = _read_result(folder / "result.json")
        if outcome is None:
            outcome = _explain(exit_code, timeout_s, (oom_kills() or 0) > (kills or 0), folder / "stderr")
    after_us = cpu_stall_us()
    stall = None if stalled_us is None or after_us is None else min((after_us - stalled_us) / (wall_s * 1e6), 1.0)
    return {**outcome, "wall_s": wall_s, "cpu_s": cpu_s, "cpu_stall": stall}


def worker_environment(threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The parent's environment with threads pinned, hub downloads off and this package importable."""
    pinned = dict.fromkeys(_THREAD_VARIABLES, str(threads))
    environment = {**os.environ, **pinned, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **(extra or {})}
    if _PACKAGE_PARENT not in site.getsitepackages():  # run from a source tree
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), _PACKAGE_PARENT)))
    return environment


def _spawn_and_wait(folder: Path, timeout_s: float, environment: Mapping[str, str]) -> tuple[int | None, float | None]:
    """(exit code, negative for a signal, ``None`` for a timeout; CPU seconds). The group is gone on return."""
    command = [sys.executable, "-P", "-m", "qlora_tools.bench.worker", str(folder / "config.json")]
    process: subprocess.Popen[bytes] | None = None
    try:
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=dict(environment), start_new_session=True)
        return _wait(process, timeout_s)
    finally:
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # grandchildren, if any are left
                os.killpg(process.pid, signal.SIGKILL)
            if process.returncode is None:
                process.wait()


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[int | None, float | None]:
    if not hasattr(os, "pidfd_open"):
        try:
            return process.wait(timeout_s), None
        except subprocess.TimeoutExpired:
            return None, None
    descriptor = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return None, None
    finally:
        os.close(descriptor)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def _read_result(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result if isinstance(result, dict) and "status" in result else None


def _explain(exit_code: int | None, timeout_s: float, was_oom_killed: bool, stderr: Path) -> dict[str, Any]:
    """What a worker without a result most likely died of."""
    if exit_code is None:
        return {"status": "timeout", "reason": f"no result within {timeout_s:g} s"}
    if exit_code == -signal.SIGKILL and was_oom_killed:
        return {"status": "oom", "reason": "the kernel's out-of-memory killer ended the process"}
    lines = [line for line in stderr.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = f": {lines[-1].strip()[:200]}" if lines else ""
    if exit_code < 0:
        return {"status": "error", "reason": f"the process died of {_signal_name(-exit_code)}{last}"}
    return {"status": "error", "reason": f"the process ended with code {exit_code} and left no result{last}"}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
