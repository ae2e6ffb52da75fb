"""An adapter kept as input of the graph, chosen at run time: what it costs and whether it is exact, beside the merged graph and beside onnxruntime-genai's builder.

    python benchmarks/adapters_kept.py [--shape 350m] [--base DIR --adapter DIR] [--rank 16] [--peers-python PATH] [--rounds 20] [--threads 1]

A random base and a random rank-16 adapter on every linear (``synthetic.py``), or real ones. Graphs, all run in this process's onnxruntime, in turn: ours as int8 and int4 with the adapter
kept (on, and off), ours with it merged, and the builder's int4 with ``adapter_path``, which keeps A and B as constants and quantizes both to 4 bits. Divergence of each on
8 x 128 tokens from the unmerged model in full precision (the fp32 export of the merged one, which is the same function). With the adapter off that is how far the adapter moves
the model. Steps after 128 positions; ratios pair neighbours.

Bars: KL to the unmerged model at most 1e-3 for int8; a step with the adapter on no slower than the builder's. Writes ``benchmarks/results/adapters_kept.json``. About 5 minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from graphs import Graph, Times, graph_bytes, latency, medians_of, noise_of, open_ours, quality, times_faster, tokens_of
from measured import measure, public_arguments, write_result
from peers import python_of, versions_of
from synthetic import SHAPES, write_adapter, write_base, write_tokenizer

from qlora_tools import api
from qlora_tools.export.runtime import DecoderSession

SCHEMES = ("int8", "int4")
BUILDER = "builder int4, adapter in 4 bits"
BARS = {"int8_kl": 1e-3, "decode_times_faster": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="350m", choices=SHAPES)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peers-python", type=Path, help="python of an environment that holds onnxruntime-genai and peft")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    peers = python_of("genai", options.peers_python)
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        work = Path(text)
        base, adapter = options.base or work / "base", options.adapter or work / "adapter"
        if options.base is None:
            write_base(base, options.shape, tied=False)
            write_tokenizer(base, SHAPES[options.shape]["vocab_size"])
            write_adapter(adapter, base, options.rank)
        openers, folders = make(work, base.resolve(), adapter.resolve(), peers, options.threads)
        ids = tokens_of(base, random=options.base is None)
        sizes = {name: graph_bytes(folder) for name, folder in folders.items()}
        times = latency(openers, ids, options.rounds, sum(sizes.values()))
        judged = quality(openers, lambda: open_ours(work / "merged-fp32", options.threads), ids)
    rows = {name: row_of(name, times, judged, sizes[name]) for name in openers}
    pairs = {f"{name} / {BUILDER}": times_faster(times["decode_ms"][BUILDER], times["decode_ms"][name]) for name in openers if name != BUILDER}
    pairs |= {
        f"{scheme} kept, on / {scheme} merged": times_faster(times["decode_ms"][f"{scheme} merged"], times["decode_ms"][f"{scheme} kept, on"])
        for scheme in SCHEMES
    }
    for name, row in rows.items():
        print(
            f"{name:<34} prefill {row['prefill_ms']:8.1f} ms  step {row['decode_ms']:7.2f} ms  {row['graph_bytes']:>13,} bytes  KL {row['kl_mean']:.1e}  top-1 {row['top1']:.1%}"
        )
    for pair, found in pairs.items():
        print(f"step, {pair}: {found['median']:.2f} x faster {found['ci95']}")
    result = {
        "graphs": rows,
        "decode_times_faster": pairs,
        "bars": BARS,
        "threads": options.threads,
        "shape": options.shape if options.base is None else options.base.name,
    }
    result["peer"] = versions_of(peers, "onnxruntime-genai", "onnxruntime", "peft")
    print("wrote", write_result("adapters_kept", f"python benchmarks/adapters_kept.py {public_arguments()}", result))


def make(work: Path, base: Path, adapter: Path, peers: str, threads: int) -> tuple[dict[str, Callable[[], Graph]], dict[str, Path]]:
    """Name -> what opens the graph, and its folder."""
    api.export(base=base, adapters=[(adapter, 1.0)], scheme="fp32", device="cpu", verify=False, output=work / "merged-fp32")
    folders: dict[str, Path] = {}
    openers: dict[str, Callable[[], Graph]] = {}
    for scheme in SCHEMES:
        kept, merged = work / f"kept-{scheme}", work / f"merged-{scheme}"
        api.export(model=base, keep=[(adapter, 1.0)], scheme=scheme, device="cpu", verify=False, output=kept)
        api.export(base=base, adapters=[(adapter, 1.0)], scheme=scheme, device="cpu", verify=False, output=merged)
        folders |= {f"{scheme} kept, on": kept, f"{scheme} kept, off": kept, f"{scheme} merged": merged}
        openers[f"{scheme} kept, on"] = lambda kept=kept: switched_on(kept, threads)
        openers[f"{scheme} kept, off"] = lambda kept=kept: open_ours(kept, threads)
        openers[f"{scheme} merged"] = lambda merged=merged: open_ours(merged, threads)
    folders[BUILDER] = work / "theirs"
    arguments = ["-m", base, "-o", folders[BUILDER], "-p", "int4", "-e", "cpu", "-c", work / "cache", "--extra_options", f"adapter_path={adapter}"]
    done = measure("onnxruntime_genai.models.builder", arguments, python=peers, cwd=work)
    if done["returncode"]:
        raise SystemExit(f"builder failed:\n{done['stderr']}")
    openers[BUILDER] = lambda: open_ours(folders[BUILDER], threads)
    return openers, folders


def switched_on(folder: Path, threads: int) -> Graph:
    session = DecoderSession(folder, threads=threads)
    session.use(next(iter(session.adapters)))
    return session


def row_of(name: str, times: Times, judged: dict[str, dict[str, Any]], size: int) -> dict[str, Any]:
    return {
        **medians_of(times, name),
        "against_itself": noise_of(times, name),
        "graph_bytes": size,
        "kl_mean": judged[name]["kl_mean"],
        "top1": judged[name]["top1"],
    }


if __name__ == "__main__":
    main()
