"""``qlt doctor``: does this installation do what the verbs need? Each check runs the thing it is about."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_tools.errors import MissingError
from qlora_tools.manifest import library_versions


@dataclass(frozen=True)
class Check:
    """One line: ``status`` is ok, warn (works, with a limit) or fail."""

    name: str
    status: str
    found: str
    hint: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and the machine as a block that can be pasted into a report."""

    checks: tuple[Check, ...]
    machine: Mapping[str, str]
    versions: Mapping[str, str]

    @property
    def healthy(self) -> bool:
        return all(check.status != "fail" for check in self.checks)


def doctor(*, folder: Path = Path()) -> Diagnosis:
    """Run every check; a check that raises is a failed check with the exception as its finding."""
    checks = [
        _guarded(name, check)
        for name, check in (
            ("torch", _torch),
            ("codecs", _codecs),
            ("bitsandbytes", _bitsandbytes),
            ("onnxruntime", _onnxruntime),
            ("cuda", _cuda),
            ("gpu memory", _gpu_memory),
        )
    ]
    checks.append(_guarded("working folder", lambda: _disk(folder)))
    machine = {"python": sys.version.split()[0], "system": platform.platform(), "cpu": _cpu(), "cores": str(os.cpu_count())}
    return Diagnosis(tuple(checks), machine, library_versions())


def _guarded(name: str, check: Callable[[], tuple[str, str, str | None]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # noqa: BLE001 - a doctor reports whatever is broken, of whatever kind
        return Check(name, "fail", f"{type(error).__name__}: {error}", "reinstall with the constraints: pip install -c constraints.txt -e .")


def _torch() -> tuple[str, str, str | None]:
    import torch

    product = torch.ones(3, 4, dtype=torch.bfloat16) @ torch.ones(4, 2, dtype=torch.bfloat16)
    return ("ok" if product.eq(4).all() else "fail"), f"{torch.__version__}, {torch.get_num_threads()} threads", None


def _codecs() -> tuple[str, str, str | None]:
    import torch

    from qlora_tools.quant.nf4 import NF4
    from qlora_tools.specs import spec_of

    weight = torch.linspace(-1, 1, 96 * 80).reshape(96, 80).to(torch.bfloat16)
    spec = spec_of("w.weight", weight)
    error = (NF4().decode(spec, NF4().encode(spec, weight)).float() - weight.float()).norm() / weight.float().norm()
    return (
        ("ok" if error < 0.12 else "fail"),
        f"NF4 round trip error {100 * error:.1f} %",
        "the compiled kernels are wrong: delete the numba caches (__pycache__/*.nbi, *.nbc)" if error >= 0.12 else None,
    )


def _bitsandbytes() -> tuple[str, str, str | None]:
    import bitsandbytes
    import torch

    weight = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = (bitsandbytes.functional.dequantize_4bit(packed, state) - weight).norm() / weight.norm()
    return ("ok" if error < 0.12 else "fail"), f"{bitsandbytes.__version__}, its own NF4 round trip error {100 * error:.1f} %", None


def _onnxruntime() -> tuple[str, str, str | None]:
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    return (
        ("ok" if "CPUExecutionProvider" in providers else "fail"),
        f"{onnxruntime.__version__}: {', '.join(name.removesuffix('ExecutionProvider') for name in providers)}",
        None,
    )


def _cuda() -> tuple[str, str, str | None]:
    import onnxruntime
    import torch

    if not torch.cuda.is_available():
        return "warn", "no CUDA device that torch can use; everything runs on the CPU", "on a machine with a GPU, install a CUDA build of torch"
    name = torch.cuda.get_device_name(0)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "warn", f"{name}, but onnxruntime has no CUDA provider", "install onnxruntime-gpu"
    free, total = torch.cuda.mem_get_info()
    return "ok", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free", None


def _gpu_memory() -> tuple[str, str, str | None]:
    from qlora_tools.bench.device import open_meter

    try:
        meter = open_meter("cuda")
    except MissingError as error:
        return "warn", str(error), error.hint
    assert meter is not None, "a CUDA device has a meter"
    facts = meter.describe()
    way = None if facts["meter"] == "nvml" else "for energy and divided GPUs: pip install nvidia-ml-py"
    return "ok", f"{facts['name']} read through {facts['meter']}, driver {facts['driver']}, CUDA {facts['cuda']}", way


def _disk(folder: Path) -> tuple[str, str, str | None]:
    free = shutil.disk_usage(folder).free
    with tempfile.TemporaryDirectory(dir=folder, prefix=".qlt-doctor-") as probe:
        Path(probe, "partial").mkdir()
        Path(probe, "partial").rename(Path(probe, "done"))
    return ("ok" if free > 2e9 else "warn"), f"writable, {free / 1e9:.1f} GB free", None if free > 2e9 else "free some space before a large model"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    fast = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    return f"{model} ({', '.join(fast) or 'no wide vectors'})"
