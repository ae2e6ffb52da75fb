"""Run a Python command in a fresh process and read its wall time, CPU time and true peak memory.

The peak is ``VmHWM`` read by the child about itself at exit: ``ru_maxrss`` is inherited from the parent
through vfork and would report the parent's size for a small child.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

#: ``QLT_RESULTS`` names another folder, for a trial run.
RESULTS = Path(os.environ.get("QLT_RESULTS", Path(__file__).parent / "results"))

_CHILD = """
import atexit, json, os, resource, runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
def write():
    status = open("/proc/self/status").read()
    kilobytes = int(status.split("VmHWM:")[1].split()[0])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open(report, "w") as stream:
        json.dump({"peak_bytes": kilobytes * 1024, "cpu_s": usage.ru_utime + usage.ru_stime}, stream)
atexit.register(write)
sys.path.insert(0, "") if "" not in sys.path else None
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True) if not sys.argv[0].endswith(".py") else runpy.run_path(sys.argv[0], run_name="__main__")
"""


def measure(
    module: str,
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    threads: int | None = None,
    cwd: Path | None = None,
    limit_bytes: int | None = None,
    timeout_s: float | None = None,
) -> dict:
    """``python -m module arguments`` -> ``{"wall_s", "cpu_s", "peak_bytes", "returncode", "stderr"}``; after ``timeout_s`` it is killed and has no exit status.

    ``limit_bytes``: of the process's own memory (files that it maps do not count); beyond it allocations fail in that process and the machine stays usable.
    """
    environment = dict(os.environ)
    if threads:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    cap = None if limit_bytes is None else lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [python, "-c", _CHILD, str(report), module, *map(str, arguments)],
                capture_output=True,
                text=True,
                env=environment,
                cwd=cwd,
                check=False,
                preexec_fn=cap,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            return {"wall_s": time.perf_counter() - began, "peak_bytes": None, "cpu_s": None, "returncode": None, "stderr": f"no end within {timeout_s:.0f} s"}
        wall = time.perf_counter() - began
        measured = json.loads(report.read_text()) if report.exists() else {"peak_bytes": None, "cpu_s": None}
    return {"wall_s": wall, **measured, "returncode": done.returncode, "stderr": done.stderr[-2000:]}


def ratio(left: Sequence[float], right: Sequence[float], seed: int = 0) -> dict:
    """Median of the pairwise ratios left/right with a 95 % bootstrap interval."""
    import numpy as np

    pairs = np.log(np.asarray(left) / np.asarray(right))
    resampled = np.median(np.random.default_rng(seed).choice(pairs, (10_000, len(pairs))), axis=1)
    low, high = np.exp(np.quantile(resampled, [0.025, 0.975]))
    return {"median": float(np.exp(np.median(pairs))), "ci95": [float(low), float(high)], "pairs": len(pairs)}


def against_itself(samples: Sequence[float]) -> dict | None:
    """One tool's neighbouring samples paired with each other, as two tools' would be: the ratio is 1 but for noise, and ``half_width`` says how much of that there is.

    ``None`` below six samples, which would tell nothing.
    """
    if len(samples) < 6:
        return None
    found = ratio(samples[: len(samples) // 2 * 2 : 2], samples[1::2])
    return {**found, "half_width": max(found["ci95"][1] - 1, 1 / found["ci95"][0] - 1)}


def code_version(script: Path, arguments: Sequence[str]) -> str:
    """A hash of what a result depends on: the package, the script with the modules beside it that scripts share, and its arguments."""
    here = Path(__file__).parent
    files = [path for path in sorted((here.parent / "qlora_tools").rglob("*")) if path.suffix in (".py", ".json", ".txt")]
    files += [here / script.name, *(here / f"{name}.py" for name in ("graphs", "measured", "peers", "synthetic"))]
    seen = hashlib.sha256(json.dumps([str(word) for word in arguments]).encode())
    for path in filter(Path.is_file, files):  # a caller may be no script of this folder
        seen.update(f"{path.name}\n".encode() + path.read_bytes())
    return seen.hexdigest()[:16]


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def machine() -> dict:
    """The processor and the memory, without any name of the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    memory = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags],
    }


def versions(*names: str) -> dict:
    """Of what is installed; this package's own also where it runs from its repository."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name == "qlora-tools":
                found[name] = importlib.import_module("qlora_tools").__version__
    return found


def public_arguments() -> str:
    """This command's arguments without paths of this machine: where peers and scratch files lie is left out, of models the name stays."""
    words = sys.argv[1:]
    local = {number for number, word in enumerate(words) if word in ("--work", "--js") or word.endswith("-python")}
    return shlex.join(Path(word).name if "/" in word else word for number, word in enumerate(words) if not {number, number - 1} & local)


def write_result(name: str, command: str, content: dict) -> Path:
    """``benchmarks/results/<name>.json`` with the command, the machine, the versions, and what of the code it was measured with."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    libraries = versions("qlora-tools", "torch", "numpy", "onnxruntime-gpu", "bitsandbytes", "transformers", "peft")
    head = {"command": command.strip(), "machine": machine(), "versions": libraries, "code": code_version(Path(sys.argv[0]), sys.argv[1:])}
    path.write_text(json.dumps({**head, **content}, indent=2, sort_keys=True) + "\n")
    return path


def export_summary(runs: list[dict]) -> dict:
    """Times, work and peaks of ``ours`` and ``theirs`` in pairs of :func:`measure`'s results, and their ratios."""
    walls, peaks, work = ({tool: [run[tool][key] for run in runs] for tool in ("ours", "theirs")} for key in ("wall_s", "peak_bytes", "cpu_s"))
    return {
        "wall_s": walls,
        "cpu_s": work,
        "peak_bytes": peaks,
        "times_faster": ratio(walls["theirs"], walls["ours"]),
        "times_less_cpu": ratio(work["theirs"], work["ours"]),
        "peak_share": median(peaks["ours"]) / median(peaks["theirs"]),
    }
