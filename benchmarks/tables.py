"""The README's tables, generated from the committed results so that text and numbers cannot drift apart.

python benchmarks/tables.py            # rewrite README.md between its markers
python benchmarks/tables.py --check    # exit 1 if it would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
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
    rows = [*extraction(), *quantization(), *training(), *exports(), *exports_beside_optimum(), *graphs(), *adapters_kept()]
    return table(["what", "qlt", "peer", "ratio [95 %]", "wanted"], rows)


def extraction() -> Iterator[list[str]]:
    if found := result("extract_vs_mergekit"):
        walls = {name: median([run[name]["wall_s"] for run in found["runs"]]) for name in ("qlt", "mergekit")}
        peaks = {name: max(run[name]["peak_bytes"] for run in found["runs"]) / 1e6 for name in ("qlt", "mergekit")}
        above = found["error_above_optimum"]
        yield [
            "extract, 350 M, rank 16: time",
            f"{walls['qlt']:.1f} s",
            f"{walls['mergekit']:.0f} s (mergekit)",
            f"{interval(found['times_faster'])} x faster",
            ">= 20",
        ]
        yield ["… peak memory", f"{peaks['qlt']:.0f} MB", f"{peaks['mergekit']:.0f} MB", f"{found['peak_share']:.2f} of theirs", "<= 0.5"]
        yield ["… error above the optimum", f"{above['qlt']:.1e}", f"{above['mergekit']:.1e}", "", "<= 1e-4"]


def quantization() -> Iterator[list[str]]:
    for row in (result("quantize_speed") or {"rows": []})["rows"]:
        if row["operation"] == "quantize" and row["shape"] in ([4096, 4096], [11008, 4096]) and row["threads"] == 1:
            low, high = row["ratio_ci95"]
            what = f"NF4 + DQ, {row['shape'][0]} x {row['shape'][1]}, bytes equal, 1 thread"
            yield [
                what,
                f"{row['ours_ms']:.0f} ms",
                f"{row['theirs_ms']:.0f} ms (bitsandbytes)",
                f"{row['ratio']:.1f} [{low:.1f}, {high:.1f}] x faster",
                ">= 10",
            ]


def training() -> Iterator[list[str]]:
    for name, place in (("train_vs_peft", "CPU"), ("train_vs_peft_cuda", "CUDA")):
        if found := result(name):
            bar = {"CPU": (">= 1.5", "<= 0.8"), "CUDA": (">= 1.4", "<= 0.7")}[place]
            speeds, peaks = ({side: median([run[side][key] for run in found["runs"]]) for side in found["runs"][0]} for key in ("tokens_per_s", "peak_bytes"))
            for side, item in found["against"].items():
                peer = side.replace("peft", "PEFT + Trainer")
                wanted = bar if side == "peft" else ("", "")
                what = (
                    f"train on NF4, {found['shape']}, {found['batch']} x {found['length']}, {place}: tokens/s"
                    if side == "peft"
                    else "… the same, peer without checkpointing"
                )
                yield [what, f"{speeds['qlt']:,.0f}", f"{speeds[side]:,.0f} ({peer})", f"{interval(item['times_faster'])} x faster", wanted[0]]
                yield ["… peak memory", f"{peaks['qlt'] / 1e6:,.0f} MB", f"{peaks[side] / 1e6:,.0f} MB", f"{item['peak_share']:.2f} of theirs", wanted[1]]
    if found := result("train_quality"):
        perplexity = found["perplexity"]
        ours, full = min(perplexity["lora"].values()), min(perplexity["full"].values())
        what = f"LoRA r={found['rank']} on NF4, {found['steps']} steps: perplexity (base {perplexity['base']:.0f})"
        yield [what, f"{ours:.1f}", f"{full:.1f} (full fine-tune)", f"{100 * found['gain_kept']:.1f} % of the gain", ">= 95 %"]


def sizes(name: str) -> dict[str, dict[str, Any]]:
    """Model -> what was found of it; results of one size alone are of the 350 M shape."""
    found = result(name) or {"sizes": {}}
    sized: dict[str, dict[str, Any]] = found.get("sizes", {"350m": found})
    return sized


def exports() -> Iterator[list[str]]:
    for scheme, item in sizes("export_vs_genai").get("350m", {"exports": {}})["exports"].items():
        ours, theirs = (median(item["wall_s"][side]) for side in ("ours", "theirs"))
        yield [f"export {scheme}, 350 M: time", f"{ours:.1f} s", f"{theirs:.1f} s (genai builder)", f"{interval(item['times_faster'])} x faster", ">= 3"]
        ours, theirs = (median(item["peak_bytes"][side]) / 1e6 for side in ("ours", "theirs"))
        yield ["… peak memory", f"{ours:.0f} MB", f"{theirs:.0f} MB", f"{item['peak_share']:.2f} of theirs", "<= 0.33"]


def exports_beside_optimum() -> Iterator[list[str]]:
    if item := sizes("export_vs_optimum").get("350m", {}).get("export"):
        ours, theirs = (median(item["wall_s"][side]) for side in ("ours", "theirs"))
        yield ["export fp32, 350 M: time", f"{ours:.1f} s", f"{theirs:.1f} s (Optimum)", f"{interval(item['times_faster'])} x faster", ">= 2"]
        ours, theirs = (median(item["peak_bytes"][side]) / 1e6 for side in ("ours", "theirs"))
        yield ["… peak memory", f"{ours:.0f} MB", f"{theirs:.0f} MB", f"{item['peak_share']:.2f} of theirs", ""]


def graphs() -> Iterator[list[str]]:
    for scheme, item in sizes("export_vs_genai").get("350m", {"graphs": {}})["graphs"].items():
        bar = (">= 1.5", ">= 1.0", "<= 1.0") if scheme == "int8" else ("", "", "")
        prefill, decode, divergence = item["prefill_ms"], item["decode_ms"], item["kl_mean"]
        what = f"{scheme} graph, 350 M: prefill of 128 tokens"
        yield [what, f"{prefill['ours']:.0f} ms", f"{prefill['theirs']:.0f} ms", f"{interval(item['prefill_times_faster'])} x faster", bar[0]]
        yield ["… decode step", f"{decode['ours']:.1f} ms", f"{decode['theirs']:.1f} ms", f"{interval(item['decode_times_faster'])} x faster", bar[1]]
        yield ["… KL to fp32", f"{divergence['ours']:.1e}", f"{divergence['theirs']:.1e}", f"{interval(item['kl_share'])} of theirs", bar[2]]


def adapters_kept() -> Iterator[list[str]]:
    if found := result("adapters_kept"):
        theirs = next(name for name in found["graphs"] if name.startswith("builder"))
        for scheme, bar in (("int8", "<= 1e-3"), ("int4", "")):
            ours, other = found["graphs"][f"{scheme} kept, on"], found["graphs"][theirs]
            what = f"{scheme} graph, adapter kept as input, {found['shape']}: KL to the unmerged model"
            yield [what, f"{ours['kl_mean']:.1e}", f"{other['kl_mean']:.1e} (genai builder, int4)", "", bar]
            faster = interval(found["decode_times_faster"][f"{scheme} kept, on / {theirs}"])
            yield ["… decode step", f"{ours['decode_ms']:.1f} ms", f"{other['decode_ms']:.1f} ms", f"{faster} x faster", ">= 1.0"]


def cells() -> str:
    """Our int8 and int4 graphs beside every graph of the others, by size: how many times faster, and the KL to fp32 of both."""
    builder, optimum = sizes("export_vs_genai"), sizes("export_vs_optimum")
    rows = []
    for size in dict.fromkeys((*builder, *optimum)):
        for scheme in ("int8", "w8a8", "int4"):
            beside = ["-" if scheme == "w8a8" else against_builder(builder.get(size, {}).get("graphs", {}).get(scheme))]
            beside += [against_optimum(optimum.get(size, {}), f"ours {scheme} / optimum {other}") for other in ("fp32", "int8")]
            rows.append([f"{size}, {scheme}", *beside])
    heads = ["prefill x, decode x, KL: theirs to ours", "genai builder, same bits", "Optimum fp32", "Optimum dynamic int8"]
    return table(heads, rows) if rows else "not measured"


def against_builder(item: dict[str, Any] | None) -> str:
    if item is None:
        return "not measured"
    prefill, decode = (item[f"{phase}_times_faster"]["median"] for phase in ("prefill", "decode"))
    return f"{prefill:.2f}, {decode:.2f}, {item['kl_mean']['theirs']:.1e} to {item['kl_mean']['ours']:.1e}"


def against_optimum(found: dict[str, Any], pair: str) -> str:
    if "failed" in found:
        return "Optimum failed"
    item = found.get("cells", {}).get(pair)
    if item is None:
        return "not measured"
    prefill, decode = (item[f"{phase}_times_faster"]["median"] for phase in ("prefill", "decode"))
    divergence = "" if pair.endswith("fp32") else f", {item['their_kl']:.1e} to {item['kl']:.1e}"
    return f"{prefill:.2f}, {decode:.2f}{divergence}"


def opened() -> str:
    """Which exports other programs opened as they are, and whether they said the same."""
    found = result("open_elsewhere")
    if not found:
        return "not measured"
    programs = {"onnxruntime-genai": "onnxruntime-genai", "Optimum": "ORTModel", "transformers.js": "transformers.js"}
    rows = []
    for model in dict.fromkeys(row["model"] for row in found["rows"]):
        here = [row for row in found["rows"] if row["model"] == model]
        rows.append([model, *(opened_in([row for row in here if row["program"].startswith(start)]) for start in programs.values())])
    return table(["model", *programs], rows)


def opened_in(rows: list[dict[str, Any]]) -> str:
    """The variants in one word where they agree."""
    verdicts = {row["scheme"]: verdict_of(row) for row in rows}
    if len(set(verdicts.values())) == 1:
        return f"{', '.join(verdicts)}: {next(iter(verdicts.values()))}"
    return ", ".join(f"{scheme}: {verdict}" for scheme, verdict in verdicts.items()) or "-"


def verdict_of(row: dict[str, Any]) -> str:
    if not row["opened"]:
        return "not tried" if row["reason"].startswith("not tried") else "no"
    if "error" in row:
        return f"error {row['error']:.0e}"
    return "same" if row["equal"] == row["tokens"] else f"{row['equal']} of {row['tokens']} the same"


def kept() -> str:
    """What calibration, distillation and merging keep, beside the plain way with the same bytes."""
    return table(["what", "plain", "qlt", "wanted"], [*distilled(), *weighted(), *merged(), *calibrated_weights(), *calibrated_graphs()])


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def distilled() -> Iterator[list[str]]:
    bars = {"shakespeare-light": {"own": ">= 94 %", "self": ">= 90 %"}, "shakespeare-heavy": {"own": ">= 80 %"}}
    words = {"own": "in-domain text", "own, by block": "in-domain text, `--by-block`", "self": "its own text", "foreign": "foreign text"}
    for pair in bars:
        if not (found := result(f"refine_{pair}")):
            continue
        plain, *rows = found["rows"]
        for row in rows:
            what = f"{pair}, r={found['rank']} on NF4, `--refine {found['steps']}` on {words[row['text']]}, {row['seconds']:.0f} s: gain kept"
            yield [what, f"{share(plain['gain'])} (SVD)", share(row["gain"]), bars[pair].get(row["text"], "")]


def weighted() -> Iterator[list[str]]:
    if found := result("extract_weighted"):
        rows = found["bases"]["bf16"]
        low, high = rows["fisher, spread, plain factors"]["kl"]["ci95"]
        ours = f"{rows['fisher, spread, plain factors']['kl']['value']:.5f} [{low:.5f}, {high:.5f}]"
        yield [f"extract, r={found['rank']}, equal parameters, `--weight fisher`: KL to tuned", f"{rows['plain']['kl']['value']:.5f} (SVD)", ours, "<= 0.0008"]
        ours = f"{rows['plain, spread']['kl']['value']:.5f}"
        yield ["… `--spread`, no text", "", ours, ""]


def merged() -> Iterator[list[str]]:
    if not (found := result("merge")):
        return
    rows = found["rows"]
    peft = f"{share(rows['NF4 base, PEFT merge_and_unload']['gain'])} (PEFT)"
    unmerged = share(rows["NF4 base, unmerged"]["gain"])
    asked = {
        "16-bit base, requant": (f"merge r={found['rank']} into NF4, original weights at hand (unmerged {unmerged}): gain kept", peft, ">= 92 %"),
        "16-bit base, heal, tuned teaches": (f"… `--heal {found['heal_steps']} --teacher TUNED`", "", ">= 95 %"),
        "NF4 base, keep-grid, no text": ("… only the NF4 weights at hand, no text", peft, ">= 85 %"),
        "NF4 base, keep-grid, calib in-domain": ("… the same with `--calib`, in-domain", "", ">= 85 %"),
        "NF4 base, heal, tuned teaches": (f"… the same, `--heal {found['heal_steps']} --teacher TUNED`", "", ""),
    }
    for name, (what, plain, wanted) in asked.items():
        low, high = rows[name]["gain_ci95"]
        yield [what, plain, f"{share(rows[name]['gain'])} [{100 * low:.1f}, {100 * high:.1f}]", wanted]


def calibrated_weights() -> Iterator[list[str]]:
    if found := result("nf4_search"):
        for form in ("positive", "signed"):
            ours = f"{found['linears']['of_bitsandbytes'][form]:.3f} of theirs"
            yield [f"NF4 `--search {form}`: squared weight error", "bitsandbytes", ours, f"<= {found['bars'][form]}"]
    if found := result("quantize_calibrated"):
        for setting, words in (("nf4-calib-builtin", "`--calib builtin`"), ("nf4-calib-self", "`--calib self`")):
            for text, rows in found["kl"].items():
                low, high = rows[setting]["ratio_ci95"]
                name = text.removesuffix(".txt")
                plain = f"{rows['nf4']['kl']:.5f} (bitsandbytes)"
                yield [f"NF4 {words}: KL to 16 bits on {name}", plain, f"{rows[setting]['ratio']:.2f} [{low:.2f}, {high:.2f}] of it", "<= 0.6"]
    if found := result("gptq_speed"):
        yield from speed(found)


def speed(found: dict[str, Any]) -> Iterator[list[str]]:
    seconds, peaks = found["seconds"], found["peak_bytes"]
    what = f"error feedback on NF4, 350 M, CPU, {100 * found['share_of_equal_codes']:.2f} % of the codes equal: time"
    yield [what, f"{seconds['loop']:.0f} s (plain GPTQ loop)", f"{seconds['ours']:.0f} s, {interval(found['faster'])} x faster", ">= 3"]
    room = found["block_bytes"] + 1_000_000_000
    yield ["… peak memory", f"{peaks['loop'] / 1e6:,.0f} MB", f"{peaks['ours'] / 1e6:,.0f} MB", f"<= {room / 1e6:,.0f} MB"]
    yield ["… all of `--calib`: candidates made and judged", "", f"{seconds['calib']:.0f} s, {peaks['calib'] / 1e6:,.0f} MB", ""]


def calibrated_graphs() -> Iterator[list[str]]:
    if not (found := result("export_calibrated")):
        return
    for name, ratio in found["shares"].items():
        ours, _, theirs = name.partition(" / ")
        if theirs.startswith("builder") and ours.startswith("int4 "):
            for text, item in ratio.items():
                plain = f"{found['graphs'][theirs]['texts'][text]['kl']:.4f} ({theirs.replace('builder int4', 'genai builder')})"
                what = f"int4 graph, `--calib {ours.removeprefix('int4 ')}`: KL to fp32 on {text.removesuffix('.txt')}"
                yield [what, plain, f"{interval(item)} of it", f"<= {found['bars']['int4_kl_share']}"]
    for text, item in found["graphs"]["int8"]["texts"].items():
        what = f"int8 graph, plain: KL to fp32, top-1 agreement, {text.removesuffix('.txt')}"
        yield [what, "", f"{item['kl']:.1e}, {share(item['top1'])}", "<= 1e-3, >= 98.5 %"]


def memory() -> str:
    """Peak memory by verb and depth."""
    found = result("memory")
    if not found:
        return "not measured"
    depths = sorted({row["layers"] for row in found["rows"]})
    verbs = list(dict.fromkeys(row["verb"] for row in found["rows"]))
    cells = {(row["verb"], row["layers"]): row for row in found["rows"]}
    names = {verb: verb if "builder" in verb else f"`qlt {verb}`" for verb in verbs}
    return table(
        [f"peak RSS, {found['shape']} shape", *(f"{depth} layers" for depth in depths)],
        [[names[verb], *(peak_of(cells.get((verb, depth))) for depth in depths)] for verb in verbs],
    )


def peak_of(row: dict[str, Any] | None) -> str:
    if row is None or row["peak_bytes"] is None:
        return "-"
    return f"{row['peak_bytes'] / 1e9:.2f} GB{' reached, then out of memory' if row['returncode'] else ''}"


def training_memory() -> str:
    """The estimate of a run's memory beside its peak."""
    found = result("train_memory")
    if not found:
        return "not measured"
    rows = [
        [
            f"{row['shape']} `{row['options']}`{'' if row.get('fitted', True) else ', unseen'}",
            f"{row['estimate_bytes'] / 1e6:,.0f} MB",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{100 * row['error']:+.1f} %",
        ]
        for row in found["rows"]
    ]
    return table(["`qlt train`, rank 16, all linears, CPU", "estimated", "peak RSS", "error"], rows)


def commands() -> str:
    """Where the rows come from."""
    names = (
        "extract_vs_mergekit",
        "quantize_speed",
        "train_vs_peft",
        "train_quality",
        "train_memory",
        "export_vs_genai",
        "export_vs_optimum",
        "open_elsewhere",
        "memory",
    )
    names += ("refine_shakespeare-light", "refine_shakespeare-heavy", "extract_weighted", "merge", "nf4_search", "quantize_calibrated", "gptq_speed")
    names += ("export_calibrated",)
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


BLOCKS = {
    "chain": chain,
    "peers": peers,
    "kept": kept,
    "cells": cells,
    "opened": opened,
    "memory": memory,
    "training-memory": training_memory,
    "commands": commands,
}


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
