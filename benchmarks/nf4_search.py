"""Squared error of weights in NF4 with searched scales against bitsandbytes' NF4 with double quantization, in the same bytes.

    python benchmarks/nf4_search.py --model DIR [--rows 1024] [--skip-speed]

Weights: every linear of the checkpoint's layers, and Gaussian, Laplace and Student-t(5) matrices. Theirs is bitsandbytes' own quantize and dequantize on
the CPU (flat, whole blocks). ``requantized``: the decoded positive form, rounded to bf16, through bitsandbytes once more, as a loader of the plain
checkpoint would do it; its codes are compared too. Bars: 0.88 of their squared error for the positive form, 0.86 for the signed one.
Speed: values times candidates per second on one thread, as CPU time. Writes ``benchmarks/results/nf4_search.json``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import bitsandbytes.functional as bnbf
import torch
from measured import write_result

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.quant import search
from qlora_tools.quant.nf4 import NF4
from qlora_tools.quant.search import POSITIVE, SIGNED
from qlora_tools.specs import spec_of

BARS = {POSITIVE: 0.88, SIGNED: 0.86}
NAME = "weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1024, help="of the random matrices, with 2048 columns")
    parser.add_argument("--skip-speed", action="store_true")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    linears = [name for name, spec in checkpoint.specs.items() if ".layers." in name and len(spec.shape) == 2]
    result = {"bars": BARS, "linears": summary([errors_of(checkpoint.read(name)) for name in linears], len(linears))}
    result["random"] = {name: summary([errors_of(dense)], 1) for name, dense in random_matrices(options.rows).items()}
    if not options.skip_speed:
        result["speed"] = speed(options.rows)
    for name, found in {"linears": result["linears"], **result["random"]}.items():
        print(f"{name:9s}", *(f"{key} {value:.4f}" for key, value in found["of_bitsandbytes"].items()), f"same codes {found['same_codes']:.6f}")
    print("speed", result.get("speed"))
    print("wrote", write_result("nf4_search", f"python benchmarks/nf4_search.py --model {options.model.name} --rows {options.rows}", result))


def random_matrices(rows: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shape = (rows, 2048)
    return {
        "gaussian": torch.randn(shape) * 0.02,
        "laplace": torch.distributions.Laplace(0.0, 0.02).sample(shape),
        "student5": torch.distributions.StudentT(5.0).sample(shape) * 0.02,
    }


def stock(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, fp32 values) of bitsandbytes with double quantization; flat, so that no block straddles a row."""
    packed, state = bnbf.quantize_4bit(dense.reshape(-1), compress_statistics=True, quant_type="nf4")
    return packed, bnbf.dequantize_4bit(packed, state).float()


def errors_of(dense: torch.Tensor) -> dict[str, float]:
    """Sums of squares, as floats: of the weight, and of each candidate's error."""
    flat = dense.float().reshape(-1)
    spec = spec_of(NAME, flat)

    def squared(restored: torch.Tensor) -> float:
        return float((restored.double() - flat.double()).square().sum())

    found = {"weight": float(flat.double().square().sum()), "bitsandbytes": squared(stock(flat)[1])}
    for form in (POSITIVE, SIGNED):
        codec = NF4(search=form)
        parts = codec.encode(spec, flat)
        restored = codec.decode(spec, parts)
        found[form] = squared(restored)
        if form == POSITIVE:
            packed, again = stock(restored.to(torch.bfloat16))
            found |= {"requantized": squared(again), "same_bytes": float((packed == parts[NAME]).sum()), "bytes": float(packed.numel())}
    return found


def summary(rows: list[dict[str, float]], tensors: int) -> dict:
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    ratios = {key: total[key] / total["bitsandbytes"] for key in (POSITIVE, "requantized", SIGNED)}
    worst = {key: max(row[key] / row["bitsandbytes"] for row in rows) for key in ratios}
    relative = {key: (total[key] / total["weight"]) ** 0.5 for key in ("bitsandbytes", *ratios)}
    same = total["same_bytes"] / total["bytes"]
    return {"tensors": tensors, "of_bitsandbytes": ratios, "worst_tensor": worst, "relative_error": relative, "same_codes": same}


def speed(rows: int) -> dict[str, float]:
    """Billions of (values x candidates) a second, the best of 5 on one thread; refits count as candidates."""
    dense = (torch.randn(rows, 2048) * 0.02).bfloat16()
    found = {}
    for form in (POSITIVE, SIGNED):
        best = float("inf")
        for _ in range(6):
            began = time.process_time()
            search.search_scales(dense, 64, form)
            best = min(best, time.process_time() - began)
        candidates = len(search._inverses(form)[0]) + search._REFITS
        found[form] = {
            "candidates": candidates,
            "giga_values_times_candidates_per_s": dense.numel() * candidates / best / 1e9,
            "ns_per_value": best / dense.numel() * 1e9,
        }
    return found


if __name__ == "__main__":
    main()
