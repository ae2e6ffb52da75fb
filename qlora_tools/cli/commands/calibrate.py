"""``qlt calibrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qlora_tools.cli.options import Shared, examples, sharing
from qlora_tools.cli.words import megabytes, plural

if TYPE_CHECKING:
    from qlora_tools.cli.screen import Screen
    from qlora_tools.verbs.calibrate import CalibrateResult, HeardInput

EPILOG = examples(
    "qlt calibrate base/ --data text.txt -o base-stats.safetensors",
    "qlt calibrate base/ --data self",
    "qlt calibrate base/ --data builtin --fisher --tokens 65536",
)


@click.command("calibrate", epilog=EPILOG)
@click.argument("model")
@click.option(
    "--data",
    default="builtin",
    show_default=True,
    metavar="TEXT|self|builtin",
    help="A UTF-8 text file; self: the model writes its own; builtin: the text in this package.",
)
@click.option("--tokens", type=click.IntRange(min=2), default=32_768, show_default=True, help="Tokens to run through the model, a fifth of them held out.")
@click.option("--context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@click.option("--fisher", is_flag=True, help="Also the gradients at every output, of labels drawn from the model itself.")
@click.option(
    "--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True, help="What the model computes in; auto is fp32 on the CPU."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the text that the model writes and of the labels drawn.")
@sharing("FILE", "Where to write the statistics. Default: statistics/MODEL-TEXT.safetensors.")
def command(common: Shared, model: str, data: str, tokens: int, context: int, fisher: bool, dtype: str, seed: int) -> None:
    """Take the statistics that calibrated verbs read (--calib); MODEL is a folder or a hub id. One block of weights is in memory at a time."""
    from qlora_tools import api

    result = api.calibrate(model=model, data=data, tokens=tokens, context=context, fisher=fisher, dtype=dtype, seed=seed, **common.arguments)
    _show(common.screen, result)
    common.screen.result(result, common.written(result.output, result.seconds))


def _show(screen: Screen, result: CalibrateResult) -> None:
    rows = [
        ("text", f"{result.text}: {result.windows} windows of {result.context} tokens, {result.tokens} tokens teach, {result.held_out_tokens} judge"),
        ("file", f"{'at most ' if result.dry_run else ''}{megabytes(result.bytes)}"),
    ]
    if result.inputs:
        ranks = sorted(heard.effective_rank / heard.size for heard in result.inputs)
        narrow = min(result.inputs, key=lambda heard: heard.effective_rank / heard.size)
        rows += [
            ("kept", f"{plural(len(result.inputs), 'input')} of {plural(result.weights, 'linear')}{', output gradients' if result.fisher else ''}"),
            (
                "effective rank",
                f"median {100 * ranks[len(ranks) // 2]:.1f} % of the inputs, least {narrow.effective_rank:.1f} of {narrow.size} ({narrow.weight})",
            ),
            ("dead inputs", _dead(result.inputs)),
            ("peak memory", megabytes(result.peak_rss_bytes) if result.peak_rss_bytes else ""),
        ]
    screen.card("calibrated", rows)
    if result.rank_deficient:
        screen.remark(f"{plural(result.rank_deficient, 'input')} wider than the {result.tokens} tokens that taught: more --tokens give steadier statistics")


def _dead(inputs: tuple[HeardInput, ...]) -> str:
    dead = [heard for heard in inputs if heard.dead]
    return f"{sum(heard.dead for heard in dead)} in {plural(len(dead), 'layer')}" if dead else "none"
