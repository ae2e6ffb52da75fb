"""Export Llamas for the CPU with Olive's own command and run what comes out, beside `qlt export`: int4, int4 by GPTQ, and an adapter kept as input of the graph.

    python benchmarks/export_vs_olive.py --model DIR [--peers-python PATH] [--shapes 110m] [--pairs 3] [--rounds 20] [--threads 1]

Sizes: ``--shapes`` from ``synthetic.py`` and ``--model`` (a real checkpoint; repeatable), each with a random rank-16 adapter on every linear. Olive's graphs:

    olive int4      olive auto-opt --precision int4 --use_model_builder --use_ort_genai
    olive gptq      what `olive optimize --precision int4` plans (Gptq, then ModelBuilder), with `olive run`, calibrated on local text: its default would be downloaded.
                    Real models only, since weights drawn at random have nothing to calibrate
    olive kept      auto-opt as above with ``-a ADAPTER``: A and B become inputs, both quantized to 4 bits

Its other ways to a decoder's graph fail at the releases pinned in ``peers.py``: conversion by torch.onnx, either exporter (auto-opt without the builder), and ``optimize
--precision int8``, for which its builder pass has no name. So its int8 is missing here; the same builder's int8 is in ``export_vs_genai.py``.

Export: one fresh process per run on the same files, the two tools in turn, without verification on either side, Olive's without its cache. Graphs run in this process's
onnxruntime and through the same runtime, in turn (``graphs.py``). KL on 8 x 128 tokens: of graphs without an adapter to our fp32 graph, of kept ones to the fp32 graph of the merged model.
Olive's kept graph does not run without an adapter, so only ours has a row for it.

Bars: export 3 times faster; prefill and decode no slower, at no more KL; kept: KL to the unmerged model at most 1e-3 for int8, a step no slower than Olive's. Olive is installed
into ``benchmarks/.peers/olive`` unless ``--peers-python`` is given; its telemetry is switched off. Writes ``benchmarks/results/export_vs_olive.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from graphs import Graph, graph_bytes, latency, medians_of, noise_of, open_ours, quality, times_faster, tokens_of
from measured import export_summary, measure, public_arguments, ratio, write_result
from peers import python_of, versions_of
from synthetic import SHAPES, write_adapter, write_base, write_tokenizer

from qlora_tools.export.runtime import DecoderSession
from qlora_tools.export.runtime.adapters import Adapter

BARS = {"export_times_faster": 3.0, "prefill_times_faster": 1.0, "decode_times_faster": 1.0, "kl_share": 1.0, "kept_int8_kl": 1e-3}
_AUTO = [
    "auto-opt",
    "--device",
    "cpu",
    "--provider",
    "CPUExecutionProvider",
    "--use_ort_genai",
    "--use_model_builder",
    "--precision",
    "int4",
    "--disable_telemetry",
]
#: Ours -> the Olive graph that it is held against.
RIVALS = {"int4": "olive int4", "int8": "olive int4", "int4 calib": "olive gptq", "int4 kept": "olive kept", "int8 kept": "olive kept"}
_RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, help="python of an environment that holds olive-ai")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a real checkpoint, one more size")
    parser.add_argument("--shapes", default="110m", help="random models, comma-separated; empty for none")
    parser.add_argument("--pairs", type=int, default=3, help="export runs of each tool on the first size")
    parser.add_argument("--rounds", type=int, default=24, help="prefill runs of each graph")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    peers = python_of("olive", options.peers_python)
    os.environ |= {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    sizes: dict[str, dict[str, Any]] = {}
    for shape in filter(None, options.shapes.split(",")):
        with tempfile.TemporaryDirectory(dir=options.work) as text:
            model = Path(text) / "model"
            write_base(model, shape, tied=False)
            write_tokenizer(model, SHAPES[shape]["vocab_size"])
            sizes[shape] = one_size(Path(text), model, peers, options, pairs=1 if sizes else options.pairs, random=True)
    for given in options.model:
        with tempfile.TemporaryDirectory(dir=options.work) as text:
            sizes[given.name] = one_size(Path(text), given.resolve(), peers, options, pairs=1 if sizes else options.pairs, random=False)
    result: dict[str, Any] = {"sizes": sizes, "bars": BARS, "threads": options.threads, "rivals": RIVALS}
    result["peer"] = versions_of(peers, "olive-ai", "onnxruntime-genai", "onnxruntime", "torch", "transformers")
    result["verdict"] = [line for size, found in sizes.items() for line in verdict(size, found)]
    for line in result["verdict"]:
        print(line)
    print("wrote", write_result("export_vs_olive", f"python benchmarks/export_vs_olive.py {public_arguments()}", result))


def one_size(work: Path, model: Path, peers: str, options: argparse.Namespace, *, pairs: int, random: bool) -> dict[str, Any]:
    adapter = work / "adapter"
    write_adapter(adapter, model, _RANK)
    ours = {"int4": [], "int4 kept": ["--adapters", adapter]}
    theirs = {"olive int4": [*_AUTO, "-m", model], "olive kept": [*_AUTO, "-m", model, "-a", adapter]}
    if not random:
        ours["int4 calib"] = ["--calib", "builtin"]
        theirs["olive gptq"] = ["run", "--disable_telemetry", "--config", gptq_config(work, model)]
    exports = {
        mine: [
            export_pair(work, (mine, ["export", model, "--int4", *words]), (RIVALS[mine], theirs[RIVALS[mine]]), peers, turn % 2 == 1) for turn in range(pairs)
        ]
        for mine, words in ours.items()
    }
    for name, words in {"int8": ["--int8"], "int8 kept": ["--int8", "--adapters", adapter], "fp32": ["--fp32"]}.items():
        export_ours(work, name, ["export", model, *words])
    export_ours(work, "merged fp32", ["export", "--base", model, "--adapter", adapter, "--merge", "--fp32"])
    return {
        "exports": {name: export_summary(runs) for name, runs in exports.items()},
        **graphs_of(work, [*ours, "int8", "int8 kept", *theirs], model, options, random),
    }


def graphs_of(work: Path, names: list[str], model: Path, options: argparse.Namespace, random: bool) -> dict[str, Any]:
    """Rows of all graphs and our rows' ratios to their rivals'."""
    threads = options.threads
    openers = {name: opener(work / name, threads) for name in names}
    openers["int4 kept, off"] = lambda: open_ours(work / "int4 kept", threads)
    sizes = {name: graph_bytes(work / name.removesuffix(", off")) for name in openers}
    ids = tokens_of(model, random=random)
    times = latency(openers, ids, options.rounds, sum(sizes.values()))
    kept = {name: opener for name, opener in openers.items() if name.endswith("kept")}
    plain = {name: opener for name, opener in openers.items() if name not in kept}
    judged = quality(plain, lambda: open_ours(work / "fp32", threads), ids) | quality(kept, lambda: open_ours(work / "merged fp32", threads), ids)
    rows: dict[str, dict[str, Any]] = {
        name: {
            **medians_of(times, name),
            "against_itself": noise_of(times, name),
            "graph_bytes": sizes[name],
            **judged[name],
        }
        for name in openers
    }
    cells = {f"{mine} / {other}": cell(times, judged, mine, other) for mine, other in RIVALS.items() if mine in rows and other in rows}
    return {"graphs": rows, "cells": cells}


def cell(times: dict[str, Any], judged: dict[str, Any], mine: str, other: str) -> dict[str, Any]:
    """One of our graphs against one of theirs: ratios of neighbours."""
    faster = {f"{phase.removesuffix('_ms')}_times_faster": times_faster(tools[other], tools[mine]) for phase, tools in times.items()}
    share = ratio(judged[mine]["kl_windows"], judged[other]["kl_windows"])
    return {**faster, "kl": judged[mine]["kl_mean"], "their_kl": judged[other]["kl_mean"], "kl_share": share}


def opener(folder: Path, threads: int) -> Callable[[], Graph]:
    if folder.name == "olive kept":
        return lambda: OliveKept(folder, threads)
    if folder.name.endswith("kept"):
        return lambda: switched_on(folder, threads)
    return lambda: open_ours(folder, threads)


def switched_on(folder: Path, threads: int) -> Graph:
    session = DecoderSession(folder, threads=threads)
    session.use(next(iter(session.adapters)))
    return session


class OliveKept(DecoderSession):
    """Olive's graph with its own adapter file fed in. Its inputs are codes and scales, which our own reader refuses as what they are."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime as ort

        super().__init__(folder, threads=threads)
        path = next(folder.glob("*.onnx_adapter"))
        file = ort.AdapterFormat.read_adapter(str(path))
        self._adapter = Adapter(path, file.get_parameters(), file)


def gptq_config(work: Path, model: Path) -> Path:
    """The workflow that ``olive optimize --precision int4`` saves with ``--save_config_file``, with text of this machine: the last part of Python's language
    reference, of which the windows that graphs are judged on are the beginning."""
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    (work / "calibration.txt").write_text(text[200_000:], encoding="utf-8")
    data = {
        "name": "local_text",
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": "text", "data_files": str(work / "calibration.txt"), "split": "train"},
        "pre_process_data_config": {"strategy": "join", "add_special_tokens": False, "max_samples": 128, "max_seq_len": 512},
    }
    builder = {"type": "ModelBuilder", "precision": "int4", "int4_block_size": 32, "int4_accuracy_level": 4, "int4_op_types_to_quantize": ["MatMul", "Gather"]}
    workflow = {
        "input_model": {"type": "HfModel", "model_path": str(model), "load_kwargs": {"attn_implementation": "eager", "trust_remote_code": False}},
        "data_configs": [data],
        "passes": {"gptq": {"type": "Gptq", "bits": 4, "sym": True, "data_config": "local_text"}, "model_builder": builder},
        "systems": {"local_system": {"type": "LocalSystem", "accelerators": [{"execution_providers": ["CPUExecutionProvider"]}]}},
        "target": "local_system",
        "no_artifacts": True,
        "output_dir": str(work / "olive gptq"),
    }
    path = work / "gptq.json"
    path.write_text(json.dumps(workflow), encoding="utf-8")
    return path


def export_pair(work: Path, mine: tuple[str, list], other: tuple[str, list], peers: str, swapped: bool) -> dict[str, dict]:
    runs = {}
    for tool in ("theirs", "ours") if swapped else ("ours", "theirs"):
        runs[tool] = export_ours(work, *mine) if tool == "ours" else export_theirs(work, *other, peers)
        name = mine[0] if tool == "ours" else other[0]
        print(f"export {name}: {runs[tool]['wall_s']:.1f} s, {runs[tool]['peak_bytes'] / 1e6:.0f} MB", flush=True)
    return runs


def export_ours(work: Path, name: str, words: list) -> dict:
    return checked(name, work, measure("qlora_tools.cli", [*words, "-o", work / name, "--no-verify", "--force", "-q"], cwd=work))


def export_theirs(work: Path, name: str, words: list, peers: str) -> dict:
    """In an empty folder: Olive keeps its cache in the one it runs in, and takes a word like ``int4`` for a file that lies there under that name."""
    shutil.rmtree(work / name, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=work) as empty:
        dest = [] if words[0] == "run" else ["-o", work / name]
        return checked(name, work, measure("olive", [*words, *dest], python=peers, cwd=Path(empty)))


def checked(name: str, work: Path, run: dict) -> dict:
    """Olive ends with status 0 when it made nothing."""
    if run["returncode"] or not (work / name / "model.onnx").exists():
        raise SystemExit(f"{name} failed:\n{run['stderr']}")
    return run


def verdict(size: str, found: dict[str, Any]) -> list[str]:
    lines = [
        f"{size} export {name}: {item['times_faster']['median']:.1f} times faster (bar {BARS['export_times_faster']}), peak {item['peak_share']:.2f} of theirs"
        for name, item in found["exports"].items()
    ]
    for pair, item in found["cells"].items():
        prefill, decode = (item[f"{phase}_times_faster"]["median"] for phase in ("prefill", "decode"))
        lines.append(f"{size} {pair}: prefill {prefill:.2f}x, decode {decode:.2f}x, KL {item['kl']:.1e} against {item['their_kl']:.1e}")
    return lines


if __name__ == "__main__":
    main()
