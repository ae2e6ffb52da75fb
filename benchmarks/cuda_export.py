"""Exports for CUDA beside what they replace: torch with bitsandbytes NF4 and LLM.int8, and the graphs of `onnxruntime_genai.models.builder`.

    python benchmarks/cuda_export.py [--shapes 1b,8b] [--prompt 512] [--steps 128] [--rounds 3] [--genai-python PATH] [--work DIR]
    python benchmarks/cuda_export.py --device cpu --shapes tiny --prompt 16 --steps 4      # does the script itself run

Models: random Llamas of ``--shapes`` from ``synthetic.py`` in bf16. Each engine runs in a process of its own, in turn, ``--rounds`` times: prompt and greedy steps,
the next token chosen on the host after every step, so that all engines wait for their device alike. Device memory is what the device as a whole holds more than
before the process, read from outside it after the last step: context, weights, workspaces and what the allocators keep. Graphs are exported without verification: random
weights have no quality to lose.

Bars: each of our graphs is faster than its counterpart, prompt and step, and takes less device memory. Without ``--genai-python`` the builder is left out.
Writes ``benchmarks/results/cuda_export.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from measured import measure, median, public_arguments, write_result
from synthetic import SHAPES, write_base, write_tokenizer

SCHEMES = {"cuda": ("fp16", "bf16", "int8", "int4", "nf4"), "cpu": ("fp32", "int8", "int4")}
#: What each of our graphs is held to, by name of the row.
RIVALS = {
    "nf4": ("torch nf4",),
    "int4": ("torch nf4", "builder int4"),
    "int8": ("torch int8", "builder int8"),
    "fp16": ("torch bf16", "builder fp16"),
    "bf16": ("torch bf16",),
}
_WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--device", choices=sorted(SCHEMES), default="cuda")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--genai-python", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_engine(*options.child, options)
        return
    sizes = {}
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=options.work) as text:
            sizes[shape] = one_shape(Path(text), shape, options)
    result = {"sizes": sizes, "device": device_name(options.device), "verdict": [line for shape, rows in sizes.items() for line in verdict(shape, rows)]}
    for line in result["verdict"]:
        print(line)
    print(write_result("cuda_export", f"python benchmarks/cuda_export.py {public_arguments()}", result))


def one_shape(work: Path, shape: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Row name -> figures. Folders that a run needs no more are left to the temporary directory."""
    from qlora_tools import api

    base = work / "base"
    write_base(base, shape)
    write_tokenizer(base, SHAPES[shape]["vocab_size"])
    rows: dict[str, tuple[str, Path]] = {"torch bf16": ("torch", base)}
    for scheme in ("nf4", "int8"):
        rows[f"torch {scheme}"] = "torch", work / f"bnb-{scheme}"
        api.quantize(model=base, scheme=scheme, output=work / f"bnb-{scheme}")
    for scheme in SCHEMES[options.device]:
        source = work / "bnb-nf4" if scheme == "nf4" else base  # whose very codes the graph then carries
        rows[scheme] = "graph", api.export(model=source, scheme=scheme, device=options.device, verify=False, output=work / scheme).output
    if options.genai_python:
        rows |= {f"builder {precision}": ("graph", built(base, work, precision, options)) for precision in ("fp16", "int8", "int4")}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for number in range(options.rounds):
        for name, (kind, folder) in rows.items():
            found[name].append(in_process(kind, folder, options))
            print(shape, number, name, {key: value for key, value in found[name][-1].items() if key != "info"}, flush=True)
    return {name: summary(attempts) for name, attempts in found.items()}


def built(base: Path, work: Path, precision: str, options: argparse.Namespace) -> Path:
    folder = work / f"builder-{precision}"
    arguments = ["-m", base, "-o", folder, "-p", precision, "-e", options.device, "-c", work / "cache"]
    done = measure("onnxruntime_genai.models.builder", arguments, python=str(options.genai_python), cwd=work)
    if done["returncode"]:
        print(f"builder {precision} failed: {done['stderr'][-500:]}")
    return folder


def in_process(kind: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a fresh process; it waits after its last step until its memory has been read."""
    before = device_bytes(options.device)
    shape = ["--device", options.device, "--prompt", str(options.prompt), "--steps", str(options.steps)]
    with subprocess.Popen([sys.executable, __file__, *shape, "--child", kind, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdin is not None
        lines = []
        for line in child.stdout:
            lines.append(line)
            if line.startswith("{"):
                break
        after = device_bytes(options.device)
        child.stdin.close()
    if not lines or not lines[-1].startswith("{"):
        return {"failed": "".join(lines[-3:]) or f"exit status {child.returncode}"}
    return {**json.loads(lines[-1]), "device_bytes": None if before is None or after is None else after - before}


def run_engine(kind: str, folder: str, options: argparse.Namespace) -> None:
    """The child: prints one line of JSON, then keeps everything until its input closes."""
    engine = open_engine(kind, Path(folder), options.device)
    ids = np.random.default_rng(0).integers(3, 500, (1, options.prompt))
    prompts, steps = [], []
    for attempt in range(_WARM_UP + 3):
        began = time.perf_counter()
        token = next_token(engine.prefill(ids))
        prompt_ms = (time.perf_counter() - began) * 1e3
        times = []
        for _ in range(options.steps):
            began = time.perf_counter()
            token = next_token(engine.decode(token))
            times.append((time.perf_counter() - began) * 1e3)
        if attempt >= _WARM_UP:
            prompts.append(prompt_ms)
            steps += times
    facts = {key: value for key, value in engine.info().items() if key in ("runtime", "provider", "nodes", "graph_capture", "weights_bytes")}
    print(json.dumps({"prefill_ms": median(prompts), "decode_ms": median(steps), "info": facts}), flush=True)
    sys.stdin.read()


def open_engine(kind: str, folder: Path, device: str) -> Any:
    if kind == "torch":
        from qlora_tools.bench.hf_engine import load

        return load(str(folder), threads=1, device=device)
    from qlora_tools.export.runtime import DecoderSession

    return DecoderSession(folder, threads=1, device=device)


def next_token(logits: Any) -> np.ndarray:
    """int64 [B] on the host; waits for the device."""
    found = logits.argmax(-1)
    return (found if isinstance(found, np.ndarray) else found.cpu().numpy()).astype(np.int64)


def device_bytes(device: str) -> int | None:
    """Bytes in use on the whole device."""
    if device == "cpu":
        return None
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def device_name(device: str) -> str:
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name())


def summary(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    good = [attempt for attempt in attempts if "failed" not in attempt]
    if not good:
        return {"failed": attempts[0]["failed"]}
    figures = {key: median([attempt[key] for attempt in good]) for key in ("prefill_ms", "decode_ms")}
    held = [attempt["device_bytes"] for attempt in good if attempt["device_bytes"] is not None]
    return {**figures, "device_bytes": max(held) if held else None, "rounds": len(good), "info": good[0]["info"]}


def verdict(shape: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """One line per graph, rival and figure: how many times better ours is."""
    lines = []
    for ours, rivals in RIVALS.items():
        for rival in rivals:
            left, right = rows.get(ours), rows.get(rival)
            if left is None or right is None or "failed" in left or "failed" in right:
                continue
            for figure in ("prefill_ms", "decode_ms", "device_bytes"):
                if left[figure] and right[figure]:
                    times = right[figure] / left[figure]
                    lines.append(f"{shape} {ours} against {rival}: {figure} {times:.2f} times better: {'held' if times >= 1 else 'MISSED'}")
    return lines


if __name__ == "__main__":
    main()
