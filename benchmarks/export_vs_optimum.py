"""Export Llamas of three sizes and run them beside Optimum's graphs: `qlt export` against `optimum-cli export onnx` and its dynamic int8.

    python benchmarks/export_vs_optimum.py --model DIR [--peers-python PATH] [--shapes 350m,1b] [--pairs 3] [--threads 1]

Sizes as in ``export_vs_genai.py``. Export: fp32 in both, without verification on either side, each run a fresh process on the same files, in turn. Optimum's int8 is
``optimum-cli onnxruntime quantize --avx512_vnni --per_channel``, its time given beside.

Graphs: our fp32, int8 and int4 beside Optimum's fp32 and int8, in this process's onnxruntime, same threads, in turn: logits of all 128 positions, a prompt, and single steps
after it. Optimum's graphs are run with each step's presents bound as the next step's pasts, without a copy, which is what its own classes do at best. KL and top-1
agreement on 8 x 128 tokens against our fp32 graph (Optimum's fp32 graph is judged too: it must be 0).

Without ``--peers-python`` optimum-onnx is installed into ``benchmarks/.peers/optimum`` first; it needs transformers below 4.58. Bars: export 2 times faster; int8 and int4 prefill
and decode ahead of both of Optimum's graphs, int8 at no more KL. Writes ``benchmarks/results/export_vs_optimum.json``. A size at which Optimum dies is recorded as such.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from graphs import PlainGraph, graph_bytes, latency, medians_of, noise_of, open_ours, quality, times_faster, tokens_of
from measured import export_summary, measure, public_arguments, write_result
from peers import python_of, versions_of
from synthetic import SHAPES, write_base, write_tokenizer

BARS = {"export_times_faster": 2.0, "prefill_times_faster": 1.0, "decode_times_faster": 1.0, "int8_kl_share": 1.0}
OURS = ("fp32", "int8", "w8a8", "int4")
TIED = ("1b",)
_CLI = "optimum.commands.optimum_cli"
#: ``optimum-cli export onnx`` has no switch for its comparison with torch; the function behind it has.
_EXPORT = """import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], sys.argv[2], task="text-generation-with-past", do_validation=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, help="python of an environment that holds optimum-onnx")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a real checkpoint, one more size")
    parser.add_argument("--shapes", default="350m,1b", help="random models, the first of which is exported --pairs times")
    parser.add_argument("--pairs", type=int, default=3, help="export runs of each tool")
    parser.add_argument("--rounds", type=int, default=24, help="prefill runs of each graph")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    peers = python_of("optimum", options.peers_python)
    sizes = {}
    for shape in filter(None, options.shapes.split(",")):
        with tempfile.TemporaryDirectory(dir=options.work) as text:
            model = Path(text) / "model"
            write_base(model, shape, tied=shape in TIED)
            write_tokenizer(model, SHAPES[shape]["vocab_size"])
            sizes[shape] = one_size(Path(text), model, peers, options, pairs=1 if sizes else options.pairs, random=True)
    for given in options.model:
        with tempfile.TemporaryDirectory(dir=options.work) as text:
            sizes[given.name] = one_size(Path(text), given.resolve(), peers, options, pairs=1, random=False)
    result = {
        "sizes": sizes,
        "bars": BARS,
        "threads": options.threads,
        "peer": versions_of(peers, "optimum-onnx", "optimum", "onnxruntime", "torch", "transformers"),
    }
    result["verdict"] = [line for size, found in sizes.items() for line in verdict(size, found)]
    for line in result["verdict"]:
        print(line)
    print("wrote", write_result("export_vs_optimum", f"python benchmarks/export_vs_optimum.py {public_arguments()}", result))


def one_size(work: Path, model: Path, peers: str, options: argparse.Namespace, *, pairs: int, random: bool) -> dict[str, Any]:
    runs = [export_pair(work, model, peers, turn % 2 == 1) for turn in range(pairs)]
    failed = next((run["theirs"]["stderr"] for run in runs if run["theirs"]["returncode"]), None)
    if failed is not None:
        return {"failed": failed.strip().splitlines()[-1:], "exports": runs}
    found: dict[str, Any] = {"export": export_summary(runs), "quantize": quantize_theirs(work, peers)}
    for scheme in OURS[1:]:
        export_ours(work, model, scheme)
    ids = tokens_of(model, random=random)
    openers, sizes = graphs_of(work, options.threads)
    times = latency(openers, ids, options.rounds, sum(sizes.values()))
    judged = quality(openers, openers["ours fp32"], ids)
    found["graphs"] = {
        name: {
            **medians_of(times, name),
            "against_itself": noise_of(times, name),
            "graph_bytes": sizes[name],
            "kl_mean": judged[name]["kl_mean"],
            "top1": judged[name]["top1"],
        }
        for name in openers
    }
    pairs = [(mine, other) for mine in openers if mine.startswith("ours") for other in openers if other.startswith("optimum")]
    found["cells"] = {f"{mine} / {other}": cell(times, judged, mine, other) for mine, other in pairs}
    return found


def graphs_of(work: Path, threads: int) -> tuple[dict[str, Any], dict[str, int]]:
    ours = {f"ours {scheme}": work / f"ours-{scheme}" for scheme in OURS}
    openers: dict[str, Any] = {name: lambda folder=folder: open_ours(folder, threads) for name, folder in ours.items()}
    theirs = {"optimum fp32": (work / "theirs", "model.onnx"), "optimum int8": (work / "theirs-int8", "model_quantized.onnx")}
    openers |= {name: lambda folder=folder, file=file: PlainGraph(folder, threads=threads, file_name=file) for name, (folder, file) in theirs.items()}
    return openers, {name: graph_bytes(folder) for name, folder in ours.items()} | {name: graph_bytes(folder) for name, (folder, _) in theirs.items()}


def cell(times: dict, judged: dict, mine: str, other: str) -> dict[str, Any]:
    """One of our graphs against one of theirs: ratios of neighbours."""
    faster = {f"{phase.removesuffix('_ms')}_times_faster": times_faster(tools[other], tools[mine]) for phase, tools in times.items()}
    return {**faster, "kl": judged[mine]["kl_mean"], "their_kl": judged[other]["kl_mean"]}


def export_ours(work: Path, model: Path, scheme: str) -> dict:
    return checked(measure("qlora_tools.cli", ["export", model, f"--{scheme}", "-o", work / f"ours-{scheme}", "--no-verify", "--force", "-q"], cwd=work))


def export_theirs(work: Path, model: Path, peers: str) -> dict:
    shutil.rmtree(work / "theirs", ignore_errors=True)
    script = work / "optimum_export.py"
    script.write_text(_EXPORT)
    return measure(str(script), [model, work / "theirs"], python=peers, cwd=work)


def quantize_theirs(work: Path, peers: str) -> dict:
    arguments = ["onnxruntime", "quantize", "--onnx_model", work / "theirs", "--avx512_vnni", "--per_channel", "-o", work / "theirs-int8"]
    found = checked(measure(_CLI, arguments, python=peers, cwd=work))
    return {key: found[key] for key in ("wall_s", "cpu_s", "peak_bytes")}


def checked(run: dict) -> dict:
    if run["returncode"]:
        raise SystemExit(run["stderr"])
    return run


def export_pair(work: Path, model: Path, peers: str, swapped: bool) -> dict[str, dict]:
    runs = {}
    for tool in ("theirs", "ours") if swapped else ("ours", "theirs"):
        runs[tool] = export_ours(work, model, "fp32") if tool == "ours" else export_theirs(work, model, peers)
        peak = (runs[tool]["peak_bytes"] or 0) / 1e6
        print(f"export fp32 {tool}: {runs[tool]['wall_s']:.1f} s, {peak:.0f} MB, exit {runs[tool]['returncode']}", flush=True)
    return runs


def verdict(size: str, found: dict) -> list[str]:
    if "failed" in found:
        return [f"{size}: Optimum failed: {' '.join(found['failed'])}"]
    export = found["export"]
    lines = [
        f"{size} export fp32: {export['times_faster']['median']:.1f} times faster (bar {BARS['export_times_faster']}), peak {export['peak_share']:.2f} of theirs"
    ]
    for pair, item in found["cells"].items():
        prefill, last, decode = (item[f"{phase}_times_faster"]["median"] for phase in ("prefill", "prefill_last_logits", "decode"))
        lines.append(
            f"{size} {pair}: prefill {prefill:.2f}x (last logits {last:.2f}x), decode {decode:.2f}x, KL {item['kl']:.1e} against {item['their_kl']:.1e}"
        )
    return lines


if __name__ == "__main__":
    main()
