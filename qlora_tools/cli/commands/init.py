"""``qlt init``."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_tools.cli.options import Shared, examples, shared
from qlora_tools.cli.words import percent, plural

EPILOG = examples(
    "qlt init --base base/ --rank 16 --calib text.txt",
    "qlt init --base base/ --method loftq --rank 16 --int8 -o start/",
    "qlt init --base base/ --method pissa --rank 16 --residual rest/ -o start/",
)


@click.command("init", epilog=EPILOG)
@click.option("--base", required=True, metavar="MODEL", help="The 16-bit base: folder or hub id.")
@click.option(
    "--method",
    type=click.Choice(["qera", "loftq", "pissa"]),
    default="qera",
    show_default=True,
    help="qera, loftq: what quantization lost, weighed by the layers' inputs or not. pissa: the leading part of the weights.",
)
@click.option("--rank", type=int, default=16, show_default=True)
@click.option("--alpha", type=float, help="LoRA alpha; the scale alpha / rank is divided out of the factors. Default: the rank.")
@click.option("--nf4", "scheme", flag_value="nf4", default="nf4", help="The base will be stored as NF4 (default).")
@click.option("--int8", "scheme", flag_value="int8", help="The base will be stored as int8.")
@click.option("--targets", default="all", show_default=True, metavar="minimal|qkv|attn|mlp|all|REGEX", help="Which linears get factors.")
@click.option(
    "--calib", metavar="TEXT|STATS|self|builtin", help="What qera weighs with: a text, a file of `qlt calibrate`, the model's own text, or the built-in one."
)
@click.option("--residual", type=click.Path(path_type=Path), metavar="DIR", help="With pissa: write the base less the adapter here, to be trained on.")
@shared
def command(
    common: Shared, base: str, method: str, rank: int, alpha: float | None, scheme: str, targets: str, calib: str | None, residual: Path | None
) -> None:
    """Make a starting adapter for training on a quantized base, as a PEFT folder."""
    from qlora_tools import api

    config = api.InitConfig(method=method, rank=rank, alpha=alpha, targets=targets)
    result = api.init(base=base, config=config, scheme=scheme, calib=calib, residual=residual, **common.arguments)
    screen = common.screen
    if result.lost is None or result.left is None:
        screen.say(f"{plural(result.tensors, 'tensor')} to start at rank {result.rank}")
    else:
        seen = "" if result.weighed_left is None else f"; of the error the layers' inputs see, {percent(result.weighed_left)} is left"
        screen.say(f"{result.scheme} loses {percent(result.lost)} of the weights, with the adapter {percent(result.left)}{seen}")
    if method == "pissa":
        if residual is None:
            screen.remark("note: this adapter belongs on the base less itself: write that with --residual DIR, and train on it")
        else:
            screen.say(f"train on {common.session.relative(residual)}, not on the base itself")
    screen.result(result, common.written(result.output, result.seconds))
