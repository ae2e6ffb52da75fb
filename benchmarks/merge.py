"""What an adapter is still worth after it was merged into 4 bits (or 8): every method of `qlt merge`, and PEFT's own merge of a 4-bit model.

    python benchmarks/merge.py --base MODEL --tuned MODEL --text FILE --foreign FILE [--rank 16] [--steps 60] [--windows 60] [--work DIR] [--only NAME ...]

An adapter is extracted from ``--tuned`` (linears only), the base is quantized to NF4 and int8. The first 90 % of ``--text`` calibrate and heal, the rest judges,
in disjoint windows of 256 tokens; ``--foreign`` is calibration text of another kind. Per row: the gain kept, log(base / row) / log(base / tuned)
in perplexities, with a 95 % interval by resampling windows; the share of what the unmerged adapter on NF4 has; and KL from the tuned and from the
unmerged model, in nats a token. Weights are decoded to fp32, so what is compared is the stored weights. Results of rows that were
measured before (``--work`` keeps the checkpoints) are measured again; ``--only`` leaves the other rows of the JSON as they are.
Bars: with the 16-bit weights 92 %, with healing 95 %, with NF4 weights alone 85 %. Writes ``benchmarks/results/merge.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from measured import write_result

from qlora_tools import api
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.live.base import load_base
from qlora_tools.live.text import read_windows
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.quality.intervals import mean_interval, retention_interval

LENGTH, BATCH = 256, 12
RESULT = Path(__file__).parent / "results" / "merge.json"
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """Folders and texts of a run."""

    base: Path
    tuned: Path
    nf4: Path
    int8: Path
    adapter: Path
    learn: Path
    judged: Path
    foreign: Path
    work: Path
    steps: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "tuned", "text", "foreign"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        inputs = prepare(options, options.work or Path(scratch))
        judge = Judge(inputs, options.windows)
        known = json.loads(RESULT.read_text())["rows"] if options.only is not None and RESULT.exists() else {}
        rows: dict[str, Any] = dict(known)
        for name, make in methods(inputs).items():
            if options.only is None or name in options.only:
                rows[name] = judge.row(make())
                print(f"{name:45s} {rows[name]['gain']:7.2%}  KL to unmerged {rows[name]['kl_to_unmerged']:.5f}", flush=True)
                save(options, judge, rows)


def prepare(options: argparse.Namespace, work: Path) -> Inputs:
    """Quantized bases, the adapter and the two parts of the text."""
    text = options.text.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    (work / "learn.txt").write_text(text[:cut], encoding="utf-8")
    (work / "judged.txt").write_text(text[cut:], encoding="utf-8")
    api.quantize(model=options.base, scheme="nf4", output=work / "nf4", force=True, device="cpu")
    api.quantize(model=options.base, scheme="int8", output=work / "int8", force=True, device="cpu")
    config = api.ExtractConfig(rank=options.rank)
    api.extract(base=options.base, tuned=options.tuned, config=config, output=work / "adapter", force=True, device="cpu")
    folders = (work / name for name in ("nf4", "int8", "adapter", "learn.txt", "judged.txt"))
    return Inputs(options.base, options.tuned, *folders, options.foreign, work, options.steps)


def methods(inputs: Inputs) -> dict[str, Callable[[], Weights]]:
    """Row -> how to get its linears."""

    def merged(name: str, base: Path, scheme: str, **choices: Any) -> Callable[[], Weights]:
        def make() -> Weights:
            heal = choices.pop("heal", None)
            config = api.MergeConfig(heal=api.HealConfig(steps=inputs.steps, **heal) if heal is not None else None, **choices)
            out = inputs.work / name
            api.merge(base=base, adapters=[(inputs.adapter, 1.0)], scheme=scheme, config=config, output=out, force=True, device="cpu")
            return linears(out)

        return make

    learn, foreign = str(inputs.learn), str(inputs.foreign)
    return {
        "NF4 base, PEFT merge_and_unload": lambda: peft_merge(inputs),
        "NF4 base, unmerged": lambda: unmerged(inputs.nf4, inputs.adapter),
        "NF4 base, keep-grid, no text": merged("k0", inputs.nf4, "nf4"),
        "NF4 base, keep-grid, calib in-domain": merged("k1", inputs.nf4, "nf4", calib=learn),
        "NF4 base, keep-grid, calib foreign": merged("k2", inputs.nf4, "nf4", calib=foreign),
        "16-bit base, requant": merged("r0", inputs.base, "nf4"),
        "16-bit base, requant, calib in-domain": merged("r1", inputs.base, "nf4", calib=learn),
        "int8 base, rounded to nearest": merged("i0", inputs.int8, "int8", method="requant", anyway=True),
        "int8 base, keep-grid, no text": merged("i1", inputs.int8, "int8"),
        "16-bit base, heal, tuned teaches": merged("h0", inputs.base, "nf4", heal={"teacher": str(inputs.tuned), "text": learn}),
        "NF4 base, heal, unmerged teaches": merged("h1", inputs.nf4, "nf4", heal={"text": learn}),
        "NF4 base, heal, tuned teaches": merged("h2", inputs.nf4, "nf4", heal={"teacher": str(inputs.tuned), "text": learn}),
    }


def linears(folder: Path) -> Weights:
    """The decoded weights that are quantized in ``folder``."""
    held = open_checkpoint(folder)
    return {name: held.read(name) for name in held.quantized}


def unmerged(base: Path, adapter: Path) -> Weights:
    """Dequantized base plus B A, in fp32."""
    from qlora_tools.progress import SILENT
    from qlora_tools.quant.nf4 import NF4
    from qlora_tools.verbs.merging import open_merged

    merged = open_merged(base, [(adapter, 1.0)], None, NF4(), SILENT)
    return {name: merged.source.read(name) for name in merged.checkpoint.quantized}


def peft_merge(inputs: Inputs) -> Weights:
    """PEFT's merge of the stock 4-bit model, decoded by bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = open_checkpoint(inputs.nf4).quantized
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs.nf4, dtype=torch.float32), inputs.adapter).merge_and_unload()
    layers = {name: model.get_submodule(name.removesuffix(".weight")).weight for name in names}
    return {name: dequantize_4bit(weight, weight.quant_state).float() for name, weight in layers.items()}


class Judge:
    """One model whose linears are exchanged, on fixed windows; the tuned and the unmerged model's log-probabilities are kept."""

    def __init__(self, inputs: Inputs, count: int) -> None:
        windows = read_windows(inputs.judged, open_tokenizer(inputs.base), length=LENGTH)
        self.windows_NL = torch.cat([windows.learn_NL, windows.held_out_NL])[:count]
        self._model: Any = load_base(open_checkpoint(inputs.base), "language", None, dtype=torch.float32).model
        names = open_checkpoint(inputs.nf4).quantized
        dense = {which: {name: open_checkpoint(folder).read(name) for name in names} for which, folder in (("base", inputs.base), ("tuned", inputs.tuned))}
        self.base = self.losses(self.log_p(dense["base"]))
        self._tuned_log_p = self.log_p(dense["tuned"])
        self.tuned = self.losses(self._tuned_log_p)
        self._unmerged_log_p = self.log_p(unmerged(inputs.nf4, inputs.adapter))
        self.unmerged = self.losses(self._unmerged_log_p)

    @torch.no_grad()
    def log_p(self, weights: Weights) -> torch.Tensor:
        """fp32 [N, L - 1, V]."""
        for name, value in weights.items():
            self._model.get_submodule(name.removesuffix(".weight")).stored.part0.copy_(value)
        found = [functional.log_softmax(self._model(ids_BL, use_cache=False).logits[:, :-1].float(), -1) for ids_BL in self.windows_NL.split(BATCH)]
        return torch.cat(found)

    def losses(self, log_p: torch.Tensor) -> list[float]:
        """Negative log-likelihood per window, nats."""
        return (-log_p.gather(-1, self.windows_NL[:, 1:, None]).squeeze(-1).double().sum(1)).tolist()

    def row(self, weights: Weights) -> dict[str, Any]:
        """Everything that is said about one way to merge."""
        found = self.log_p(weights)
        losses, tokens = self.losses(found), [LENGTH - 1] * len(self.windows_NL)
        gain, share = retention_interval(self.base, self.tuned, losses), retention_interval(self.base, self.unmerged, losses)
        rows = {"gain": gain.value, "gain_ci95": [gain.low, gain.high], "of_unmerged": share.value, "of_unmerged_ci95": [share.low, share.high]}
        for name, reference in (("tuned", self._tuned_log_p), ("unmerged", self._unmerged_log_p)):
            sums = [float((expected.exp() * (expected - given)).sum(dtype=torch.float64)) for expected, given in zip(reference, found, strict=True)]
            interval = mean_interval(sums, tokens)
            rows |= {f"kl_to_{name}": interval.value, f"kl_to_{name}_ci95": [interval.low, interval.high]}
        return rows


def save(options: argparse.Namespace, judge: Judge, rows: Mapping[str, Any]) -> None:
    """What is known so far."""

    def gain(name: str) -> float:
        return float(rows[name]["gain"]) if name in rows else float("nan")

    command = (
        f"python benchmarks/merge.py --base {options.base.name} --tuned {options.tuned.name} --text {options.text.name} --foreign {options.foreign.name}"
        f" --rank {options.rank} --steps {options.steps} --windows {options.windows}"
    )
    total = sum(judge.base) / (len(judge.base) * (LENGTH - 1)), sum(judge.tuned) / (len(judge.tuned) * (LENGTH - 1))
    bars = {
        "16-bit base, requant >= 92 %": gain("16-bit base, requant") >= 0.92,
        "16-bit base, heal >= 95 %": gain("16-bit base, heal, tuned teaches") >= 0.95,
        "NF4 base alone >= 85 %": gain("NF4 base, keep-grid, no text") >= 0.85,
    }
    content = {"windows": len(judge.base), "rank": options.rank, "heal_steps": options.steps, "nats_a_token": {"base": total[0], "tuned": total[1]}, "rows": rows, "bars_met": bars}  # fmt: skip
    write_result("merge", command, content)


if __name__ == "__main__":
    main()
