"""The tables of README.md and benchmarks/README.md, generated from the committed results so that text and numbers cannot drift apart.

python benchmarks/tables.py            # rewrite both between their markers
python benchmarks/tables.py --check    # exit 1 if one would change

What is claimed is ``claims.py``'s, whether it is held ``judging.py``'s. :func:`measured_files` lists every result file with the table that shows it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from claims import AT_ITS_LIMIT, EXTRACT_KL, MERGE_BARS, NF4_KL_SHARE, REFINE_BARS, RESULTS, everything, gptq_room_bytes, headline, result, sizes
from judging import HEADS, NOT_MEASURED, interval, mb, tally

ROOT = Path(__file__).resolve().parents[1]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "|".join(["---", *["---:"] * (len(heads) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def peers() -> str:
    """One row per claim against another tool at one size, with its bar."""
    return table(HEADS, [claim.cells for claim in headline()])


def side_by_side() -> str:
    """Every claim at every size, and how many hold."""
    found = everything()
    return f"{tally(found)}.\n\n{table(HEADS, [claim.cells for claim in found])}"


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
    return table(heads, rows) if rows else NOT_MEASURED


def against_builder(item: dict[str, Any] | None) -> str:
    if item is None:
        return NOT_MEASURED
    prefill, decode = (item[f"{phase}_times_faster"]["median"] for phase in ("prefill", "decode"))
    return f"{prefill:.2f}, {decode:.2f}, {item['kl_mean']['theirs']:.1e} to {item['kl_mean']['ours']:.1e}"


def against_optimum(found: dict[str, Any], pair: str) -> str:
    if "failed" in found:
        return "Optimum failed"
    item = found.get("cells", {}).get(pair)
    if item is None:
        return NOT_MEASURED
    prefill, decode = (item[f"{phase}_times_faster"]["median"] for phase in ("prefill", "decode"))
    divergence = "" if pair.endswith("fp32") else f", {item['their_kl']:.1e} to {item['kl']:.1e}"
    return f"{prefill:.2f}, {decode:.2f}{divergence}"


def opened() -> str:
    """Which exports other programs opened as they are, and whether they said the same."""
    found = result("open_elsewhere")
    if not found:
        return NOT_MEASURED
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
    words = {"own": "in-domain text", "own, by block": "in-domain text, `--by-block`", "self": "its own text", "foreign": "foreign text"}
    for pair, bars in REFINE_BARS.items():
        if not (found := result(f"refine_{pair}")):
            continue
        plain, *rows = found["rows"]
        for row in rows:
            what = f"{pair}, r={found['rank']} on NF4, `--refine {found['steps']}` on {words[row['text']]}, {row['seconds']:.0f} s: gain kept"
            yield [what, f"{share(plain['gain'])} (SVD)", share(row["gain"]), f">= {100 * bars[row['text']]:.0f} %" if row["text"] in bars else ""]


def weighted() -> Iterator[list[str]]:
    if found := result("extract_weighted"):
        rows = found["bases"]["bf16"]
        low, high = rows["fisher, spread, plain factors"]["kl"]["ci95"]
        ours = f"{rows['fisher, spread, plain factors']['kl']['value']:.5f} [{low:.5f}, {high:.5f}]"
        yield [
            f"extract, r={found['rank']}, equal parameters, `--weight fisher`: KL to tuned",
            f"{rows['plain']['kl']['value']:.5f} (SVD)",
            ours,
            f"<= {EXTRACT_KL}",
        ]
        ours = f"{rows['plain, spread']['kl']['value']:.5f}"
        yield ["… `--spread`, no text", "", ours, ""]


def merged() -> Iterator[list[str]]:
    if not (found := result("merge")):
        return
    rows = found["rows"]
    peft = f"{share(rows['NF4 base, PEFT merge_and_unload']['gain'])} (PEFT)"
    unmerged = share(rows["NF4 base, unmerged"]["gain"])
    asked = {
        "16-bit base, requant": (f"merge r={found['rank']} into NF4, original weights at hand (unmerged {unmerged}): gain kept", peft),
        "16-bit base, heal, tuned teaches": (f"… `--heal {found['heal_steps']} --teacher TUNED`", ""),
        "NF4 base, keep-grid, no text": ("… only the NF4 weights at hand, no text", peft),
        "NF4 base, keep-grid, calib in-domain": ("… the same with `--calib`, in-domain", ""),
        "NF4 base, heal, tuned teaches": (f"… the same, `--heal {found['heal_steps']} --teacher TUNED`", ""),
    }
    for name, (what, plain) in asked.items():
        wanted = f">= {100 * MERGE_BARS[name]:.0f} %" if name in MERGE_BARS else ""
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
                yield [f"NF4 {words}: KL to 16 bits on {name}", plain, f"{rows[setting]['ratio']:.2f} [{low:.2f}, {high:.2f}] of it", f"<= {NF4_KL_SHARE}"]
    if found := result("gptq_speed"):
        yield from speed(found)


def speed(found: dict[str, Any]) -> Iterator[list[str]]:
    seconds, peaks = found["seconds"], found["peak_bytes"]
    what = f"error feedback on NF4, 350 M, CPU, {100 * found['share_of_equal_codes']:.2f} % of the codes equal: time"
    yield [what, f"{seconds['loop']:.0f} s (plain GPTQ loop)", f"{seconds['ours']:.0f} s, {interval(found['faster'])} x faster", ">= 3"]
    yield ["… peak memory", mb(peaks["loop"]), mb(peaks["ours"]), f"<= {mb(gptq_room_bytes(found))}"]
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
        return NOT_MEASURED
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
    return f"{row['peak_bytes'] / 1e9:.2f} GB{AT_ITS_LIMIT if row['returncode'] else ''}"


def training_memory() -> str:
    """The estimate of a run's memory beside its peak."""
    found = result("train_memory")
    if not found:
        return NOT_MEASURED
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
    names += ("export_calibrated", "adapters_kept")
    found = [item["command"] for name in names if (item := result(name))]
    machine = next(item["machine"] for name in names if (item := result(name)))
    listed = "\n".join(f"* `{command}`" for command in found)
    return f"<details><summary>The commands that made these tables, on {machine['cores']} cores of an {machine['cpu']}</summary>\n\n{listed}\n\n</details>"


def chain() -> str:
    """The demo's own table and its remarks, as ``qlt demo`` wrote them."""
    path = RESULTS / "demo.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else NOT_MEASURED


def estimates() -> str:
    """`qlt estimate` of running a model, beside the peak of the process that then ran it."""
    if not (found := result("estimate")):
        return NOT_MEASURED
    rows = [
        [
            f"{row['shape']}{'' if row['tied'] else ', untied'}, {row['case']}{'' if row['fitted'] else ', unseen'}",
            f"{row['kind']} {row['setting']}",
            f"{row['estimate_bytes'] / 1e6:,.0f} MB",
            f"{row['peak_bytes'] / 1e6:,.0f} MB",
            f"{100 * row['error']:+.1f} %",
        ]
        for row in found["rows"]
    ]
    return table(["shape, batch x prompt + new", "setting", "estimated", "peak RSS", "error"], rows)


def published() -> str:
    """What others published about models of known shapes, beside our estimates; nothing here was measured by us."""
    if not (found := result("estimate_published")):
        return NOT_MEASURED
    rows = [
        [row["model"], row["about"], large(row["nbytes"]), "" if row["ours_bytes"] is None else large(row["ours_bytes"]), row["source"]]
        for row in sorted(found["rows"], key=lambda row: (row["model"], row["nbytes"]))
    ]
    return table(["model", "what", "published", "our estimate", "source"], rows)


def large(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else mb(nbytes)


def resnet() -> str:
    """int8 convolutions over a whole ResNet-50, beside what onnxruntime's own quantizer makes."""
    if not (found := result("convolutions")):
        return NOT_MEASURED
    rows = [
        [name, f"{row['median_ms']:.0f} ms", f"{row['speedup']:.2f}", f"{100 * row['error']:.1f} %"] for name, row in found["resnet50"]["threads 1"].items()
    ]
    return table(["ResNet-50, random weights, 1 thread", "one image", "x faster than fp32", "error of the logits"], rows)


#: Result file -> the blocks below that show it, or where else it is told.
SHOWN = {
    "adapters_kept": "peers, side-by-side",
    "convolutions": "resnet",
    "cpu_kernels": "no table: 100 rows that the choice of kernels rests on, see LOG.md",
    "cuda": "side-by-side",
    "estimate": "estimates, side-by-side",
    "estimate_cuda": "side-by-side",
    "estimate_published": "published",
    "export_calibrated": "kept, side-by-side",
    "export_vs_genai": "peers, cells, side-by-side",
    "export_vs_genai_tied": "no table: one size with tied embeddings, where the head is the embedding's table",
    "export_vs_olive": "side-by-side",
    "export_vs_optimum": "peers, cells, side-by-side",
    "extract_vs_mergekit": "peers, side-by-side",
    "extract_weighted": "kept",
    "gptq_speed": "kept, side-by-side",
    "memory": "memory, side-by-side",
    "merge": "kept, side-by-side",
    "nf4_search": "kept, side-by-side",
    "open_elsewhere": "opened",
    "quantize_calibrated": "kept, side-by-side",
    "quantize_speed": "peers, side-by-side",
    "repeatability": "side-by-side",
    "refine_shakespeare-heavy": "kept",
    "refine_shakespeare-light": "kept",
    "train_memory": "training-memory, side-by-side",
    "train_quality": "peers, side-by-side",
    "train_vs_peft": "peers, side-by-side",
    "train_vs_peft_cuda": "peers, side-by-side",
}


def measured_files() -> str:
    """Every result file, its command, and where it is shown."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        command = (result(path.stem) or {})["command"].removeprefix("python benchmarks/")
        rows.append([f"`{path.stem}`", f"`{command}`", SHOWN.get(path.stem, "**nowhere**")])
    return table(["result", "made by", "shown in"], rows).replace("---:", "---")


BLOCKS = {
    "side-by-side": side_by_side,
    "resnet": resnet,
    "estimates": estimates,
    "published": published,
    "results": measured_files,
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
    stale = False
    for path in (ROOT / "README.md", ROOT / "benchmarks/README.md"):
        before = path.read_text(encoding="utf-8")
        after = generated(before)
        stale |= before != after
        if not options.check:
            path.write_text(after, encoding="utf-8")
    if options.check:
        sys.exit(stale)


if __name__ == "__main__":
    main()
