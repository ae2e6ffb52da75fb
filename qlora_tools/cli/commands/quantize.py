"""``qlt quantize``."""

from __future__ import annotations

import click

from qlora_tools.cli.options import Shared, examples, shared
from qlora_tools.cli.words import megabytes, percent

EPILOG = examples(
    "qlt quantize base/ --nf4",
    "qlt quantize org/name --int8 -o small/",
    "qlt quantize base/ --nf4 --block-size 32 --dry-run",
)


@click.command("quantize", epilog=EPILOG)
@click.argument("model")
@click.option("--nf4", "scheme", flag_value="nf4", help="4-bit NormalFloat with double quantization (default).")
@click.option("--int8", "scheme", flag_value="int8", help="LLM.int8() row-wise.")
@click.option(
    "--block-size", type=click.Choice(["32", "64", "128", "256", "512", "1024", "2048", "4096"]), default="64", show_default=True, help="Weights per NF4 block."
)
@click.option("--double-quant/--no-double-quant", default=True, show_default=True, help="Quantize the NF4 block scales to 8 bits.")
@shared
def command(common: Shared, model: str, scheme: str | None, block_size: str, double_quant: bool) -> None:
    """Quantize a checkpoint; MODEL is a folder or a hub id. Stock transformers loads the result."""
    from qlora_tools import api

    result = api.quantize(
        model=model,
        scheme=scheme or "nf4",
        block_size=int(block_size),
        double_quant=double_quant,
        **common.arguments,
    )
    screen = common.screen
    screen.say(f"{result.quantized_tensors} linears to {result.scheme} at {result.bits_per_weight:.3f} bits per weight, {result.copied_tensors} tensors copied")
    screen.say(f"{megabytes(result.dense_bytes)} -> {megabytes(result.stored_bytes)}")
    if result.relative_error is not None:
        screen.say(f"weight error ||Q(W) - W|| / ||W||: {percent(result.relative_error)}")
    screen.result(result, common.written(result.output, result.seconds))
