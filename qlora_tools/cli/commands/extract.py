"""``qlt extract``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qlora_tools.cli.options import SIZE, HeadedCommand, Shared, examples, headed, shared
from qlora_tools.cli.words import megabytes, percent, plural

if TYPE_CHECKING:
    from qlora_tools.cli.screen import Screen
    from qlora_tools.stages.extract_result import ExtractReport
    from qlora_tools.verbs.extract import ExtractResult

EPILOG = examples(
    "qlt extract --base base/ --tuned tuned/ --rank 16",
    "qlt extract --base org/base --tuned org/tuned --energy 0.9",
    "qlt extract --base base/ --tuned tuned/ --max-bytes 20MB --targets attn",
    "qlt extract --base base/ --tuned tuned/ --weight fisher --calib text.txt",
    "qlt extract --base base/ --tuned tuned/ --for nf4 --objective auto --refine --text text.txt",
)
_REFINE_STEPS = 60
_SHOWN_ROWS = 12
_WEIGHT_HELP = "Weigh errors by the layers' inputs, or (fisher) also by what their outputs are worth; ranks then follow."
_OBJECTIVE_HELP = "With --for: the change alone, all that differs from the quantized base, some rank for each, or whichever is nearest on --text."


@click.command("extract", epilog=EPILOG, cls=HeadedCommand)
@click.option("--base", required=True, metavar="MODEL", help="The model before fine-tuning: folder or hub id.")
@click.option("--tuned", required=True, metavar="MODEL", help="The model after full fine-tuning.")
@click.option("--rank", default=None, metavar="N|auto", help="One rank for all tensors, or auto: whatever rises above the rounding noise. Default: 16.")
@click.option("--energy", type=float, metavar="SHARE", help="Per tensor, the smallest rank that keeps this share of ||delta||^2.")
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="Spend at most this much (20MB) where it removes most error.")
@click.option("--max-rank", type=int, default=128, show_default=True, help="Cap of auto, --energy and --max-bytes.")
@click.option("--targets", default="all", show_default=True, metavar="minimal|qkv|attn|mlp|all|REGEX", help="Which linears and convolutions get factors.")
@click.option(
    "--embeddings",
    type=click.Choice(["full", "lora", "drop"]),
    default="full",
    show_default=True,
    help="Embeddings and head that changed: whole, as factors, or left out.",
)
@click.option("--drop", multiple=True, metavar="REGEX", help="Tensors that may be left out although they changed; repeat for several.")
@click.option("--dtype", type=click.Choice(["BF16", "F16", "F32"]), help="Dtype of the factors. Default: that of the tuned model.")
@headed("What an error costs")("--weight", type=click.Choice(["none", "input", "fisher"]), default="none", show_default=True, help=_WEIGHT_HELP)
@headed("What an error costs")(
    "--calib",
    metavar="TEXT|STATS|self|builtin",
    help="Where weights come from: a text, a file of `qlt calibrate`, the tuned model's own text, or the built-in one.",
)
@headed("What an error costs")("--spread/--even", default=None, help="Spread --rank N, as a mean, to where it removes most error. Default: with --weight.")
@headed("What an error costs")(
    "--factors", type=click.Choice(["weighted", "plain"]), help="plain: the weights choose ranks alone. Default: plain, but weighted with --even."
)
@headed("The base it is for")("--for", "base_format", type=click.Choice(["nf4", "int8", "int4"]), help="What the adapter's base will be stored in.")
@headed("The base it is for")("--objective", type=click.Choice(["delta", "total", "split", "auto"]), default="delta", show_default=True, help=_OBJECTIVE_HELP)
@headed("The base it is for")("--rest-rank", type=int, metavar="N", help="The part of the rank that split gives to what quantization lost. Default: a quarter.")
@headed("The base it is for")(
    "--refine", is_flag=False, flag_value=_REFINE_STEPS, type=int, metavar="[STEPS]", help="Distil the tuned model into the adapter, so many steps."
)
@headed("The base it is for")("--by-block", is_flag=True, help="Refine with one block of each model in memory at a time.")
@headed("The base it is for")("--text", metavar="FILE|self|builtin", help="What auto judges on and --refine learns from. Default: --calib, if that is a text.")
@shared
def command(
    common: Shared,
    base: str,
    tuned: str,
    rank: str | None,
    drop: tuple[str, ...],
    calib: str | None,
    text: str | None,
    refine: int | None,
    by_block: bool,
    **choices: object,
) -> None:
    """Take a LoRA adapter out of a full fine-tune, as a PEFT folder, with its error and the best possible one."""
    from qlora_tools import api

    ranks = {} if rank is None else {"rank": int(rank) if rank.isdigit() else rank}
    config = api.ExtractConfig(**ranks, drop=drop, **choices)  # type: ignore[arg-type]
    result = api.extract(
        base=base,
        tuned=tuned,
        config=config,
        calib=calib,
        text=text,
        refine=refine,
        by_block=by_block,
        **common.arguments,
    )
    screen = common.screen
    if result.report is None:
        screen.say(f"{plural(result.compared_tensors, 'tensor')} to compare")
    else:
        _show(screen, result.report)
        _show_judgement(screen, result)
        common.session.remember(base=base, tuned=tuned, adapters=[[common.session.relative(result.output), 1.0]], exports=None)
    screen.result(result, common.written(result.output, result.seconds))


def _show(screen: Screen, report: ExtractReport) -> None:
    rows = [
        (
            row.name.removesuffix(".weight"),
            "x".join(map(str, row.shape)),
            str(row.certificate.rank),
            f"{row.certificate.delta_norm:.4g}",
            percent(row.certificate.kept_energy),
            f"{row.certificate.error:.4f}",
            f"{row.certificate.optimum:.4f}",
            percent((row.certificate.noise_norm / row.certificate.delta_norm) ** 2 if row.certificate.delta_norm else 0.0),
        )
        for row in report.rows
    ]
    shown = rows if len(rows) <= _SHOWN_ROWS else [*rows[: _SHOWN_ROWS - 2], ("...", *[""] * 7), rows[-1]]
    screen.table("", ["tensor", "shape", "rank", "||delta||", "kept energy", "error", "best possible", "noise energy"], shown)
    if len(rows) > _SHOWN_ROWS:
        screen.say(f"({len(rows)} tensors; all are in qlt-manifest.json)")
    total = report.total
    screen.say(
        f"total: ||delta|| is {percent(total.delta_norm / total.weight_norm if total.weight_norm else 0.0)} of ||W||, {percent(total.kept_energy)} of its energy kept"
    )
    screen.say(f"relative error {total.error:.4f} after rounding; no adapter of these ranks can do better than {total.optimum:.4f}")
    screen.say(
        f"bf16 rounding noise is {percent((total.noise_norm / total.delta_norm) ** 2 if total.delta_norm else 0.0)} of the delta's energy; of what rises above it, {percent(total.kept_signal)} is kept"
    )
    if report.weighted_total is not None:
        weighed = report.weighted_total
        screen.say(
            f"weighted: error {weighed.error:.4f}, {percent(weighed.kept_energy)} kept; no adapter of these ranks can do better than {weighed.optimum:.4f}"
        )
    details = [
        (report.frozen, "frozen (no change)"),
        (len(report.saved_whole), "saved whole"),
        (len(report.biases), "biases"),
        (len(report.dropped), "dropped"),
    ]
    screen.say(
        f"{plural(total.tensors, 'tensor')} as factors, "
        + ", ".join(f"{count} {what}" for count, what in details if count)
        + f"{', ' if any(count for count, _ in details) else ''}{megabytes(report.adapter_bytes)}"
    )
    for item in report.dropped:
        screen.remark(f"dropped: {item.name} ({item.reason}; ||delta|| {item.delta_norm:.4g})")
    for note in report.notes:
        screen.remark(f"note: {note}")


def _show_judgement(screen: Screen, result: ExtractResult) -> None:
    """Which objective won, and what distillation did."""
    for contender in result.contenders:
        low_high = "" if contender.ci95 is None else f" (95 %: {contender.ci95[0]:.4g} to {contender.ci95[1]:.4g})"
        more = "" if contender.more_than_best == 1.0 else f", {contender.more_than_best:.3g} times that of {result.objective}"
        screen.say(f"objective {contender.objective}: KL to the tuned model {contender.kl:.4g}{low_high}{more}; perplexity {contender.perplexity:.4g}")
    if result.contenders:
        screen.say(f"the adapter is that of objective {result.objective}")
        fluent = min(result.contenders, key=lambda contender: contender.perplexity)
        if fluent.objective != result.objective:
            screen.remark(f"note: by perplexity on this text, {fluent.objective} is better: --objective {fluent.objective} keeps more of what was learnt")
    if result.refined is not None:
        found = result.refined
        kept = "; nothing was better than the start, which is kept" if found.kept_start else ""
        screen.say(f"refined in {found.steps} steps on {found.text}: KL to the tuned model {found.start_kl:.4g} before, {found.end_kl:.4g} after{kept}")
