"""``qlt convert``."""

from __future__ import annotations

import click

from qlora_tools.cli.options import Shared, examples, shared
from qlora_tools.cli.words import plural

EPILOG = examples(
    "qlt convert adapters/tuned-r16 --to gguf --base base/",
    "qlt convert style.safetensors --to diffusers -o style-diffusers",
    "qlt convert adapters/unet-lora --to kohya --component unet",
    "qlt convert adapters/new --to onnx_adapter --base base/ --for exports/base-int4   # one more adapter for that graph",
)


@click.command("convert", epilog=EPILOG)
@click.argument("adapter")
@click.option("--to", required=True, metavar="peft|kohya|diffusers|gguf|mlx|onnx_adapter", help="The format to write.")
@click.option("--base", metavar="MODEL", help="The model it belongs to; formats whose names depend on it need one.")
@click.option("--for", "for_export", metavar="EXPORT", help="With --to onnx_adapter: for the graph of this export, which keeps adapters apart.")
@click.option("--format", "format_name", metavar="NAME", help="Read it as this format instead of recognising it.")
@click.option("--alpha", type=float, metavar="N", help="Alpha as it was in training, for files that store none.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank as it was in training: refused where a file without configuration says another.")
@click.option("--component", metavar="NAME", help="Which model of several to take, or what the one there is shall be called (unet, text_encoder).")
@click.option("--allow-pickle", is_flag=True, help="Read torch's .bin and .pt files; do this for files you trust.")
@shared
def command(common: Shared, adapter: str, **choices: object) -> None:
    """Write an adapter in another format; what that format cannot carry is refused by name."""
    from qlora_tools import api

    result = api.convert(adapter=adapter, **choices, **common.arguments)  # type: ignore[arg-type]
    screen = common.screen
    of = f" of {', '.join(result.components)}" if result.components else ""
    screen.say(f"{result.read_as} to {result.written_as}: {plural(result.layers, 'layer')}{of}{': ' if result.files else ''}{', '.join(result.files)}")
    for note in result.notes:
        screen.remark(f"note: {note}")
    screen.result(result, common.written(result.output, result.seconds))
