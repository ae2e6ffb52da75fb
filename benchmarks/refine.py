"""What distillation gives back of the gain that a low-rank adapter on a quantized base loses, and how long that takes.

    python benchmarks/refine.py --base MODEL --tuned MODEL --text FILE [--foreign FILE] [--rank 4] [--format nf4] [--steps 60] [--lr X] [--work DIR]

The adapter is the plain SVD of the change in the linears. The first 90 % of ``--text`` may be learnt from, the rest judges: perplexity on disjoint windows
of 256 tokens, fp32 arithmetic over the weights that a reader of the quantized base sees. Three texts are learnt from: the text's own
(over the whole model, and block by block), what the tuned model writes itself, and ``--foreign``. The gain kept is log(base / refined) / log(base / tuned), both references in 16 bits. Seconds are of the whole verb:
loading, writing text and steps. Bars at rank 4 on NF4: 94 % from the text's own, 90 % from self-written text, 60 s on two cores.
Writes ``benchmarks/results/refine_TUNED.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from measured import public_arguments, write_result

from qlora_tools import api
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.live.base import load_base
from qlora_tools.live.text import read_windows
from qlora_tools.live.tokenizer import open_tokenizer
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.int4 import Int4
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.training.distill_adapter import put_adapter

LENGTH, JUDGED_WINDOWS, AT_ONCE = 256, 80, 8
CODECS: dict[str, Codec | None] = {"nf4": NF4(), "int8": Int8(), "int4": Int4(), "bf16": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--tuned", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--foreign", type=Path)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--format", choices=CODECS, default="nf4")
    parser.add_argument("--steps", type=int, default=api.RefineConfig.steps)
    parser.add_argument("--lr", type=float, default=api.RefineConfig.lr)
    parser.add_argument("--embeddings", choices=["full", "drop"], default="drop")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found = compare(options, Path(folder))
    write_result(f"refine_{options.tuned.name}", f"python benchmarks/refine.py {public_arguments()}", found)


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Gains and seconds by the text that was learnt from."""
    text = options.text.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    learn, judge = work / "learn.txt", work / "judge.txt"
    learn.write_text(text[:cut], encoding="utf-8")
    judge.write_text(text[cut:], encoding="utf-8")
    windows = read_windows(judge, open_tokenizer(options.base), length=LENGTH, count=JUDGED_WINDOWS)
    windows_NL = torch.cat([windows.learn_NL, windows.held_out_NL])
    without = api.ExtractConfig(rank=options.rank, embeddings=options.embeddings, drop=("norm",) if options.embeddings == "drop" else ())
    api.extract(base=options.base, tuned=options.tuned, config=without, output=work / "svd")
    surprise = {name: _surprise(load_base(open_checkpoint(path), "language", None, dtype=torch.float32).model, windows_NL) for name, path in _models(options)}

    def gain(adapter: Path) -> float:
        return (surprise["base"] - _adapted(options, adapter, windows_NL)) / (surprise["base"] - surprise["tuned"])

    rows: list[dict[str, Any]] = [{"text": None, "gain": gain(work / "svd")}]
    print(f"svd: gain {rows[0]['gain']:.4f}", flush=True)
    runs = [("own", str(learn), False), ("own, by block", str(learn), True), ("self", "self", False)]
    for name, source, by_block in [*runs, *([("foreign", str(options.foreign), False)] if options.foreign else [])]:
        config = api.RefineConfig(base_format=options.format, text=source, steps=options.steps, lr=options.lr, by_block=by_block)
        done = api.refine(
            adapter=work / "svd", base=options.base, teacher=options.tuned, config=config, output=work / name.replace(", ", "-").replace(" ", "-")
        )
        assert done.report is not None
        rows.append({"text": name, "gain": gain(done.output), "kl": [done.report.start_kl, done.report.end_kl], "seconds": done.seconds})
        print(f"{name}: gain {rows[-1]['gain']:.4f} in {done.seconds:.0f} s, held-out KL {done.report.start_kl:.5f} -> {done.report.end_kl:.5f}", flush=True)
    settings = {name: getattr(options, name) for name in ("rank", "format", "steps", "lr", "embeddings")}
    return {"base": options.base.name, "tuned": options.tuned.name, **settings, "rows": rows}


def _models(options: argparse.Namespace) -> list[tuple[str, Path]]:
    return [("base", options.base), ("tuned", options.tuned)]


def _adapted(options: argparse.Namespace, adapter: Path, windows_NL: torch.Tensor) -> float:
    base = load_base(open_checkpoint(options.base), "language", CODECS[options.format], dtype=torch.float32)
    bound = read_adapter(adapter, base.checkpoint.specs, base.checkpoint.family, ties=base.checkpoint.ties)
    return _surprise(put_adapter(base, bound, torch.float32).model.eval(), windows_NL)


@torch.no_grad()
def _surprise(model: Any, windows_NL: torch.Tensor) -> float:
    """Mean nats per token."""
    total = 0.0
    for ids_BL in windows_NL.split(AT_ONCE):
        logits = model(input_ids=ids_BL).logits[:, :-1]
        total += float(functional.cross_entropy(logits.flatten(0, 1).float(), ids_BL[:, 1:].flatten(), reduction="sum"))
    return total / (len(windows_NL) * (LENGTH - 1))


if __name__ == "__main__":
    main()
