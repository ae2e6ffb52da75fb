"""``qlt quantize``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from qlora_tools.cli.options import SIZE, HeadedCommand, Shared, examples, headed, shared
from qlora_tools.cli.screen import Screen
from qlora_tools.cli.words import megabytes, percent, plural

if TYPE_CHECKING:
    from qlora_tools.verbs.quantize import QuantizeResult

EPILOG = examples(
    "qlt quantize base/ --nf4",
    "qlt quantize base/ --nf4 --calib text.txt",
    "qlt quantize org/name --int8 --calib self -o small/",
    "qlt quantize base/ --nf4 --search positive --as-16bit",
    "qlt quantize base/ --nf4 --calib builtin --max-kl 0.002",
)
_FRONTIER_LINES = 12
_quality = headed("Less loss in the same bytes")
_mixed = headed("Mixed precision")


@click.command("quantize", cls=HeadedCommand, epilog=EPILOG)
@click.argument("model")
@click.option("--nf4", "scheme", flag_value="nf4", help="4-bit NormalFloat with double quantization (default).")
@click.option("--int8", "scheme", flag_value="int8", help="LLM.int8() row-wise.")
@click.option(
    "--block-size", type=click.Choice(["32", "64", "128", "256", "512", "1024", "2048", "4096"]), default="64", show_default=True, help="Weights per NF4 block."
)
@click.option("--double-quant/--no-double-quant", default=True, show_default=True, help="Quantize the NF4 block scales to 8 bits.")
@_quality(
    "--search",
    type=click.Choice(["positive", "signed"]),
    is_flag=False,
    flag_value="signed",
    help="Search NF4's scales, without data. signed (where no form is named): least error. positive: survives a copy in 16 bits that is quantized anew.",
)
@_quality("--as-16bit", is_flag=True, help="With --search positive: write the weights in 16 bits, for stock load_in_4bit to find the same codes in.")
@_quality(
    "--calib",
    metavar="TEXT|STATS|self|builtin",
    help="Round with error feedback, from a text, a file of `qlt calibrate`, the model's own text, or the built-in one; held-out text decides, per layer.",
)
@_quality("--tokens", type=click.IntRange(min=2), default=32_768, show_default=True, help="Tokens of the text to run through the model, a fifth held out.")
@_quality("--context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@_quality("--seed", type=int, default=0, show_default=True, help="For text that the model writes.")
@_mixed("--max-bytes", type=SIZE, metavar="SIZE", help="Keep linears in 16 bits where that saves most KL, up to this size of all tensors (20MB).")
@_mixed("--max-kl", type=click.FloatRange(min=0), metavar="NATS", help="Keep as few linears in 16 bits as leave at most this KL per token. With --calib.")
@shared
def command(
    common: Shared,
    model: str,
    scheme: str | None,
    block_size: str,
    double_quant: bool,
    search: str | None,
    as_16bit: bool,
    calib: str | None,
    tokens: int,
    context: int,
    seed: int,
    max_bytes: int | None,
    max_kl: float | None,
) -> None:
    """Quantize a checkpoint; MODEL is a folder or a hub id. Stock transformers loads the result."""
    from qlora_tools import api

    result = api.quantize(
        model=model,
        scheme=scheme or "nf4",
        block_size=int(block_size),
        double_quant=double_quant,
        search=search,
        as_16bit=as_16bit,
        calib=calib,
        tokens=tokens,
        context=context,
        seed=seed,
        max_bytes=max_bytes,
        max_kl=max_kl,
        **common.arguments,
    )
    screen = common.screen
    screen.say(f"{result.quantized_tensors} linears to {result.scheme} at {result.bits_per_weight:.3f} bits per weight, {result.copied_tensors} tensors copied")
    screen.say(f"{megabytes(result.dense_bytes)} -> {megabytes(result.stored_bytes)}")
    if result.bare_tensors:
        kept = f"{plural(result.bare_tensors, 'tensor')} of experts and routers ({megabytes(result.bare_bytes)})"
        screen.say(f"{kept} stay dense: transformers gathers them while loading and cannot gather codes; `qlt export` stores them in 4 or 8 bits")
    if result.relative_error is not None:
        screen.say(f"weight error ||Q(W) - W|| / ||W||: {percent(result.relative_error)}")
    _show_calibration(screen, result)
    screen.result(result, common.written(result.output, result.seconds))


def _show_calibration(screen: Screen, result: QuantizeResult) -> None:
    """Who won where, what the whole model loses, and the frontier of a mixture."""
    if result.layers:
        rows = [(layer.name, layer.method, f"{100 * layer.error_plain:.2g} %", f"{100 * layer.error_stored:.2g} %") for layer in result.layers]
        screen.table("error of each layer's output, held-out text", ("weight", "stored by", "plain", "stored"), rows, left=2)
        won = ", ".join(f"{method} {count}" for method, count in Counter(layer.method for layer in result.layers).most_common())
        screen.say(f"stored by: {won}")
    if result.kl:
        kl = result.kl
        bounds = f" [{kl.ratio_ci95[0]:.2f}, {kl.ratio_ci95[1]:.2f}]" if kl.ratio_ci95 else ""
        screen.say(f"KL to 16 bits on {kl.tokens} held-out tokens: {kl.stored:.5f} nats, plain {kl.plain:.5f}; ratio {kl.ratio:.2f}{bounds}")
    if result.frontier:
        step = max(1, len(result.frontier) // _FRONTIER_LINES)
        points = [point for point in result.frontier if point.measured_kl is not None or point.kept % step == 0]
        lines = [(str(p.kept), megabytes(p.total_bytes), f"{p.predicted_kl:.5f}", "" if p.measured_kl is None else f"{p.measured_kl:.5f}") for p in points]
        screen.table("bytes and KL", ("linears in 16 bits", "size", "KL, summed layer by layer", "measured"), lines, left=0)
        screen.say(f"{plural(len(result.kept), 'linear')} kept in 16 bits")
