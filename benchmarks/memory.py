"""Peak memory of quantize, merge and export on a synthetic 3 B checkpoint, at full depth and at a quarter of it, and of genai's builder on the same.

    python benchmarks/memory.py [--shape 3b] [--work DIR] [--layers 28,7] [--builder] [--peers-python PATH] [--only WORDS]

``--builder``: ``onnxruntime_genai.models.builder -p int4 -e cpu`` too, with its own memory held below 85 % of the machine's, so that where it would need more
it fails alone; the row then says so, and its peak is what it had reached. Bars: ours under 2 GB and flat in the number of layers; int4 under 2.5 GB and at most a fifth of
the builder's. Disk: about four times the checkpoint (6.4 GB at 28 layers). Writes ``benchmarks/results/memory.json``; with ``--only`` the other rows of
that file stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measured import RESULTS, machine, measure, public_arguments, write_result
from peers import python_of
from synthetic import SHAPES, write_adapter, write_base, write_tokenizer

VERBS = {
    "quantize --nf4": ["quantize", "{base}", "--nf4", "-o", "{out}"],
    "quantize --int8": ["quantize", "{base}", "--int8", "-o", "{out}"],
    "merge": ["merge", "--base", "{base}", "--adapter", "{adapter}", "-o", "{out}"],
    "merge --nf4": ["merge", "--base", "{base}", "--adapter", "{adapter}", "--nf4", "-o", "{out}"],
    "export --merge --int8": ["export", "--base", "{base}", "--adapter", "{adapter}", "--merge", "--int8", "-o", "{out}"],
    "export --int4": ["export", "{base}", "--int4", "-o", "{out}"],
    "export --int4 --no-verify": ["export", "{base}", "--int4", "--no-verify", "-o", "{out}"],
}
BUILDER = "genai builder int4"
BARS = {"ours_bytes": 2_000_000_000, "int4_bytes": 2_500_000_000, "int4_share_of_builder": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--layers", default=None, help="comma-separated; default: all and a quarter of them")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--only", default=None, help="run the rows whose name holds this")
    parser.add_argument("--builder", action="store_true", help="measure onnxruntime-genai's builder too")
    parser.add_argument("--peers-python", type=Path, help="python of an environment that holds onnxruntime-genai")
    options = parser.parse_args()
    peers = python_of("genai", options.peers_python) if options.builder else None
    full = SHAPES[options.shape]["num_hidden_layers"]
    depths = [int(text) for text in options.layers.split(",")] if options.layers else [full // 4, full]
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        for depth in depths:
            rows += rows_of(Path(text), options.shape, depth, [name for name in (*VERBS, BUILDER) if not options.only or options.only in name], peers)
    command = f"python benchmarks/memory.py {public_arguments()}"
    print(
        "wrote",
        write_result("memory", command, {"shape": options.shape, "bars": BARS, "bar_bytes": BARS["ours_bytes"], "rows": kept(rows, options.shape) + rows}),
    )


def rows_of(work: Path, shape: str, depth: int, names: list[str], peers: str | None) -> list[dict]:
    base, adapter, out = work / f"base-{depth}", work / f"adapter-{depth}", work / "out"
    write_base(base, shape, depth)
    write_tokenizer(base, SHAPES[shape]["vocab_size"])
    write_adapter(adapter, base, 16)
    rows = []
    for name in names:
        if name == BUILDER:
            if peers is None:
                continue
            arguments = ["-m", base, "-o", out, "-p", "int4", "-e", "cpu", "-c", work / "cache"]
            room = int(0.85 * machine()["memory_bytes"])
            found = measure("onnxruntime_genai.models.builder", arguments, python=peers, cwd=work, limit_bytes=room)
            if found["returncode"] and (found["peak_bytes"] or 0) < room / 2:
                raise SystemExit(f"the builder failed, and not for lack of memory:\n{found['stderr']}")
        else:
            found = measure("qlora_tools.cli", [word.format(base=base, adapter=adapter, out=out) for word in VERBS[name]] + ["-q"], cwd=work)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else None
        rows.append(
            {
                "verb": name,
                "layers": depth,
                "output_bytes": size,
                **found,
                "stderr": re.sub(r"/\S*/", "", found["stderr"][-300:]) if found["returncode"] else "",
            }
        )
        said = f"exit {found['returncode']} {rows[-1]['stderr'][-200:]}"
        print(f"{name:<28} {depth:>3} layers  {found['wall_s']:7.1f} s  peak {(found['peak_bytes'] or 0) / 1e9:5.2f} GB  {said}", flush=True)
        for folder in (out, work / "cache"):
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    return rows


def kept(rows: list[dict], shape: str) -> list[dict]:
    """Rows of the result on disk that were not measured now."""
    path = RESULTS / "memory.json"
    before = json.loads(path.read_text()) if path.exists() else {"shape": None, "rows": []}
    now = {(row["verb"], row["layers"]) for row in rows}
    return [row for row in before["rows"] if (row["verb"], row["layers"]) not in now] if before["shape"] == shape else []


if __name__ == "__main__":
    main()
