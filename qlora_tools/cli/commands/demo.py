"""``qlt demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qlora_tools.cli.options import Shared, examples, shared
from qlora_tools.cli.words import megabytes, percent

EPILOG = examples("qlt demo", "qlt demo --base org/base --tuned org/tuned --rank 32 -o demo-mine")


@click.command("demo", epilog=EPILOG)
@click.option("--base", metavar="MODEL", help="Run the chain on this base instead of training a small one.")
@click.option("--tuned", metavar="MODEL", help="The full fine-tune of --base.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Held-out text of the fine-tune's domain.")
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the adapter.")
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Fresh processes per setting in the benchmark.")
@shared
def command(common: Shared, base: str | None, tuned: str | None, text: Path | None, rank: int, rounds: int) -> None:
    """Train a small model on Python's standard library, fine-tune it, and run the whole chain. No network, no download."""
    from qlora_tools import api
    from qlora_tools.cli.commands.report import show

    folder, screen = common.output or Path("demo"), common.screen
    if common.dry_run:
        screen.result(
            {"output": str(folder)}, f"dry run: would train a pair, extract, quantize, merge, export and measure in {common.session.relative(folder)}"
        )
        return
    result = api.demo(
        base=base,
        tuned=tuned,
        text=text,
        rank=rank,
        rounds=rounds,
        folder=folder,
        device=common.device,
        command=["qlt", *sys.argv[1:]],
        after=lambda step, done: screen.say(f"{step:<24} {_told(step, done)}"),
        progress=screen.progress,
    )
    if result.benched.record is not None:
        screen.say()
        show(screen, result.benched.record)
    page = common.session.relative(result.benched.output / "report.html")
    screen.result(result, f"wrote {page} in {result.seconds:.0f} s: open it in a browser")


def _told(step: str, done: Any) -> str:
    """One line about a finished step."""
    if step == "train":
        scores = done.scores
        return (
            f"{'kept from before' if done.reused else 'trained'}: held-out perplexity on prose {scores.base_prose:.1f} -> {scores.tuned_prose:.1f} "
            f"by the fine-tune (code {scores.base_code:.1f} -> {scores.tuned_code:.1f}), weights moved {percent(scores.delta_share)}"
        )
    if step == "extract":
        total = done.report.total
        return f"{percent(total.kept_energy)} of the change kept, error {total.error:.4f} (best possible {total.optimum:.4f}), {megabytes(done.report.adapter_bytes)}"
    if step == "quantize":
        return f"{megabytes(done.dense_bytes)} -> {megabytes(done.stored_bytes)}, weight error {percent(done.relative_error)}"
    if step == "train a LoRA":
        report = done.report
        return f"rank 8 over NF4: {report.steps} steps, loss {report.first_loss:.2f} -> {report.final_loss:.2f}, {report.tokens_per_s:,.0f} tokens/s"
    if step == "refine":
        report = done.report
        return f"{report.steps} steps on {report.tokens:,} tokens, KL to the tuned model {report.start_kl:.4f} -> {report.end_kl:.4f}"
    if step.startswith("merge"):
        return f"{percent(done.retention.retention)} of the adapter survives" if done.retention else "nothing changed"
    if step.startswith("export"):
        return f"{megabytes(done.file_bytes)}, parity: {done.parity.summary}"
    return f"{len(done.settings)} settings measured"
