"""What a rank-8 LoRA over an NF4 base keeps of a full fine-tune of the linears: same base, same windows, same number of steps.

    python benchmarks/train_quality.py --base MODEL --text FILE [--steps 60] [--rank 8] [--work DIR]

The first 90 % of the text are trained on, the rest is judged by: perplexity on disjoint windows of 256 tokens. The full fine-tune moves
fp32 masters of every linear with AdamW, cosine and warm-up, over the same batches in the same order. Both sides take the best of
a few learning rates. The gain kept is log(base / lora) / log(base / full), each against its own base in fp32: the LoRA runs on the
quantized one. Bar: 95 %. Writes ``benchmarks/results/train_quality.json``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))

from measured import write_result

from qlora_tools import api
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.optimizers import rate_factor
from qlora_tools.training.order import batches
from qlora_tools.training.rows import LanguageRows

LENGTH, BATCH, JUDGED_WINDOWS = 256, 8, 60
FULL_RATES, LORA_RATES = (2e-5, 1e-4, 3e-4, 1e-3), (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
BAR = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        (work / "train.txt").write_text(text[:cut], encoding="utf-8")
        (work / "heldout.txt").write_text(text[cut:], encoding="utf-8")
        rows, judged = encoded(options.base, work / "train.txt"), encoded(options.base, work / "heldout.txt")
        base = perplexity(load(options.base), judged)
        full = {rate: full_fine_tune(options.base, rows, judged, options.steps, rate) for rate in FULL_RATES}
        lora = {rate: lora_fine_tune(options.base, work, judged, options.steps, options.rank, rate) for rate in LORA_RATES}
    best_full, best_lora = min(full.values()), min(lora.values())
    kept = math.log(base / best_lora) / math.log(base / best_full)
    print(f"base {base:.1f}, full {full}, lora {lora}: {100 * kept:.1f} % of the gain kept (wanted {100 * BAR:.0f} %)")
    command = f"python benchmarks/train_quality.py --base {options.base.name} --text {options.text.name} --steps {options.steps} --rank {options.rank}"
    content = {
        "steps": options.steps, "rank": options.rank, "perplexity": {"base": base, "full": {str(k): v for k, v in full.items()}, "lora": {str(k): v for k, v in lora.items()}},
        "gain_kept": kept,
        "gain_kept_of_each_rate": {str(rate): math.log(base / best_lora) / math.log(base / found) for rate, found in full.items()}, "bars_met": {"gain_kept": kept >= BAR},
    }  # fmt: skip
    write_result("train_quality", command, content)


def encoded(base: Path, path: Path) -> LanguageRows:
    from transformers import AutoTokenizer

    from qlora_tools.training.examples import read_records
    from qlora_tools.training.masks import encode

    examples = encode(read_records(path), AutoTokenizer.from_pretrained(base), max_len=LENGTH).examples
    return LanguageRows(examples, max_len=LENGTH)


def load(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@torch.no_grad()
def perplexity(model: Any, rows: LanguageRows) -> float:
    """Over the first full windows of the held-out text."""
    model.eval()
    chosen = [number for number in range(len(rows)) if rows.lengths[number] == LENGTH][:JUDGED_WINDOWS]
    total = count = 0.0
    for number in chosen:
        batch = rows.batch([number])
        logits = model(**batch.inputs, use_cache=False).logits.float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=-100))
        count += batch.count
    return math.exp(total / count)


def full_fine_tune(base: Path, rows: LanguageRows, judged: LanguageRows, steps: int, rate: float) -> float:
    """Perplexity after moving every linear but the head."""
    model = load(base)
    moved = []
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(isinstance(module, torch.nn.Linear) and "lm_head" not in name)
            moved += [parameter] if parameter.requires_grad else []
    optimizer = torch.optim.AdamW(moved, lr=rate, weight_decay=0.0)
    config = TrainConfig(lr=rate, steps=steps)
    order = batches(len(rows), BATCH, config.seed)
    model.train()
    for step in range(steps):
        batch = rows.batch(next(order))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch.inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=-100) / batch.count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(config, step, steps)
        optimizer.step()
        optimizer.zero_grad()
    found = perplexity(model, judged)
    print(f"full fine-tune at {rate:g}: {found:.2f}", flush=True)
    return found


def lora_fine_tune(base: Path, work: Path, judged: LanguageRows, steps: int, rank: int, rate: float) -> float:
    """Perplexity of the NF4 base with the adapter that `qlt train` wrote, through stock PEFT and bitsandbytes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    out = work / "adapter"
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(rank=rank, lr=rate, steps=steps, batch=BATCH, max_len=LENGTH)
    api.train(base=base, data=work / "train.txt", config=config, output=out, device="cpu")
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, quantization_config=stored, dtype=torch.float32), out)
    found = perplexity(model, judged)
    print(f"LoRA at {rate:g}: {found:.2f}", flush=True)
    return found


if __name__ == "__main__":
    main()
