"""``qlt merge``."""

from __future__ import annotations

import click

from qlora_tools.cli.options import Shared, adapters_option, examples, shared, weighted
from qlora_tools.cli.words import megabytes, percent, plural

EPILOG = examples(
    "qlt merge --base base/ --adapter adapters/tuned-r16",
    "qlt merge --base base/ --adapter x --adapter y=0.5 -o both/",
    "qlt merge --nf4                      # base and adapter of the step before, requantized",
    "qlt merge --base base-nf4/ --adapter x --onto dequantized",
)


@click.command("merge", epilog=EPILOG)
@click.option("--base", metavar="MODEL", help="The model to merge into: folder or hub id. Default: the last one used.")
@adapters_option
@click.option("--nf4", "scheme", flag_value="nf4", help="Requantize the result to NF4 with double quantization.")
@click.option("--int8", "scheme", flag_value="int8", help="Requantize the result to int8.")
@click.option(
    "--onto", type=click.Choice(["original", "dequantized"]), help="Add to the weights as given, or to what a quantized base decodes to. Default: as given."
)
@shared
def command(common: Shared, base: str | None, adapters: tuple[str, ...], scheme: str | None, onto: str | None) -> None:
    """Merge adapters into a checkpoint, requantize it if asked, and print how much of the adapter survives."""
    from qlora_tools import api

    base, chosen = common.base_and_adapters(base, weighted(adapters))
    result = api.merge(
        base=base,
        adapters=chosen,
        scheme=scheme,
        onto=onto,
        **common.arguments,
    )
    screen = common.screen
    screen.say(f"{plural(result.changed_tensors, 'tensor')} changed, merged onto the {result.onto} weights, {megabytes(result.stored_bytes)}")
    if result.retention is not None:
        screen.say(f"size of the change ||D|| / ||W||: {percent(result.retention.delta_ratio)}")
        screen.say(f"share of it that survives storing: {percent(result.retention.retention)} (noise added: {result.retention.noise:.2f} ||D||)")
    if result.untied:
        screen.remark(f"note: {', '.join(result.untied)} is no longer tied; config.json says so")
    if result.erased:
        screen.remark("warning: most of the adapter is rounded away on this grid")
        screen.remark("hint: give the 16-bit model as --base (--onto original), store 16-bit or --int8, or keep the adapter beside the base")
    if not result.dry_run:
        common.session.remember(model=str(result.output))
    screen.result(result, common.written(result.output, result.seconds))
