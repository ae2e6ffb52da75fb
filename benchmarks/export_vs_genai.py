"""Export Llamas of three sizes for the CPU and run what comes out: `qlt export` beside `onnxruntime_genai.models.builder`.

    python benchmarks/export_vs_genai.py --model DIR [--peers-python PATH] [--shapes 350m,1b] [--pairs 3] [--threads 1]

Sizes: ``--model`` (a real checkpoint, if given; repeatable) and random ones of ``--shapes`` from ``synthetic.py`` (bf16; 1b with tied embeddings, as
models of that size have them, the others untied unless ``--tied``). Export: the two tools run in turn, each a fresh process on the same files, without
verification on either side; memory is the process's VmHWM; ``--pairs`` counts the runs of each tool on the first shape, the other sizes are exported once.
Graphs: both int8 and both int4 graphs run in this process's onnxruntime with the same number of threads, in turn; logits of all 128 positions are computed by
both (our own runtime asks for the last position only, given as ``prefill_last_logits``), then single steps after 128 positions on a shared buffer.
Quality: KL of each graph against the builder-independent fp32 export on the same tokens.

Without ``--peers-python`` onnxruntime-genai is installed into ``benchmarks/.peers/genai`` first. Bars: export 3 times faster in a third of the memory; prefill and
decode no slower at no more KL, in every cell. Writes ``benchmarks/results/export_vs_genai[_tied].json``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from graphs import all_rounds, graph_bytes, latency, noise_of, open_ours, quality, times_faster, tokens_of
from measured import export_summary, measure, median, public_arguments, ratio, write_result
from peers import python_of, versions_of
from synthetic import SHAPES, write_base, write_tokenizer

BARS = {"export_times_faster": 3.0, "export_peak_share": 1 / 3, "prefill_times_faster": 1.0, "decode_times_faster": 1.0, "kl_share": 1.0}
PRECISIONS = ("int8", "int4")
TIED = ("1b",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, help="python of an environment that holds onnxruntime-genai")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a real checkpoint, one more size")
    parser.add_argument("--shapes", default="350m,1b", help="random models, the first of which is exported --pairs times")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--pairs", type=int, default=3, help="export runs of each tool and precision")
    parser.add_argument("--rounds", type=int, default=24, help="prefill runs of each graph")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    peers = python_of("genai", options.peers_python)
    sizes = {}
    for shape in filter(None, options.shapes.split(",")):
        with tempfile.TemporaryDirectory(dir=options.work) as text:
            model = Path(text) / "model"
            write_base(model, shape, tied=options.tied or shape in TIED)
            write_tokenizer(model, SHAPES[shape]["vocab_size"])
            sizes[shape] = one_size(Path(text), model, peers, options, pairs=1 if sizes else options.pairs, random=True)
    for given in options.model:
        with tempfile.TemporaryDirectory(dir=options.work) as text:
            sizes[given.name] = one_size(Path(text), given.resolve(), peers, options, pairs=1, random=False)
    result = {"sizes": sizes, "bars": BARS, "threads": options.threads, "peer": versions_of(peers, "onnxruntime-genai", "onnxruntime", "torch", "transformers")}
    result["verdict"] = [line for size, found in sizes.items() for line in verdict(size, found)]
    for line in result["verdict"]:
        print(line)
    print("wrote", write_result(f"export_vs_genai{'_tied' if options.tied else ''}", f"python benchmarks/export_vs_genai.py {public_arguments()}", result))


def one_size(work: Path, model: Path, peers: str, options: argparse.Namespace, *, pairs: int, random: bool) -> dict:
    exports = {precision: [export_pair(work, model, precision, peers, turn % 2 == 1) for turn in range(pairs)] for precision in PRECISIONS}
    export_ours(work, model, "fp32")
    shutil.rmtree(work / "cache", ignore_errors=True)
    ids = tokens_of(model, random=random)
    graphs = {precision: graph_pair(work, precision, ids, options) for precision in PRECISIONS}
    return {"exports": {precision: export_summary(runs) for precision, runs in exports.items()}, "graphs": graphs}


def export_ours(work: Path, model: Path, scheme: str) -> dict:
    return measure("qlora_tools.cli", ["export", model, f"--{scheme}", "-o", work / f"ours-{scheme}", "--no-verify", "--force", "-q"], cwd=work)


def export_theirs(work: Path, model: Path, precision: str, peers: str) -> dict:
    arguments = ["-m", model, "-o", work / f"theirs-{precision}", "-p", precision, "-e", "cpu", "-c", work / "cache"]
    return measure("onnxruntime_genai.models.builder", arguments, python=peers, cwd=work)


def export_pair(work: Path, model: Path, precision: str, peers: str, swapped: bool) -> dict:
    runs = {}
    for tool in ("theirs", "ours") if swapped else ("ours", "theirs"):
        runs[tool] = export_ours(work, model, precision) if tool == "ours" else export_theirs(work, model, precision, peers)
        if runs[tool]["returncode"]:
            raise SystemExit(f"{tool} {precision} failed:\n{runs[tool]['stderr']}")
        print(f"export {precision} {tool}: {runs[tool]['wall_s']:.1f} s, {runs[tool]['peak_bytes'] / 1e6:.0f} MB", flush=True)
    return runs


def graph_pair(work: Path, precision: str, ids, options: argparse.Namespace) -> dict:
    """Latency and quality of both graphs; ratios pair neighbours."""
    folders = {tool: work / f"{tool}-{precision}" for tool in ("ours", "theirs")}
    openers = {tool: lambda folder=folder: open_ours(folder, options.threads) for tool, folder in folders.items()}
    sizes = {tool: graph_bytes(folder) for tool, folder in folders.items()}
    times = latency(openers, ids, options.rounds, sum(sizes.values()))
    judged = quality(openers, lambda: open_ours(work / "ours-fp32", options.threads), ids)
    return {
        **{phase: {tool: median(all_rounds(values)) for tool, values in tools.items()} for phase, tools in times.items()},
        **{f"{phase.removesuffix('_ms')}_times_faster": times_faster(tools["theirs"], tools["ours"]) for phase, tools in times.items()},
        "against_itself": noise_of(times, "ours"),
        "loads": times,
        "graph_bytes": sizes,
        "kl_mean": {tool: found["kl_mean"] for tool, found in judged.items()},
        "kl_share": ratio(judged["ours"]["kl_windows"], judged["theirs"]["kl_windows"]),
        "top1": {tool: found["top1"] for tool, found in judged.items()},
    }


def verdict(size: str, result: dict) -> list[str]:
    lines = []
    for precision, found in result["exports"].items():
        faster, share = found["times_faster"]["median"], found["peak_share"]
        bars = f"(bars {BARS['export_times_faster']}, {BARS['export_peak_share']:.2f})"
        lines.append(f"{size} export {precision}: {faster:.1f} times faster, peak {share:.2f} of theirs {bars}")
    for precision, found in result["graphs"].items():
        prefill, last, decode = (found[f"{phase}_times_faster"]["median"] for phase in ("prefill", "prefill_last_logits", "decode"))
        divergence = found["kl_share"]["median"]
        lines.append(
            f"{size} {precision} graph: prefill {prefill:.2f}x ({last:.2f}x with last logits only), decode {decode:.2f}x, KL {divergence:.2f} of theirs"
        )
    return lines


if __name__ == "__main__":
    main()
