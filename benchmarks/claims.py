"""Every figure against another tool, with its bar: read from the committed results. How a figure is judged is ``judging.py``'s."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from judging import NOT_MEASURED, Claim, at_most, both_phases, faster, half_width, interval, judge, less, mb, nearer
from measured import RESULTS

HEADLINE = "350m"
#: Beside the peak of a builder that needed more than this benchmark gives it.
AT_ITS_LIMIT = " reached, then it failed: held below 85 % of the machine"
#: A pair, and the text -> the share of the fine-tune's gain that distillation is to keep.
REFINE_BARS = {"shakespeare-light": {"own": 0.94, "self": 0.90}, "shakespeare-heavy": {"own": 0.80}}
#: KL to the tuned model that a weighted extraction of rank 16 is to stay below.
EXTRACT_KL = 0.0008
#: A merge into 4 bits -> the share of a fine-tune's gain that it is to keep.
MERGE_BARS = {
    "16-bit base, requant": 0.92,
    "16-bit base, heal, tuned teaches": 0.95,
    "NF4 base, keep-grid, no text": 0.85,
    "NF4 base, keep-grid, calib in-domain": 0.85,
}
#: KL to 16 bits that calibrated NF4 is to have at most, as a share of plain NF4's.
NF4_KL_SHARE = 0.6


def result(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def headline() -> list[Claim]:
    """The README's table: one model size, the bars that matter."""
    return [
        *extraction(),
        *quantization(),
        *training(),
        *builder_exports(HEADLINE),
        *optimum_export(HEADLINE),
        *builder_graphs(HEADLINE),
        *adapters_kept(),
        *list(builder_memory())[-2:],
    ]


def everything() -> list[Claim]:
    """All of it, losing rows and unmeasured ones included."""
    builder, optimum, olive = sizes("export_vs_genai"), sizes("export_vs_optimum"), sizes("export_vs_olive")
    found = [*extraction(), *quantization(), *training()]
    for size in builder:
        found += [*builder_exports(size), *builder_graphs(size)]
    for size in optimum:
        found += [*optimum_export(size), *optimum_graphs(size)]
    for size in olive or {HEADLINE: None}:
        found += olive_graphs(size)
    found += [*adapters_kept(), *builder_memory(), *distilled(), *calibrated(), *merged(), *gptq()]
    return [*found, *foretold(), *repeated(), *on_cuda()]


def sizes(name: str) -> dict[str, dict[str, Any]]:
    """Model -> what was found of it; results of one size alone are of the 350 M shape."""
    found = result(name) or {"sizes": {}}
    sized: dict[str, dict[str, Any]] = found.get("sizes", {HEADLINE: found})
    return sized


def words(size: str) -> str:
    """``350 M`` for ``350m``, a model's name as it is."""
    return f"{size[:-1]} {size[-1].upper()}" if size[:-1].isdigit() else size


# ---- one peer each ----


def extraction() -> Iterator[Claim]:
    if not (found := result("extract_vs_mergekit")):
        yield Claim("extract, 350 M, rank 16: time", theirs="mergekit", bar=">= 20", verdict=NOT_MEASURED)
        return
    walls = {name: median([run[name]["wall_s"] for run in found["runs"]]) for name in ("qlt", "mergekit")}
    peaks = {name: max(run[name]["peak_bytes"] for run in found["runs"]) for name in ("qlt", "mergekit")}
    above = found["error_above_optimum"]
    yield faster("extract, 350 M, rank 16: time", f"{walls['qlt']:.1f} s", f"{walls['mergekit']:.0f} s (mergekit)", found["times_faster"], 20)
    yield less("… peak memory", mb(peaks["qlt"]), mb(peaks["mergekit"]), found["peak_share"], 0.5)
    yield at_most("… error above the optimum", f"{above['qlt']:.1e}", f"{above['mergekit']:.1e}", above["qlt"], 1e-4)


def quantization() -> Iterator[Claim]:
    for row in (result("quantize_speed") or {"rows": []})["rows"]:
        if row["operation"] == "quantize" and row["shape"] in ([4096, 4096], [11008, 4096]) and row["threads"] == 1:
            found = {"median": row["ratio"], "ci95": row["ratio_ci95"]}
            what = f"NF4 + DQ, {row['shape'][0]} x {row['shape'][1]}, bytes equal, 1 thread"
            yield faster(what, f"{row['ours_ms']:.0f} ms", f"{row['theirs_ms']:.0f} ms (bitsandbytes)", found, 10)


def training() -> Iterator[Claim]:
    for name, place, speed, memory in (("train_vs_peft", "CPU", 1.5, 0.8), ("train_vs_peft_cuda", "CUDA", 1.4, 0.7)):
        if not (found := result(name)):
            yield Claim(f"train on NF4, {place}: tokens/s", theirs="PEFT + Trainer", bar=f">= {speed}", verdict=NOT_MEASURED)
            continue
        speeds, peaks = ({side: median([run[side][key] for run in found["runs"]]) for side in found["runs"][0]} for key in ("tokens_per_s", "peak_bytes"))
        for side, item in found["against"].items():
            peer, first = side.replace("peft", "PEFT + Trainer"), side == "peft"
            what = (
                f"train on NF4, {found['shape']}, {found['batch']} x {found['length']}, {place}: tokens/s"
                if first
                else "… the same, peer without checkpointing"
            )
            yield faster(what, f"{speeds['qlt']:,.0f}", f"{speeds[side]:,.0f} ({peer})", item["times_faster"], speed if first else None)
            yield less("… peak memory", mb(peaks["qlt"]), mb(peaks[side]), item["peak_share"], memory if first else None)
    if found := result("train_quality"):
        perplexity = found["perplexity"]
        ours, full = min(perplexity["lora"].values()), min(perplexity["full"].values())
        what = f"LoRA r={found['rank']} on NF4, {found['steps']} steps: perplexity (base {perplexity['base']:.0f})"
        verdict = judge(found["gain_kept"], 0.95, least=True)
        yield Claim(what, f"{ours:.1f}", f"{full:.1f} (full fine-tune)", f"{100 * found['gain_kept']:.1f} % of the gain", ">= 95 %", verdict)


def exported(what: str, item: Mapping[str, Any], peer: str, speed: float | None, memory: float | None) -> Iterator[Claim]:
    """Time and peak of an export."""
    ours, theirs = (median(item["wall_s"][side]) for side in ("ours", "theirs"))
    yield faster(f"export {what}: time", f"{ours:.1f} s", f"{theirs:.1f} s ({peer})", item["times_faster"], speed)
    ours, theirs = (median(item["peak_bytes"][side]) for side in ("ours", "theirs"))
    yield less("… peak memory", mb(ours), mb(theirs), item["peak_share"], memory)


def builder_exports(size: str) -> Iterator[Claim]:
    for scheme, item in sizes("export_vs_genai").get(size, {"exports": {}})["exports"].items():
        yield from exported(f"{scheme}, {words(size)}", item, "genai builder", *((3, 0.33) if size == HEADLINE else (None, None)))


def builder_graphs(size: str) -> Iterator[Claim]:
    for scheme, item in sizes("export_vs_genai").get(size, {"graphs": {}})["graphs"].items():
        prefill, decode, divergence, noise = item["prefill_ms"], item["decode_ms"], item["kl_mean"], item.get("against_itself", {})
        bar = 1.5 if scheme == "int8" and size == HEADLINE else 1.0
        what = f"{scheme} graph, {words(size)}: prefill of 128 tokens"
        theirs = f"{prefill['theirs']:.3g} ms (genai builder)"
        yield faster(what, f"{prefill['ours']:.3g} ms", theirs, item["prefill_times_faster"], bar, half_width(noise, "prefill_ms"))
        yield faster(
            "… decode step", f"{decode['ours']:.3g} ms", f"{decode['theirs']:.3g} ms", item["decode_times_faster"], 1.0, half_width(noise, "decode_ms")
        )
        yield nearer("… KL to fp32", divergence["ours"], divergence["theirs"], item["kl_share"])


def optimum_export(size: str) -> Iterator[Claim]:
    if item := sizes("export_vs_optimum").get(size, {}).get("export"):
        yield from exported(f"fp32, {words(size)}", item, "Optimum", 2 if size == HEADLINE else None, None)


def optimum_graphs(size: str) -> Iterator[Claim]:
    """Our quantized graphs against both of Optimum's; the one of w8a8 is held against dynamic int8, which rounds activations as it does."""
    found = sizes("export_vs_optimum").get(size, {})
    if "failed" in found:
        yield Claim(f"graphs, {words(size)}", theirs="Optimum failed", verdict=NOT_MEASURED)
    for pair, item in found.get("cells", {}).items():
        mine, theirs = (name.split(maxsplit=1)[1] for name in pair.split(" / "))
        if mine == "fp32":
            continue
        left, right = (found["graphs"][name] for name in pair.split(" / "))
        yield from both_phases(f"{mine} graph, {words(size)}: prefill", left, right, f"Optimum {'fp32' if theirs == 'fp32' else 'dynamic int8'}", item)
        if theirs == "int8" and mine != "int4":
            share = {"median": item["kl"] / item["their_kl"], "ci95": [item["kl"] / item["their_kl"]] * 2}
            yield nearer("… KL to fp32", item["kl"], item["their_kl"], share)


def olive_graphs(size: str) -> Iterator[Claim]:
    found = sizes("export_vs_olive").get(size)
    if not found:
        yield Claim("export and graphs", theirs="Olive", verdict=NOT_MEASURED)
        return
    for name, item in found["exports"].items():
        yield from exported(f"{name}, {words(size)}", item, "Olive", None, None)
    for pair, item in found["cells"].items():
        mine, theirs = pair.split(" / ")
        left, right = (found["graphs"][name] for name in (mine, theirs))
        yield from both_phases(f"{mine} graph, {words(size)}: prefill", left, right, theirs, item)
        if mine == "int8 kept":
            yield at_most("… KL to the unmerged model", f"{item['kl']:.1e}", f"{item['their_kl']:.1e}", item["kl"], 1e-3)
        else:
            found_kl = nearer("… KL to fp32, size of the graph", item["kl"], item["their_kl"], item["kl_share"])
            # Olive's int4 leaves the embedding in floats
            yield replace(found_kl, ours=f"{found_kl.ours}, {mb(left['graph_bytes'])}", theirs=f"{found_kl.theirs}, {mb(right['graph_bytes'])}")


def adapters_kept() -> Iterator[Claim]:
    if not (found := result("adapters_kept")):
        return
    theirs = next(name for name in found["graphs"] if name.startswith("builder"))
    for scheme in ("int8", "int4"):
        ours, other = found["graphs"][f"{scheme} kept, on"], found["graphs"][theirs]
        what = f"{scheme} graph, adapter kept as input, {found['shape']}: KL to the unmerged model"
        peer = f"{other['kl_mean']:.1e} (genai builder, int4)"
        yield at_most(what, f"{ours['kl_mean']:.1e}", peer, ours["kl_mean"], 1e-3) if scheme == "int8" else Claim(what, f"{ours['kl_mean']:.1e}", peer)
        ratio = found["decode_times_faster"][f"{scheme} kept, on / {theirs}"]
        noise = half_width(ours.get("against_itself", {}), "decode_ms")
        yield faster("… decode step", f"{ours['decode_ms']:.1f} ms", f"{other['decode_ms']:.1f} ms", ratio, 1.0, noise)


def builder_memory() -> Iterator[Claim]:
    """Peak of an int4 export of the 3 B shape: in itself, and as a share of the builder's at the same depth."""
    found = result("memory") or {"rows": [], "shape": "3b"}
    rows = {(row["verb"], row["layers"]): row for row in found["rows"]}
    depths = sorted({layers for _, layers in rows})
    for depth in depths or [28]:
        ours, theirs = rows.get(("export --int4", depth)), rows.get(("genai builder int4", depth))
        what = f"export int4, {words(found['shape'])} shape, {depth} layers: peak RSS"
        if ours is None:
            yield Claim(what, bar="< 2.5 GB", verdict=NOT_MEASURED)
            continue
        told = f"{ours['peak_bytes'] / 1e9:.2f} GB"
        yield Claim(what, told, bar="< 2.5 GB", verdict="held" if ours["peak_bytes"] < 2.5e9 else "missed")
        if theirs is None or theirs["peak_bytes"] is None:
            yield Claim("… beside the builder", told, "genai builder", bar="<= 0.2", verdict=NOT_MEASURED)
            continue
        died = theirs["returncode"] != 0  # its peak is then what it had reached, so the share can only be less
        peer = f"{theirs['peak_bytes'] / 1e9:.2f} GB{AT_ITS_LIMIT if died else ''} (genai builder)"
        yield less("… beside the builder", told, peer, ours["peak_bytes"] / theirs["peak_bytes"], 0.2)


def distilled() -> Iterator[Claim]:
    """What distillation gives back to an adapter, and weighted extraction at equal size; plain SVD is the other way."""
    for pair, bars in REFINE_BARS.items():
        plain, *rows = (result(f"refine_{pair}") or {"rows": [{}]})["rows"]
        for row in (row for row in rows if row["text"] in bars):
            what = f"`--refine`, {pair}, {'in-domain' if row['text'] == 'own' else 'self-made'} text: gain kept"
            verdict = judge(row["gain"], bars[row["text"]], least=True)
            yield Claim(what, f"{100 * row['gain']:.1f} %", f"{100 * plain['gain']:.1f} % (SVD)", "", f">= {100 * bars[row['text']]:.0f} %", verdict)
    if found := result("extract_weighted"):
        rows = found["bases"]["bf16"]
        ours, plain = (rows[name]["kl"] for name in ("fisher, spread, plain factors", "plain"))
        verdict = judge(ours["value"], EXTRACT_KL, least=False, ci95=ours["ci95"])
        low, high = ours["ci95"]
        what = f"extract, r={found['rank']}, `--weight fisher`: KL to tuned"
        yield Claim(what, f"{ours['value']:.5f} [{low:.5f}, {high:.5f}]", f"{plain['value']:.5f} (SVD)", "", f"<= {EXTRACT_KL}", verdict)


def calibrated() -> Iterator[Claim]:
    if found := result("nf4_search"):
        for form, bar in found["bars"].items():
            yield less(f"NF4 `--search {form}`: squared weight error", "", "bitsandbytes", found["linears"]["of_bitsandbytes"][form], bar)
    for setting, spoken in (("nf4-calib-builtin", "`--calib builtin`"), ("nf4-calib-self", "`--calib self`")):
        for text, rows in (result("quantize_calibrated") or {"kl": {}})["kl"].items():
            share = {"median": rows[setting]["ratio"], "ci95": rows[setting]["ratio_ci95"]}
            verdict = judge(share["median"], NF4_KL_SHARE, least=False, ci95=share["ci95"])
            what = f"NF4 {spoken}: KL to 16 bits on {text.removesuffix('.txt')}"
            yield Claim(
                what, f"{rows[setting]['kl']:.5f}", f"{rows['nf4']['kl']:.5f} (bitsandbytes)", f"{interval(share)} of theirs", f"<= {NF4_KL_SHARE}", verdict
            )
    found = result("export_calibrated") or {"shares": {}}
    for name, by_text in found["shares"].items():
        ours, _, theirs = name.partition(" / ")
        for text, share in by_text.items() if theirs.startswith("builder") and ours.startswith("int4 ") else ():
            verdict = judge(share["median"], found["bars"]["int4_kl_share"], least=False, ci95=share["ci95"])
            left, right = (found["graphs"][name]["texts"][text]["kl"] for name in (ours, theirs))
            what = f"int4 graph, `--calib {ours.removeprefix('int4 ')}`: KL to fp32 on {text.removesuffix('.txt')}"
            peer = f"{right:.4f} ({theirs.replace('builder int4', 'genai builder')})"
            yield Claim(what, f"{left:.4f}", peer, f"{interval(share)} of theirs", f"<= {found['bars']['int4_kl_share']}", verdict)


def merged() -> Iterator[Claim]:
    """What is left of a fine-tune's gain after a merge into 4 bits; PEFT's merge is the other tool, the bars are of our own gain."""
    if not (found := result("merge")):
        return
    rows = found["rows"]
    peft = f"{100 * rows['NF4 base, PEFT merge_and_unload']['gain']:.1f} % (PEFT)"
    spoken = ("merge into NF4, original weights at hand: gain kept", "… `--heal`", "… only the NF4 weights at hand, no text", "… the same with `--calib`")
    for (name, bar), what in zip(MERGE_BARS.items(), spoken, strict=True):
        row = rows[name]
        low, high = row["gain_ci95"]
        verdict = judge(row["gain"], bar, least=True, ci95=row["gain_ci95"])
        yield Claim(what, f"{100 * row['gain']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]", peft, "", f">= {100 * bar:.0f} %", verdict)


def gptq_room_bytes(found: Mapping[str, Any]) -> int:
    """What error feedback may take: the largest block in floats and 1 GB."""
    room: int = found["block_bytes"] + 1_000_000_000
    return room


def gptq() -> Iterator[Claim]:
    if found := result("gptq_speed"):
        seconds, peaks = found["seconds"], found["peak_bytes"]
        yield faster("error feedback on NF4, 350 M: time", f"{seconds['ours']:.0f} s", f"{seconds['loop']:.0f} s (plain GPTQ loop)", found["faster"], 3)
        room = gptq_room_bytes(found)
        verdict = "held" if peaks["ours"] <= room else "missed"
        yield Claim("… peak memory", mb(peaks["ours"]), mb(peaks["loop"]), "", f"<= {mb(room)}", verdict)


def foretold() -> Iterator[Claim]:
    """Estimates against the peaks that were then measured; the rows that nothing was fitted to count."""
    for name, what in (("train_memory", "memory of a training run"), ("estimate", "memory of running a model"), ("estimate_cuda", "the same on CUDA")):
        rows = [row for row in (result(name) or {"rows": []})["rows"] if not row.get("fitted", True)]
        if not rows:
            yield Claim(f"estimate, {what}: largest error", bar="<= 10 %", verdict=NOT_MEASURED)
            continue
        largest = max(abs(row["error"]) for row in rows)
        told = f"{100 * largest:.1f} % of {len(rows)} runs not fitted to"
        yield Claim(f"estimate, {what}: largest error", told, bar="<= 10 %", verdict=judge(largest, 0.1, least=False))


def repeated() -> Iterator[Claim]:
    """The same benchmark twice, and a setting beside its own copy."""
    if found := result("repeatability"):
        largest, ties, held = found["largest_difference"], found["copy_against_itself"], found["identities"]
        yield Claim("`qlt bench` twice: largest difference of a ratio", f"{100 * largest:.1f} %", bar="<= 5 %", verdict=judge(largest, 0.05, least=False))
        yield Claim(
            "… a setting beside its copy", f"{ties.count('tie')} of {len(ties)} are ties", bar="all", verdict="held" if set(ties) == {"tie"} else "missed"
        )
        yield Claim("… identities of memory", f"{held['held']} hold, {held['broken']} do not", bar="all", verdict="missed" if held["broken"] else "held")


#: Row of ours -> what it is held against, on a GPU, measured or not.
ON_CUDA = {
    "fp16": ("torch bf16", "builder fp16"),
    "bf16": ("torch bf16",),
    "int8": ("torch int8", "builder int8"),
    "int4": ("torch nf4", "builder int4"),
    "nf4": ("torch nf4",),
}
_FIGURES = {"prefill": "prefill", "decode": "decode step", "process_peak": "device memory"}


def on_cuda(shapes: Sequence[str] = ("1b", "8b")) -> Iterator[Claim]:
    """Every cell of the GPU table. A cell without a figure says so."""
    found = result("cuda") or {"parts": {}}
    ratios = {
        (part.split()[0], item["ours"], item["theirs"], item["figure"]): item
        for part, content in found["parts"].items()
        for item in content.get("ratios", ())
        if item["batch"] == 1
    }
    for shape in shapes:
        for ours, rival in ((ours, rival) for ours, rivals in ON_CUDA.items() for rival in rivals):
            what = f"CUDA, {words(shape)} shape, {ours} against {rival}"
            items = {spoken: ratios.get((shape, ours, rival, figure)) for figure, spoken in _FIGURES.items()}
            if not any(items.values()):
                yield Claim(f"{what}: {', '.join(items)}", bar=">= 1", verdict=NOT_MEASURED)
                continue
            for spoken, item in items.items():
                yield on_cuda_cell(f"{what}: {spoken}", item)


def on_cuda_cell(what: str, item: Mapping[str, Any] | None) -> Claim:
    if item is None:
        return Claim(what, bar=">= 1", verdict=NOT_MEASURED)
    value, ci95 = item["times_better"], item["ci95"]
    told = f"{value:.2f}" if ci95 is None else interval({"median": value, "ci95": ci95})
    return Claim(what, ratio=f"{told} x better", bar=">= 1", verdict=judge(value, 1.0, least=True, ci95=ci95))
