"""Export a 350 M Llama for the CPU and run what comes out: `qlt export` beside `onnxruntime_genai.models.builder`.

    python benchmarks/export_vs_genai.py [--peers-python PATH] [--pairs 3] [--threads 1] [--model DIR] [--tied]

The model is made by ``synthetic.py`` (random weights, bf16, untied head unless ``--tied``); ``--model`` takes a real
one instead. Export: the two tools run in turn, each a fresh process on the same files, without verification on either side; memory
is the process's VmHWM. Graphs: both int8 and both int4 graphs run in this process's onnxruntime with the same number of
threads, in turn; logits of all 128 positions are computed by both (our own runtime asks for the last position only, given
as ``prefill_last_logits``), then single steps after 128 positions on a shared buffer. Quality: KL of each graph against the
builder-independent fp32 export on the same tokens.

Without ``--peers-python`` onnxruntime-genai is installed into ``benchmarks/.peers`` first. Bars: export 3 times faster in a
third of the memory; int8 prefill 1.5 times faster, decode no slower, KL no worse. Writes ``benchmarks/results/export_vs_genai[...].json``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from measured import measure, median, ratio, write_result
from synthetic import SHAPES, write_base, write_tokenizer

from qlora_tools.export.runtime import DecoderSession

PEERS = Path(__file__).parent / ".peers"
PEER_PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "onnxruntime==1.31.1", "onnxruntime-genai==0.18.0")
BARS = {"export_times_faster": 3.0, "export_peak_share": 1 / 3, "prefill_times_faster": 1.5, "decode_times_faster": 1.0, "kl_share": 1.0}
PRECISIONS = ("int8", "int4")
PROMPT, STEPS, WINDOWS = 128, 16, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, help="python of an environment that holds onnxruntime-genai")
    parser.add_argument("--model", type=Path, help="a real checkpoint instead of the random one")
    parser.add_argument("--shape", default="350m", choices=SHAPES)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--pairs", type=int, default=3, help="export runs of each tool and precision")
    parser.add_argument("--rounds", type=int, default=20, help="prefill runs of each graph")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    peers = str(options.peers_python or install_peers())
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        work = Path(text)
        model = options.model or work / "model"
        if not options.model:
            write_base(model, options.shape, tied=options.tied)
            write_tokenizer(model, SHAPES[options.shape]["vocab_size"])
        exports = {precision: [export_pair(work, model, precision, peers, turn % 2 == 1) for turn in range(options.pairs)] for precision in PRECISIONS}
        export_ours(work, model, "fp32")
        ids = tokens_of(model, WINDOWS)
        graphs = {precision: {**latency(work, precision, ids, options), **quality(work, precision, ids, options.threads)} for precision in PRECISIONS}
    result = {"exports": {precision: export_summary(runs) for precision, runs in exports.items()}, "graphs": graphs, "bars": BARS, "threads": options.threads}
    result["verdict"] = verdict(result)
    for line in result["verdict"]:
        print(line)
    name = f"export_vs_genai{'_' + options.model.name if options.model else '_tied' if options.tied else ''}"
    print("wrote", write_result(name, " ".join(["python", "benchmarks/export_vs_genai.py", *public_arguments()]), result))


def public_arguments() -> list[str]:
    """The command's arguments without paths of this machine."""
    return [Path(word).name if "/" in word else word for word in sys.argv[1:]]


def install_peers() -> Path:
    python = PEERS / "bin" / "python"
    if not python.exists():
        venv.create(PEERS, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEER_PACKAGES], check=True)
    return python


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


def export_summary(runs: list[dict]) -> dict:
    walls, peaks, work = ({tool: [run[tool][key] for run in runs] for tool in ("ours", "theirs")} for key in ("wall_s", "peak_bytes", "cpu_s"))
    return {
        "wall_s": walls,
        "cpu_s": work,
        "peak_bytes": peaks,
        "times_faster": ratio(walls["theirs"], walls["ours"]),
        "times_less_cpu": ratio(work["theirs"], work["ours"]),
        "peak_share": median(peaks["ours"]) / median(peaks["theirs"]),
    }


def tokens_of(model: Path, windows: int) -> np.ndarray:
    """[windows, PROMPT]: Python's language reference through a real model's tokenizer, else random ids."""
    import json

    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    random = np.random.default_rng(0).integers(3, vocab, (windows, PROMPT))
    if model.name == "model":
        return random
    import pydoc_data.topics

    from tokenizers import Tokenizer

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text[:200_000]).ids
    return np.asarray(ids[: windows * PROMPT], np.int64).reshape(windows, PROMPT)


def timed(action: Callable, *arguments: np.ndarray) -> float:
    began = time.perf_counter()
    action(*arguments)
    return 1e3 * (time.perf_counter() - began)


def latency(work: Path, precision: str, ids: np.ndarray, options: argparse.Namespace) -> dict:
    """Milliseconds of both graphs, run in turn; ratios pair neighbours, so that a busy moment hits both."""
    sessions = {tool: DecoderSession(work / f"{tool}-{precision}", threads=options.threads) for tool in ("ours", "theirs")}
    found: dict = {phase: {tool: [] for tool in sessions} for phase in ("prefill_ms", "prefill_last_logits_ms", "decode_ms")}
    for turn in range(options.rounds + 2):
        for tool, session in sessions.items() if turn % 2 else reversed(sessions.items()):
            rows = {"prefill_ms": timed(session.score, ids[:1]), "prefill_last_logits_ms": timed(session.prefill, ids[:1])}
            rows["decode_ms"] = median([timed(session.decode, ids[0, :1]) for _ in range(STEPS)])
            for phase, value in rows.items() if turn >= 2 else ():
                found[phase][tool].append(value)
    for session in sessions.values():
        session.close()
    medians = {phase: {tool: median(values) for tool, values in tools.items()} for phase, tools in found.items()}
    ratios = {f"{phase.removesuffix('_ms')}_times_faster": ratio(tools["theirs"], tools["ours"]) for phase, tools in found.items()}
    sizes = {tool: sum(path.stat().st_size for path in (work / f"{tool}-{precision}").glob("model.onnx*")) for tool in sessions}
    return {**medians, **ratios, "graph_bytes": sizes}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def quality(work: Path, precision: str, ids: np.ndarray, threads: int) -> dict:
    """Mean KL(fp32 || graph) in nats and top-1 agreement over all positions of all windows."""
    sessions = {name: DecoderSession(work / name, threads=threads) for name in ("ours-fp32", f"ours-{precision}", f"theirs-{precision}")}
    kl: dict = {"ours": [], "theirs": []}
    agree: dict = {"ours": [], "theirs": []}
    for window in ids:
        reference = log_softmax(sessions["ours-fp32"].score(window[None])[0])
        for tool in kl:
            found = log_softmax(sessions[f"{tool}-{precision}"].score(window[None])[0])
            kl[tool].append(float((np.exp(reference) * (reference - found)).sum(-1).mean()))
            agree[tool].append(float((reference.argmax(-1) == found.argmax(-1)).mean()))
    return {
        "kl_mean": {tool: float(np.mean(values)) for tool, values in kl.items()},
        "kl_share": ratio(kl["ours"], kl["theirs"]),
        "top1": {tool: float(np.mean(values)) for tool, values in agree.items()},
    }


def verdict(result: dict) -> list[str]:
    lines = []
    for precision, found in result["exports"].items():
        faster, share = found["times_faster"]["median"], found["peak_share"]
        lines.append(
            f"export {precision}: {faster:.1f} times faster (bar {BARS['export_times_faster']}), peak {share:.2f} of theirs (bar {BARS['export_peak_share']:.2f})"
        )
    for precision, found in result["graphs"].items():
        prefill, last, decode = (found[f"{phase}_times_faster"]["median"] for phase in ("prefill", "prefill_last_logits", "decode"))
        bar = f" (bars {BARS['prefill_times_faster']}, {BARS['decode_times_faster']}, {BARS['kl_share']})" if precision == "int8" else ""
        lines.append(
            f"{precision} graph: prefill {prefill:.2f}x ({last:.2f}x with last logits only), decode {decode:.2f}x, KL {found['kl_share']['median']:.2f} of theirs{bar}"
        )
    return lines


if __name__ == "__main__":
    main()
