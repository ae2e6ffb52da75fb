"""Functions of test modules, called in fresh processes.

Never by a fork of the test's own process: torch's threads stay behind there, the locks that they held do not, and the child may wait for ever.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: A loaded machine may take a minute to import torch twice.
DEADLINE_SECONDS = 300.0
_CALL = "import json, sys; from importlib import import_module; getattr(import_module(sys.argv[1]), sys.argv[2])(*json.loads(sys.argv[3]))"


def call_in_children(function: str, arguments: Iterable[tuple], environments: Iterable[Mapping[str, str]], expected: int = 0) -> None:
    """Call ``package.module.function`` in one process per tuple of ``arguments`` (what JSON can say, and paths), all at once.

    Every one must end with the exit code ``expected`` in time; else the test fails with what they wrote. None outlives the call.
    """
    module, _, name = function.rpartition(".")
    children, outputs = [], []
    try:
        for given, environment in zip(arguments, environments, strict=True):
            command = [sys.executable, "-W", "ignore", "-c", _CALL, module, name, json.dumps(given, default=os.fspath)]
            outputs.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 (closed below; a pipe that nobody reads would fill)
            surroundings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
            children.append(subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=outputs[-1], stderr=subprocess.STDOUT))
        codes = _codes(children, expected)
    finally:
        for child in children:
            child.kill()
            child.wait()
        said = [_content(output) for output in outputs]
    assert codes == [expected] * len(codes), "\n".join(f"-- process {number} (exit code {codes[number]}):\n{text[-4000:]}" for number, text in enumerate(said))


def _codes(children: list[subprocess.Popen], expected: int) -> list[int | None]:
    """Exit codes; ``None`` for those still running when one of them failed, or the deadline came."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if None not in codes or any(code not in (None, expected) for code in codes):
            break
        time.sleep(0.02)
    return [child.poll() for child in children]


def _content(output) -> str:
    with output:
        output.seek(0)
        return output.read()


def torchrun_environments(count: int) -> list[dict[str, str]]:
    """What torchrun tells each of ``count`` processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform.startswith("linux"):
        together["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name need not lead anywhere
    return [{**together, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
