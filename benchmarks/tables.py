"""The README's tables, generated from the committed results so that text and numbers cannot drift apart.

python benchmarks/tables.py            # rewrite README.md between its markers
python benchmarks/tables.py --check    # exit 1 if it would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"


def result(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---", *["---:"] * (len(heads) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def interval(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['median']:.2f} [{low:.2f}, {high:.2f}]" if found["median"] < 10 else f"{found['median']:.1f} [{low:.1f}, {high:.1f}]"


def peers() -> str:
    """One row per claim against another tool: what, ours, theirs, ratio, bar."""
    rows = []
    if found := result("extract_vs_mergekit"):
        walls = {name: [run[name]["wall_s"] for run in found["runs"]] for name in ("qlt", "mergekit")}
        peaks = {name: max(run[name]["peak_bytes"] for run in found["runs"]) / 1e6 for name in ("qlt", "mergekit")}
        rows.append(
            [
                "extract, 350 M, rank 16: time",
                f"{median(walls['qlt']):.1f} s",
                f"{median(walls['mergekit']):.0f} s (mergekit)",
                f"{interval(found['times_faster'])} x faster",
                ">= 20",
            ]
        )
        rows.append(["… peak memory", f"{peaks['qlt']:.0f} MB", f"{peaks['mergekit']:.0f} MB", f"{found['peak_share']:.2f} of theirs", "<= 0.5"])
        rows.append(
            ["… error above the optimum", f"{found['error_above_optimum']['qlt']:.1e}", f"{found['error_above_optimum']['mergekit']:.1e}", "", "<= 1e-4"]
        )
    if found := result("quantize_speed"):
        for row in found["rows"]:
            if row["operation"] == "quantize" and row["shape"] in ([4096, 4096], [11008, 4096]) and row["threads"] == 1:
                low, high = row["ratio_ci95"]
                rows.append(
                    [
                        f"NF4 + DQ, {row['shape'][0]} x {row['shape'][1]}, bytes equal, 1 thread",
                        f"{row['ours_ms']:.0f} ms",
                        f"{row['theirs_ms']:.0f} ms (bitsandbytes)",
                        f"{row['ratio']:.1f} [{low:.1f}, {high:.1f}] x faster",
                        ">= 10",
                    ]
                )
    if found := result("export_vs_genai"):
        for scheme, item in found["exports"].items():
            ours, theirs = (median(item["wall_s"][side]) for side in ("ours", "theirs"))
            rows.append(
                [f"export {scheme}, 350 M: time", f"{ours:.1f} s", f"{theirs:.1f} s (genai builder)", f"{interval(item['times_faster'])} x faster", ">= 3"]
            )
            ours, theirs = (median(item["peak_bytes"][side]) / 1e6 for side in ("ours", "theirs"))
            rows.append(["… peak memory", f"{ours:.0f} MB", f"{theirs:.0f} MB", f"{item['peak_share']:.2f} of theirs", "<= 0.33"])
        for scheme, item in found["graphs"].items():
            bar = {"prefill": ">= 1.5", "decode": ">= 1.0", "kl": "<= 1.0"} if scheme == "int8" else dict.fromkeys(("prefill", "decode", "kl"), "")
            rows.append(
                [
                    f"{scheme} graph, 350 M: prefill of 128 tokens",
                    f"{item['prefill_ms']['ours']:.0f} ms",
                    f"{item['prefill_ms']['theirs']:.0f} ms",
                    f"{interval(item['prefill_times_faster'])} x faster",
                    bar["prefill"],
                ]
            )
            rows.append(
                [
                    "… decode step",
                    f"{item['decode_ms']['ours']:.1f} ms",
                    f"{item['decode_ms']['theirs']:.1f} ms",
                    f"{interval(item['decode_times_faster'])} x faster",
                    bar["decode"],
                ]
            )
            rows.append(
                ["… KL to fp32", f"{item['kl_mean']['ours']:.1e}", f"{item['kl_mean']['theirs']:.1e}", f"{interval(item['kl_share'])} of theirs", bar["kl"]]
            )
    return table(["what", "qlt", "peer", "ratio [95 %]", "wanted"], rows)


def memory() -> str:
    """Peak memory by verb and depth."""
    found = result("memory")
    if not found:
        return "not measured"
    depths = sorted({row["layers"] for row in found["rows"]})
    verbs = list(dict.fromkeys(row["verb"] for row in found["rows"]))
    cells = {(row["verb"], row["layers"]): row for row in found["rows"]}
    return table(
        [f"peak RSS, {found['shape']} shape", *(f"{depth} layers" for depth in depths)],
        [[f"`qlt {verb}`", *(f"{cells[verb, depth]['peak_bytes'] / 1e9:.2f} GB" for depth in depths)] for verb in verbs],
    )


def commands() -> str:
    """Where the rows come from."""
    names = ("extract_vs_mergekit", "quantize_speed", "export_vs_genai", "memory")
    found = [item["command"] for name in names if (item := result(name))]
    machine = next(item["machine"] for name in names if (item := result(name)))
    return "Made by " + ", ".join(f"`{command}`" for command in found) + f" on {machine['cores']} cores of an {machine['cpu']}."


def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def chain() -> str:
    """The demo's own table, as ``qlt demo`` wrote it."""
    path = RESULTS / "demo.md"
    return path.read_text(encoding="utf-8").split("\n\n")[0] if path.exists() else "not measured"


BLOCKS = {"chain": chain, "peers": peers, "memory": memory, "commands": commands}


def generated(text: str) -> str:
    """``text`` with every ``<!-- name --> ... <!-- /name -->`` filled."""
    for name, block in BLOCKS.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda match, block=block: f"{match[1]}{block()}\n{match[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = generated(before)
    if options.check:
        sys.exit(before != after)
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
