"""Calibrated NF4 of a whole model on the CPU, against a plain GPTQ loop in torch: same codes, time and peak memory.

    python benchmarks/gptq_speed.py [--shape 350m] [--layers N] [--pairs 3] [--threads 2] [--work DIR]

Both sides read the same checkpoint with random weights and the same moments (random, correlated, one file) and store the linears as NF4 with
plain scales and codes by error feedback, blocks of 128, activation order, damping 0.01. The plain loop is the algorithm as published: inverse by
Cholesky, fp32 weights, columns one by one in torch, updates in blocks; torch uses all threads. Ours runs through the engine, one weight per thread.
A third row is what ``--calib`` really does (all candidates, judged). Each runs in a fresh process; peaks are ``VmHWM``, less that of a process
which only imports. Bars: 3 times faster than the loop, at least 99.9 % of the codes equal, peak at most one block of the model and 1 GB.
Writes ``benchmarks/results/gptq_speed.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measured import measure, median, ratio, write_result

BLOCK, DAMP = 128, 0.01
SIDES = ("loop", "ours", "calib")
BAR = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="350m")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--side", choices=[*SIDES, "nothing"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.work, options.threads)
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        block_bytes, weights = prepare(work, options.shape, options.layers)
        runs: dict[str, list[dict]] = {side: [] for side in SIDES}
        for pair in range(options.pairs):
            for side in SIDES if pair % 2 else SIDES[::-1]:
                runs[side].append(child(side, work, options.threads))
                print(f"{side:6s} {runs[side][-1]['wall_s']:8.1f} s  peak {runs[side][-1]['peak_bytes'] >> 20} MB", flush=True)
        imports = child("nothing", work, options.threads)["peak_bytes"]
        same = same_codes(work)
    faster = ratio([run["wall_s"] for run in runs["loop"]], [run["wall_s"] for run in runs["ours"]])
    peaks = {side: max(run["peak_bytes"] for run in found) for side, found in runs.items()}
    met = {"faster": faster["median"] >= BAR, "same codes": same >= 0.999, "peak": max(peaks["ours"], peaks["calib"]) - imports <= block_bytes + 1_000_000_000}
    command = f"python benchmarks/gptq_speed.py --shape {options.shape}{f' --layers {options.layers}' if options.layers else ''} --pairs {options.pairs} --threads {options.threads}"
    content = {
        "weights": weights, "block_bytes": block_bytes, "seconds": {side: median([run["wall_s"] for run in found]) for side, found in runs.items()},
        "cpu_seconds": {side: median([run["cpu_s"] for run in found]) for side, found in runs.items()},
        "faster": faster, "peak_bytes": peaks, "imports_bytes": imports, "share_of_equal_codes": same, "threads": options.threads, "bars_met": met,
    }  # fmt: skip
    write_result("gptq_speed", command, content)
    print(f"{faster['median']:.1f} times faster {faster['ci95']}, {100 * same:.3f} % of the codes equal, peaks {peaks}, imports {imports}: {met}")


def child(side: str, work: Path, threads: int) -> dict:
    done = measure(__file__, ["--side", side, "--work", str(work), "--threads", str(threads)], threads=threads)
    if done["returncode"]:
        raise SystemExit(f"{side}: {done['stderr']}")
    return done


def prepare(work: Path, shape: str, layers: int | None) -> tuple[int, int]:
    """Checkpoint and statistics; (bytes of one block's linears in bf16, number of weights in linears)."""
    import torch
    from synthetic import config_of, seeded, specs_of, write_base, write_tokenizer

    from qlora_tools.checkpoint.logical import open_checkpoint
    from qlora_tools.checkpoint.statistics import Origin, StatisticsWriter

    write_base(work / "model", shape, layers)
    config = config_of(shape, layers)
    write_tokenizer(work / "model", config["vocab_size"])
    linears = [spec for spec in specs_of(config) if "proj" in spec.name]
    shared, writer = {}, StatisticsWriter(work / "statistics.safetensors", len(linears))
    for spec in linears:
        owner = spec.name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
        shared[spec.name] = owner
        if owner == spec.name:
            x_NI = torch.randn(2048, spec.shape[1], generator=seeded(spec.name, 3))
            x_NI *= torch.logspace(0, -1, spec.shape[1])
            x_NI[:, 1:] += 0.5 * x_NI[:, :-1]
            for kind, part in (("input", x_NI[:1536]), ("held_out", x_NI[1536:])):
                writer.add(f"{kind}.{spec.name}", [part.T @ part / len(part)])
    model = open_checkpoint(work / "model")
    origin = Origin("model", model.stored.headers_sha256(), {}, shared, "random", "0" * 64, 1536, 512)
    writer.close(origin)
    block = sum(spec.nbytes for spec in linears if ".layers.0." in spec.name)
    return block, sum(spec.numel for spec in linears)


def run_side(side: str, work: Path, threads: int) -> None:
    import torch

    from qlora_tools.checkpoint.statistics import Statistics
    from qlora_tools.verbs import quantize  # the same imports on every side

    torch.set_num_threads(threads)
    if side == "calib":
        quantize.quantize(model=work / "model", calib=work / "statistics.safetensors", output=work / "calib", force=True)
    elif side != "nothing":
        with Statistics(work / "statistics.safetensors") as statistics:
            (loop if side == "loop" else ours)(work, statistics, threads)


def ours(work: Path, statistics, threads: int) -> None:
    """Plain scales, error feedback, through the engine."""
    from qlora_tools.checkpoint.logical import open_checkpoint
    from qlora_tools.checkpoint.writer import CheckpointWriter
    from qlora_tools.engine.plan import Outcome, Plan, Read, Unit, Write
    from qlora_tools.engine.run import run
    from qlora_tools.quant.gptq import sweep
    from qlora_tools.quant.grids import nf4_grid
    from qlora_tools.quant.nf4 import NF4

    model, codec, outputs, units = open_checkpoint(work / "model"), NF4(), [], []

    def unit(spec):
        def apply(w_OI, moments_II):
            scales = codec.fit(spec, w_OI)
            return Outcome(
                codec.pack(spec, sweep(w_OI, moments_II, nf4_grid(scales.decoded, scales.state.blocksize, tuple(w_OI.shape)), damp=DAMP, block=BLOCK), scales)
            )

        reads = (Read("model", spec.name), Read("statistics", statistics.name_of("input", spec.name)))
        return Unit(spec.name, reads, tuple(Write(part.name) for part in codec.part_specs(spec)), apply)

    for name, spec in model.specs.items():
        if "proj" in name:
            outputs += codec.part_specs(spec)
            units.append(unit(spec))
    folder = fresh(work / "ours")
    with CheckpointWriter(folder, outputs) as writer:
        run(Plan(tuple(outputs), tuple(units)), {"model": model, "statistics": statistics}, writer, workers=threads)


def loop(work: Path, statistics, threads: int) -> None:
    """Frantar et al. 2022 as published, on NF4's levels with bitsandbytes' scales."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    from qlora_tools.checkpoint.logical import open_checkpoint
    from qlora_tools.checkpoint.writer import CheckpointWriter
    from qlora_tools.quant.nf4 import NF4

    model, codec = open_checkpoint(work / "model"), NF4()
    specs = [spec for name, spec in model.specs.items() if "proj" in name]
    levels = torch.tensor(quantize_4bit(torch.ones(64, 64), quant_type="nf4")[1].code.tolist())
    bounds = (levels[1:] + levels[:-1]) / 2
    with CheckpointWriter(fresh(work / "loop"), [part for spec in specs for part in codec.part_specs(spec)]) as writer:
        for spec in specs:
            w_OI = model.read(spec.name)
            scales = codec.fit(spec, w_OI)
            scale_OI = scales.decoded.repeat_interleave(64).view(spec.shape)
            codes = plain_gptq(w_OI.float(), statistics.read(statistics.name_of("input", spec.name)), scale_OI, levels, bounds)
            for name, part in codec.pack(spec, codes, scales).items():
                writer.write(name, part)


def plain_gptq(w_OI, moments_II, scale_OI, levels, bounds):
    """uint8 codes [O, I]."""
    import torch

    order = torch.argsort(moments_II.diagonal(), descending=True, stable=True)
    w_OI, scale_OI, h_II = w_OI[:, order], scale_OI[:, order], moments_II[order][:, order].double()
    h_II.diagonal().add_(DAMP * h_II.diagonal().mean())
    upper_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h_II)), upper=True).float()
    codes_OI = torch.zeros(w_OI.shape, dtype=torch.uint8)
    for start in range(0, w_OI.shape[1], BLOCK):
        stop = min(start + BLOCK, w_OI.shape[1])
        block, errors = w_OI[:, start:stop].clone(), torch.zeros(len(w_OI), stop - start)
        for column in range(stop - start):
            at = start + column
            code = torch.bucketize(block[:, column] / scale_OI[:, at], bounds)
            codes_OI[:, at] = code
            errors[:, column] = (block[:, column] - levels[code] * scale_OI[:, at]) / upper_II[at, at]
            block[:, column + 1 :] -= errors[:, column, None] * upper_II[at, at + 1 : stop]
        w_OI[:, stop:] -= errors @ upper_II[start:stop, stop:]
    found = torch.empty_like(codes_OI)
    found[:, order] = codes_OI
    return found


def fresh(folder: Path) -> Path:
    """An empty folder: runs repeat."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def same_codes(work: Path) -> float:
    """The share of packed bytes that both sides have alike."""
    from safetensors import safe_open

    alike = total = 0
    files = [sorted((work / side).glob("*.safetensors")) for side in ("ours", "loop")]
    for mine, theirs in zip(*files, strict=True):
        with safe_open(mine, "pt") as ours_file, safe_open(theirs, "pt") as loop_file:
            for name in ours_file.keys():  # noqa: SIM118 (not a dict)
                if name.endswith("proj.weight"):
                    equal = ours_file.get_tensor(name) == loop_file.get_tensor(name)
                    alike, total = alike + int(equal.sum()), total + equal.numel()
    return alike / total


if __name__ == "__main__":
    main()
