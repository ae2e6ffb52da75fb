"""How fast NF4 with double quantization is made and read on the CPU, against bitsandbytes. Same bytes, checked before the clock starts.

    python benchmarks/quantize_speed.py [--threads N] [--pairs N] [--json PATH]

The two sides run in turn inside one process (a pair is one run of each, the order alternating), so that a busy machine slows both alike.
Reported: medians, and the median of the pairs' ratios with a 95 % bootstrap interval over pairs. Both sides get the same number of
threads: torch's and OpenMP's for bitsandbytes, worker threads for ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measured import RESULTS, code_version, public_arguments

SHAPES = ((1024, 1024), (4096, 1024), (4096, 4096), (11008, 4096), (1000, 1000))  # the last has blocks that cross rows
PACKAGES = ("torch", "bitsandbytes", "numba", "numpy")
NAME = "model.layers.0.mlp.up_proj.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path, default=RESULTS / "quantize_speed.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported

    rows = []
    began = time.perf_counter()
    first_call_s = time_first_call()
    for shape in SHAPES:
        rows += measure_shape(shape, arguments.threads, arguments.pairs)
        for row in rows[-2:]:
            print("{operation:10s} {shape!s:14s} ours {ours_ms:9.2f} ms   bitsandbytes {theirs_ms:9.2f} ms   {ratio:6.1f}x  [{low:.1f}, {high:.1f}]".format(
                **row, low=row["ratio_ci95"][0], high=row["ratio_ci95"][1]))  # fmt: skip
    result = {
        "command": f"python benchmarks/quantize_speed.py {public_arguments()}".strip(),
        "code": code_version(Path(sys.argv[0]), sys.argv[1:]),
        "versions": {"python": platform.python_version()} | {package: importlib.metadata.version(package) for package in PACKAGES},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "threads": arguments.threads,
        "pairs": arguments.pairs,
        "first_call_s": round(first_call_s, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "rows": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    worst = min(row["ratio"] for row in rows if row["operation"] == "quantize")
    print(f"first call {first_call_s:.2f} s (import and, without a cache, compilation); slowest quantize ratio {worst:.1f}x; written to {arguments.json}")


def time_first_call() -> float:
    """Seconds from importing the codec to the end of a first small encode and decode."""
    import torch

    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    began = time.perf_counter()
    from qlora_tools.quant.nf4 import NF4
    from qlora_tools.specs import spec_of

    codec, spec = NF4(), spec_of(NAME, weight)
    codec.decode(spec, codec.encode(spec, weight))
    return time.perf_counter() - began


def measure_shape(shape: tuple[int, int], threads: int, pairs: int) -> list[dict[str, object]]:
    """One row for quantizing and one for dequantizing a bf16 matrix."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from qlora_tools.quant.nf4 import NF4, STATE_SUFFIX
    from qlora_tools.specs import spec_of

    torch.set_num_threads(threads)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    codec, spec = NF4(threads=threads), spec_of(NAME, weight)

    def ours() -> dict[str, torch.Tensor]:
        return codec.encode(spec, weight)

    def theirs() -> tuple[torch.Tensor, object]:
        return quantize_4bit(weight, compress_statistics=True, quant_type="nf4")

    parts, (packed, state) = ours(), theirs()
    expected = {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()} | {NAME: packed}
    for name, tensor in expected.items():
        if name.endswith(STATE_SUFFIX):
            same = json.loads(bytes(parts[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            same = torch.equal(parts[name], tensor)
        if not same:
            raise SystemExit(f"{name} of shape {shape} differs from bitsandbytes; timing it would mean nothing")

    common = {"shape": list(shape), "dtype": "bfloat16", "threads": threads, "bytes_equal": True}
    result = [{"operation": "quantize", **common, **compare(ours, theirs, pairs, weight.numel())}]
    same = torch.equal(codec.decode(spec, parts), dequantize_4bit(packed, state))
    decoded = compare(lambda: codec.decode(spec, parts), lambda: dequantize_4bit(packed, state), pairs, weight.numel())
    return [*result, {"operation": "dequantize", **common, "bytes_equal": same, **decoded}]


def compare(ours: Callable[[], object], theirs: Callable[[], object], pairs: int, elements: int) -> dict[str, object]:
    """Alternate the two; medians, throughput, and the median ratio with its bootstrap interval."""
    import numpy as np

    ours(), theirs()
    times = np.empty((pairs, 2))
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            began = time.perf_counter()
            (ours, theirs)[side]()
            times[pair, side] = time.perf_counter() - began
    ratios = times[:, 1] / times[:, 0]
    draws = np.random.default_rng(0).integers(0, pairs, (10_000, pairs))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
    ours_s, theirs_s = np.median(times, axis=0)
    return {
        "ours_ms": round(1e3 * ours_s, 3),
        "theirs_ms": round(1e3 * theirs_s, 3),
        "ours_melements_per_s": round(elements / ours_s / 1e6, 1),
        "theirs_melements_per_s": round(elements / theirs_s / 1e6, 1),
        "ratio": round(float(np.median(ratios)), 2),
        "ratio_ci95": [round(float(low), 2), round(float(high), 2)],
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
