"""What quantizing costs a trained language model: plain, with searched scales, and calibrated; NF4 and int8, on texts that nothing was learnt from.

    python benchmarks/quantize_calibrated.py --model MODEL --calib FILE [--calib self ...] --held-out FILE... [--windows 40] [--work DIR]

Every setting is written by ``qlt quantize`` and judged by KL(16 bits || decoded weights) per token over disjoint windows of 256 tokens, fp32
arithmetic, with 95 % intervals over windows; ratios are to plain NF4 (or int8) over the same windows. The calibration text's own held-out part
chooses between candidates; the texts named here judge. Bar: NF4 calibrated at most 0.6 of plain on each text. Also written: bytes, which must be the
same, and squared weight errors of the searches (bars: 0.88 positive, 0.86 signed). Writes ``benchmarks/results/quantize_calibrated.json``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measured import write_result

from qlora_tools import api
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.live.tokenizer import open_tokenizer, read_utf8
from qlora_tools.quality.intervals import mean_interval, ratio_interval
from qlora_tools.verbs.quantize_judge import WholeModel

CONTEXT = 256
BARS = {"kl": 0.6, "positive": 0.88, "signed": 0.86}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", action="append", required=True)
    parser.add_argument("--held-out", type=Path, action="append", required=True)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        made = {name: api.quantize(model=options.model, output=Path(folder, name), **setting) for name, setting in settings(options).items()}
        judged = {text.name: judge(options.model, made, windows(options.model, text, options.windows)) for text in options.held_out}
    rows = {name: row(made, name) for name in made}
    met = bars_met(rows, judged)
    calibs = " ".join(f"--calib {Path(calib).name}" for calib in options.calib)
    texts = " ".join(f"--held-out {text.name}" for text in options.held_out)
    command = f"python benchmarks/quantize_calibrated.py --model {options.model.name} {calibs} {texts} --windows {options.windows} --tokens {options.tokens}"
    write_result("quantize_calibrated", command, {"settings": rows, "kl": judged, "bars_met": met})
    for text, found in judged.items():
        for name, figures in found.items():
            print(f"{text:24s} {name:24s} KL {figures['kl']:.5f}  {figures['ratio']:.3f} of plain {figures['ratio_ci95']}")
    print(met)


def settings(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name -> keywords of ``api.quantize``; the first of each scheme is the plain one."""
    found: dict[str, dict[str, Any]] = {"nf4": {}, "nf4-search-positive": {"search": "positive"}, "nf4-search-signed": {"search": "signed"}}
    calibs = [{"calib": calib, "tokens": options.tokens, "context": CONTEXT} for calib in options.calib]
    found |= {f"nf4-calib-{Path(setting['calib']).stem}": setting for setting in calibs}
    found["nf4-calib-positive"] = {**calibs[0], "search": "positive"}
    return found | {"int8": {"scheme": "int8"}, "int8-calib": {**calibs[0], "scheme": "int8"}}


def windows(model: Path, text: Path, count: int) -> torch.Tensor:
    """i64 [N, L], evenly spaced over the text."""
    ids = open_tokenizer(model)(read_utf8(text), add_special_tokens=False, verbose=False)["input_ids"]
    whole_NL = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return whole_NL[torch.linspace(0, len(whole_NL) - 1, min(count, len(whole_NL))).round().long()]


def judge(model: Path, made: dict[str, Any], windows_NL: torch.Tensor) -> dict[str, dict[str, Any]]:
    pair, plain, found = WholeModel(open_checkpoint(model), windows_NL), {}, {}
    for name, result in made.items():
        stored = open_checkpoint(result.output)
        pair.put(stored.quantized, stored.read)
        measured = pair.divergence()
        plain.setdefault(result.scheme, measured.windows.kl)
        ratio = ratio_interval(measured.windows.kl, plain[result.scheme])
        kl = mean_interval(measured.windows.kl, measured.windows.tokens)
        found[name] = {
            "kl": kl.value, "kl_ci95": kl.bounds, "ratio": ratio.value, "ratio_ci95": ratio.bounds, "top1_agreement": measured.top1_agreement,
            "ppl_16bit": measured.ppl_reference, "ppl": measured.ppl_candidate,
        }  # fmt: skip
    return found


def row(made: dict[str, Any], name: str) -> dict[str, Any]:
    """Size and weight error of a setting; the latter squared, over that of the plain form."""
    result = made[name]
    plain = made[result.scheme]
    assert result.stored_bytes == plain.stored_bytes, name
    won: dict[str, int] = {}
    for layer in result.layers:
        won[layer.method] = won.get(layer.method, 0) + 1
    gain = math.exp(sum(math.log(layer.error_stored / layer.error_plain) for layer in result.layers) / len(result.layers)) if result.layers else None
    return {
        "stored_bytes": result.stored_bytes, "bits_per_weight": result.bits_per_weight, "weight_mse_ratio": (result.relative_error / plain.relative_error) ** 2,
        "stored_by": won, "output_error_ratio": gain,
    }  # fmt: skip


def bars_met(rows: dict[str, Any], judged: dict[str, Any]) -> dict[str, bool]:
    worst = max(figures["ratio"] for found in judged.values() for name, figures in found.items() if name.startswith("nf4-calib"))
    met = {f"search {form}": rows[f"nf4-search-{form}"]["weight_mse_ratio"] <= BARS[form] for form in ("positive", "signed")}
    return {**met, "nf4 calibrated, worst text": worst <= BARS["kl"]}


if __name__ == "__main__":
    main()
