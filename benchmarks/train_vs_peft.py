"""Train a rank-16 LoRA over an NF4 base: `qlt train` beside PEFT + bitsandbytes + transformers.Trainer.

    python benchmarks/train_vs_peft.py [--shape 110m] [--steps 8] [--pairs 3] [--work DIR]
    python benchmarks/train_vs_peft.py --device cuda --shape 8b --batch 4 --length 2048 --steps 12

Both train all linears of the same random Llama on the same windows of text, in bf16, with AdamW, batch 4 x 512. The other side follows
the recipe that its documentation gives: `load_in_4bit` with NF4, double quantization and bf16 compute, `prepare_model_for_kbit_training`
(which switches gradient checkpointing on), `get_peft_model`, `Trainer(bf16=True)`. A second row gives it without gradient
checkpointing. Every run is a fresh process and runs alternate; speed is the median over steps after the first two, memory the
process's VmHWM, on CUDA the peak of torch's allocator. Bars: 1.5 times the tokens/s and 0.8 of the memory; on CUDA 1.4 and 0.7. Writes
``benchmarks/results/train_vs_peft.json`` (``train_vs_peft_cuda.json``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measured import measure, median, ratio, write_result
from synthetic import SHAPES, write_base, write_tokenizer

WARMUP_STEPS = 2
BARS = {"cpu": {"times_faster": 1.5, "peak_share": 0.8}, "cuda": {"times_faster": 1.4, "peak_share": 0.7}}
SIDES = ("qlt", "peft", "peft, no checkpointing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="110m", choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--run-peer", nargs=2, metavar=("FOLDER", "CHECKPOINTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_peer:
        run_peer(Path(options.run_peer[0]), options)
        return
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        work = Path(text)
        write_base(work / "base", options.shape)
        write_tokenizer(work / "base", SHAPES[options.shape]["vocab_size"])
        write_text(work, options.length)
        runs: list[dict[str, dict]] = []
        for number in range(options.pairs):
            order = SIDES if number % 2 == 0 else tuple(reversed(SIDES))
            runs.append({side: one_run(side, work, options) for side in order})
    command = f"python benchmarks/train_vs_peft.py --device {options.device} --shape {options.shape} --batch {options.batch} --length {options.length} --steps {options.steps} --pairs {options.pairs}"
    content = summary(runs, BARS[options.device])
    name = "train_vs_peft" if options.device == "cpu" else "train_vs_peft_cuda"
    path = write_result(name, command, {"shape": options.shape, "batch": options.batch, "length": options.length, "device": options.device, **content})
    print("\n".join(content["verdict"]), f"wrote {path.name}", sep="\n")


def write_text(work: Path, length: int) -> None:
    """Text for ours, the same windows of token ids for the other side."""
    from transformers import AutoTokenizer

    from qlora_tools.quality.corpus import python_reference
    from qlora_tools.training.examples import read_records
    from qlora_tools.training.masks import encode

    (work / "text.txt").write_text(python_reference("all").text, encoding="utf-8")
    encoded = encode(read_records(work / "text.txt"), AutoTokenizer.from_pretrained(work / "base"), max_len=length)
    (work / "windows.json").write_text(json.dumps([example.ids.tolist() for example in encoded.examples if len(example.ids) == length]))


def one_run(side: str, work: Path, options: argparse.Namespace) -> dict:
    """Seconds per step, tokens/s and peak bytes of one fresh process."""
    sizes = ["--batch", options.batch, "--steps", options.steps]
    if side == "qlt":
        shutil.rmtree(work / "adapter", ignore_errors=True)
        words = ["train", "--base", work / "base", "--data", work / "text.txt", "--nf4", "--rank", 16, "--max-len", options.length, *sizes]
        words += ["--save-every", options.steps, "--device", options.device, "-o", work / "adapter", "-q"]
        done = measure("qlora_tools.cli", words, cwd=work)
        lines = (work / "adapter" / "metrics.jsonl").read_text().splitlines() if done["returncode"] == 0 else []
        steps = [record for record in map(json.loads, lines) if record["event"] == "step"]
        seconds, peak = [record["seconds"] for record in steps], max((record["peak_bytes"] for record in steps), default=0)
    else:
        words = ["--run-peer", work, "off" if "no checkpointing" in side else "on", *sizes, "--device", options.device]
        done = measure(str(Path(__file__).resolve()), words, cwd=work)
        report = json.loads((work / "peer.json").read_text()) if done["returncode"] == 0 else {"step_s": [], "peak_bytes": 0}
        seconds, peak = report["step_s"], report["peak_bytes"]
    if done["returncode"] != 0:
        raise SystemExit(f"{side} failed: {done['stderr']}")
    settled = seconds[WARMUP_STEPS:]
    peak = peak if options.device == "cuda" else done["peak_bytes"]
    found = {"step_s": seconds, "tokens_per_s": options.batch * options.length / median(settled), "peak_bytes": peak, "wall_s": done["wall_s"]}
    print(f"{side:<24} {found['tokens_per_s']:7.0f} tokens/s   peak {found['peak_bytes'] / 1e6:6.0f} MB   whole run {found['wall_s']:6.1f} s", flush=True)
    return found


def run_peer(work: Path, options: argparse.Namespace) -> None:
    """The recipe of PEFT's documentation; writes the seconds of each step and the allocator's peak."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(work / "base", quantization_config=stored, dtype=torch.bfloat16, device_map={"": options.device})
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.run_peer[1] == "on")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    windows = [torch.tensor(ids) for ids in json.loads((work / "windows.json").read_text())[: options.batch * options.steps]]
    began: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: object, **named: object) -> None:
            began.append(time.perf_counter())

        def on_step_end(self, *arguments: object, **named: object) -> None:
            if options.device == "cuda":
                torch.cuda.synchronize()
            began[-1] = time.perf_counter() - began[-1]

    settings = TrainingArguments(
        str(work / "trainer"), per_device_train_batch_size=options.batch, max_steps=options.steps, bf16=True, use_cpu=options.device == "cpu", learning_rate=2e-4, save_strategy="no",
        report_to=[], optim="adamw_torch", dataloader_pin_memory=False, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=settings, train_dataset=[{"input_ids": ids, "labels": ids} for ids in windows], callbacks=[Clock()]).train()
    peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else 0
    (work / "peer.json").write_text(json.dumps({"step_s": began, "peak_bytes": peak}))


def summary(runs: list[dict[str, dict]], bars: dict[str, float]) -> dict:
    speeds = {side: [run[side]["tokens_per_s"] for run in runs] for side in SIDES}
    peaks = {side: [run[side]["peak_bytes"] for run in runs] for side in SIDES}
    against = {
        side: {"times_faster": ratio(speeds["qlt"], speeds[side]), "peak_share": median(peaks["qlt"]) / median(peaks[side])} for side in SIDES if side != "qlt"
    }
    default = against["peft"]
    met = {"times_faster": default["times_faster"]["median"] >= bars["times_faster"], "peak_share": default["peak_share"] <= bars["peak_share"]}
    verdict = [
        f"{side}: {median(speeds[side]):.0f} tokens/s, peak {median(peaks[side]) / 1e6:.0f} MB; qlt is {item['times_faster']['median']:.2f} times as fast "
        f"{[round(end, 2) for end in item['times_faster']['ci95']]} with a share of {item['peak_share']:.2f} of the memory"
        for side, item in against.items()
    ]
    return {"runs": runs, "against": against, "bars_met": met, "verdict": [f"qlt: {median(speeds['qlt']):.0f} tokens/s", *verdict, f"bars met: {met}"]}


if __name__ == "__main__":
    main()
