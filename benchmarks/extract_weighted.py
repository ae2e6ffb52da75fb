"""What weights, spread ranks and objectives are worth in extraction: KL to the tuned model and gain kept, on held-out text.

    python benchmarks/extract_weighted.py --base MODEL --tuned MODEL --text FILE [--stats FILE] [--rank 16] [--work DIR]

The first 90 % of the text are calibrated on, the last 10 % judge: disjoint windows of 256 tokens, fp32 compute. Every adapter has the same number of
parameters but where its name says otherwise. KL(tuned || base + adapter) in nats a token; gain = log(ppl_base / ppl) / log(ppl_base / ppl_tuned)
against the 16-bit base; intervals are 95 % bootstraps over windows, ``kl_over_plain`` over pairs of windows. Statistics are those of the tuned
model, unless ``--stats`` gives a file. Bar: 0.0008 for rank 16 on the 16-bit base without distillation. Writes ``benchmarks/results/extract_weighted.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measured import write_result

from qlora_tools import api
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.live.text import read_windows
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.progress import SILENT
from qlora_tools.quality.intervals import Interval, mean_interval, ratio_interval, retention_interval
from qlora_tools.verbs.calibrate import statistics_for
from qlora_tools.verbs.extract import base_codec
from qlora_tools.verbs.extract_judge import BARE, Scores, judge_windows
from qlora_tools.verbs.opening import open_model

LENGTH, WINDOWS, BAR = 256, 48, 8e-4
CANDIDATES: dict[str | None, dict[str, dict[str, Any]]] = {
    None: {
        "plain": {},
        "plain, spread": {"spread": True},
        "input": {"weight": "input", "spread": False},
        "input, spread, weighted factors": {"weight": "input", "factors": "weighted"},
        "input, spread, plain factors": {"weight": "input"},
        "fisher": {"weight": "fisher", "spread": False},
        "fisher, spread, weighted factors": {"weight": "fisher", "factors": "weighted"},
        "fisher, spread, plain factors": {"weight": "fisher"},
    },
    "nf4": {
        "plain": {},
        "total": {"objective": "total"},
        "total, input": {"objective": "total", "weight": "input"},
        "split": {"objective": "split"},
        "split, input": {"objective": "split", "weight": "input"},
        "split, input, half as much rank more": {"objective": "split", "weight": "input", "more": 0.5},
        "fisher, spread, weighted factors": {"weight": "fisher", "factors": "weighted"},
    },
    "int4": {"plain": {}, "total": {"objective": "total"}, "split, input": {"objective": "split", "weight": "input"}},
    "int8": {"plain": {}, "total": {"objective": "total"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--stats", type=Path, help="statistics of either model with gradients; default: taken from the text")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--formats", default="none,nf4,int4,int8", help="which bases")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(exist_ok=True)
        learn, held_out = _halves(options.text, work)
        tuned = open_model(options.tuned)
        stats = stack.enter_context(statistics_for(tuned, options.stats or learn, fisher=True, beside=work / "stats", also=[open_model(options.base)]))
        windows_NL = read_windows(held_out, open_tokenizer(options.base), length=LENGTH, count=WINDOWS)
        judged_NL = torch.cat([windows_NL.learn_NL, windows_NL.held_out_NL])
        chosen = {format_: CANDIDATES[format_] for format_ in (None if name == "none" else name for name in options.formats.split(","))}
        found: dict[str, Any] = {}
        for format_, settings in chosen.items():
            found[format_ or "bf16"] = _base(options, format_, settings, stats.path, judged_NL, work)
            path = _write(options, found, len(judged_NL), stats.origin.text, stats.origin.tokens)
    print(f"wrote {path}")


def _write(options: argparse.Namespace, found: dict[str, Any], windows: int, text: str, tokens: int) -> Path:
    content = {
        "question": "KL to the tuned model and gain kept by extraction: weights, spread ranks, objectives; same parameters, held-out text",
        "pair": f"{options.base.name} -> {options.tuned.name}",
        "rank": options.rank,
        "held_out_windows": windows,
        "calibration": {"text": text, "tokens": tokens},
        "bar_kl": BAR,
        "bases": found,
    }
    command = "python benchmarks/extract_weighted.py --base code-base --tuned shakespeare-light --text shakespeare.txt"
    return write_result("extract_weighted", command, content)


def _halves(text: Path, work: Path) -> tuple[Path, Path]:
    content = text.read_text(encoding="utf-8")
    cut = int(len(content) * 0.9)
    learn, held_out = work / f"{text.stem}-first-90.txt", work / f"{text.stem}-last-10.txt"
    learn.write_text(content[:cut], encoding="utf-8")
    held_out.write_text(content[cut:], encoding="utf-8")
    return learn, held_out


def _base(options: argparse.Namespace, format_: str | None, settings: dict[str, dict[str, Any]], stats: Path, judged_NL: torch.Tensor, work: Path) -> Any:
    """All candidates on one form of the base, by name."""
    folders: dict[str, Path] = {}
    for number, setting in enumerate(settings.values()):
        setting = dict(setting)
        rest = int(options.rank * setting.pop("more", 0))
        rank = options.rank + rest
        config = api.ExtractConfig(rank=rank, base_format=format_, rest_rank=rest or None, **setting)
        folders[f"candidate{number}"] = work / f"{format_ or 'bf16'}-{number}"
        api.extract(base=options.base, tuned=options.tuned, config=config, calib=stats, output=folders[f"candidate{number}"], force=True)
    base, tuned = open_model(options.base), open_model(options.tuned)
    judging: dict[str, Any] = {"device": "cpu", "progress": SILENT}
    scores = judge_windows(base, tuned, folders, base_codec(format_), judged_NL, bare=True, **judging)
    ends = _ends(options, judged_NL)
    rows = {}
    for key, name in zip(folders, settings, strict=True):
        with SafetensorsFile(folders[key] / "adapter_model.safetensors") as file:
            parameters = sum(spec.numel for spec in file.specs.values())
        rows[name] = _row(scores[key], scores["candidate0"], *ends) | {"parameters": parameters}
        print(f"{format_ or 'bf16':5} {name:38} KL {rows[name]['kl']['value']:.6f}  gain {rows[name]['gain']['value']:.4f}  {parameters}", flush=True)
    return {"no adapter": _row(scores[BARE], scores["candidate0"], *ends), **rows}


_ENDS: list[tuple[Scores, Scores]] = []


def _ends(options: argparse.Namespace, judged_NL: torch.Tensor) -> tuple[Scores, Scores]:
    """The 16-bit base and the tuned model on the windows, measured once."""
    if not _ENDS:
        base, tuned = open_model(options.base), open_model(options.tuned)
        judging: dict[str, Any] = {"device": "cpu", "progress": SILENT, "bare": True}
        _ENDS.append(tuple(judge_windows(model, tuned, {}, None, judged_NL, **judging)[BARE] for model in (base, tuned)))  # type: ignore[arg-type]
    return _ENDS[0]


def _row(scores: Scores, plain: Scores, base: Scores, tuned: Scores) -> dict[str, Any]:
    kl, over = mean_interval(scores.kl, scores.tokens), ratio_interval(scores.kl, plain.kl)
    return {"kl": _plain(kl), "kl_over_plain": _plain(over), "gain": _plain(retention_interval(base.nll, tuned.nll, scores.nll))}


def _plain(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "ci95": interval.bounds}


if __name__ == "__main__":
    main()
