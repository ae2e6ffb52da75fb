"""Extract a rank-16 LoRA from a fine-tune of a 350 M Llama on the CPU: `qlt extract` beside `mergekit-extract-lora`.

    python benchmarks/extract_vs_mergekit.py [--peers-python PATH] [--pairs 3] [--work DIR]

The pair of models is made by ``synthetic.py``: a random base, and a copy with a known low-rank delta plus noise on every
linear. The two tools run in turn, each run a fresh process on the same files; wall time is that of the whole command, memory
is the process's VmHWM. Then the adapters are judged alike: || D - B A || / || D || over all linears in float64, against the
smallest error that any rank-16 adapter can have, from the eigenvalues of D D^T in float64.

Without ``--peers-python`` mergekit is installed into ``benchmarks/.peers/mergekit`` first. Bars: 20 times faster, half the memory,
error within 1e-4 of the optimum. Writes ``benchmarks/results/extract_vs_mergekit.json``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measured import measure, median, ratio, write_result
from peers import python_of, versions_of
from synthetic import SHAPES, TARGETS, write_base, write_tokenizer, write_tuned

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile

BARS = {"times_faster": 20.0, "peak_share": 0.5, "error_above_optimum": 1e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, default=None, help="python of an environment that holds mergekit")
    parser.add_argument("--shape", default="350m", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    peers = python_of("mergekit", options.peers_python)
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        work = Path(text)
        base, tuned = work / "base", work / "tuned"
        write_base(base, options.shape, options.layers)
        write_tuned(tuned, base, options.rank)
        for folder in (base, tuned):
            write_tokenizer(folder, SHAPES[options.shape]["vocab_size"])
        runs = [one_pair(work, base, tuned, options.rank, peers, number % 2 == 1) for number in range(options.pairs)]
        errors = errors_of(base, tuned, {name: work / name / "adapter_model.safetensors" for name in ("qlt", "mergekit")}, options.rank)
    result = summary(runs, errors)
    for line in result["verdict"]:
        print(line)
    command = f"python benchmarks/extract_vs_mergekit.py --shape {options.shape} --rank {options.rank} --pairs {options.pairs}" + (
        f" --layers {options.layers}" if options.layers else ""
    )
    path = write_result(
        "extract_vs_mergekit",
        command,
        {
            "shape": options.shape,
            "layers": options.layers,
            "rank": options.rank,
            "peer": versions_of(peers, "mergekit", "torch", "transformers", "peft"),
            "bars": BARS,
            **result,
        },
    )
    print(f"written to {path}")


def one_pair(work: Path, base: Path, tuned: Path, rank: int, peers: str, peer_first: bool) -> dict[str, dict]:
    """One run of each tool; the order alternates. The adapters stay in ``work`` under the tool's name."""

    def ours() -> dict:
        return measure("qlora_tools.cli", ["extract", "--base", base, "--tuned", tuned, "--rank", rank, "-o", work / "qlt", "-q"], cwd=work)

    def theirs() -> dict:
        arguments = ["--model", tuned, "--base-model", base, "--out-path", work / "mergekit", "--max-rank", rank, "--quiet"]
        return measure("mergekit.scripts.extract_lora", arguments, python=peers, cwd=work)

    for name in ("qlt", "mergekit"):
        shutil.rmtree(work / name, ignore_errors=True)
    found = {name: run() for name, run in sorted({"qlt": ours, "mergekit": theirs}.items(), reverse=not peer_first)}
    for name, run in found.items():
        if run["returncode"] != 0:
            raise SystemExit(f"{name} failed: {run['stderr']}")
        print(f"{name:<9} {run['wall_s']:8.1f} s   {run['cpu_s']:8.1f} CPU s   peak {run['peak_bytes'] / 1e6:7.0f} MB", flush=True)
    return found


def errors_of(base_folder: Path, tuned_folder: Path, adapters: dict[str, Path], rank: int) -> dict[str, float]:
    """Relative Frobenius error over all linears, in float64, of each adapter and of the best one of that rank."""
    base, tuned = open_checkpoint(base_folder), open_checkpoint(tuned_folder)
    files = {name: SafetensorsFile(path) for name, path in adapters.items()}
    energy, lost = 0.0, dict.fromkeys((*adapters, "optimum"), 0.0)
    for name in base.specs:
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in TARGETS:
            continue
        delta = tuned.read(name).double() - base.read(name).double()
        energy += float(delta.square().sum())
        gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
        lost["optimum"] += float(torch.linalg.eigvalsh(gram)[:-rank].clamp(min=0).sum())
        for tool, file in files.items():
            a, b = (file.read(f"base_model.model.{module}.lora_{factor}.weight").double() for factor in "AB")
            lost[tool] += float((delta - b @ a).square().sum())
    return {name: math.sqrt(value / energy) for name, value in lost.items()}


def summary(runs: list[dict[str, dict]], errors: dict[str, float]) -> dict:
    walls = {name: [run[name]["wall_s"] for run in runs] for name in ("qlt", "mergekit")}
    peaks = {name: [run[name]["peak_bytes"] for run in runs] for name in ("qlt", "mergekit")}
    faster, share = ratio(walls["mergekit"], walls["qlt"]), median(peaks["qlt"]) / median(peaks["mergekit"])
    above = {name: errors[name] - errors["optimum"] for name in ("qlt", "mergekit")}
    met = {
        "times_faster": faster["median"] >= BARS["times_faster"],
        "peak_share": share <= BARS["peak_share"],
        "error_above_optimum": above["qlt"] <= BARS["error_above_optimum"],
    }
    verdict = [
        f"wall: qlt {median(walls['qlt']):.1f} s, mergekit {median(walls['mergekit']):.1f} s: {faster['median']:.1f} times faster {[round(end, 1) for end in faster['ci95']]}",
        f"peak: qlt {median(peaks['qlt']) / 1e6:.0f} MB, mergekit {median(peaks['mergekit']) / 1e6:.0f} MB: a share of {share:.2f}",
        f"error: qlt {errors['qlt']:.6f} ({above['qlt']:+.1e}), mergekit {errors['mergekit']:.6f} ({above['mergekit']:+.1e}), optimum {errors['optimum']:.6f}",
        f"bars met: {met}",
    ]
    short = [{name: {key: run[name][key] for key in ("wall_s", "cpu_s", "peak_bytes")} for name in run} for run in runs]
    return {"runs": short, "times_faster": faster, "peak_share": share, "errors": errors, "error_above_optimum": above, "bars_met": met, "verdict": verdict}


if __name__ == "__main__":
    main()
