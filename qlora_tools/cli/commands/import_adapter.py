"""``qlt import``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qlora_tools.cli.options import Shared, examples, shared
from qlora_tools.cli.words import megabytes, plural

if TYPE_CHECKING:
    from qlora_tools.verbs.import_adapter import ImportResult

EPILOG = examples(
    "qlt import downloads/my-lora.safetensors --base org/base",
    "qlt import org/some-adapter",
    "qlt import lora.pt --allow-pickle --alpha 32 --base base/",
    "qlt import style.safetensors --component unet -o adapters/style",
)


@click.command("import", epilog=EPILOG)
@click.argument("source")
@click.option("--base", metavar="MODEL", help="The model it belongs to: names, shapes and starting points are checked against it, its hashes are kept.")
@click.option("--format", "format_name", metavar="NAME", help="Read it as this format instead of recognising it.")
@click.option("--alpha", type=float, metavar="N", help="Alpha as it was in training, for files that store none.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank as it was in training: refused where a file without configuration says another.")
@click.option("--component", metavar="NAME", help="Which model of several that one file adapts, such as unet or text_encoder.")
@click.option("--allow-pickle", is_flag=True, help="Read torch's .bin and .pt files; do this for files you trust.")
@shared
def command(common: Shared, source: str, base: str | None, **choices: object) -> None:
    """Bring in an adapter of any known format (folder, file or hub id) as a PEFT folder."""
    from qlora_tools import api

    result = api.import_adapter(source=source, base=base, **choices, **common.arguments)  # type: ignore[arg-type]
    screen = common.screen
    _show(common, result)
    if not result.dry_run:
        common.session.remember(base=base or result.base_name, adapters=[[common.session.relative(result.output), 1.0]], exports=None)
    screen.result(result, common.written(result.output, result.seconds))


def _show(common: Shared, result: ImportResult) -> None:
    screen = common.screen
    low, high = result.ranks
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    more = "".join(f", {kind}" for kind in result.holds)
    screen.say(f"{result.format}: {plural(result.layers, 'layer')} of {rank}{more}, {megabytes(result.adapter_bytes)}")
    if result.moved:
        values = sorted(result.moved.values())
        screen.say(f"training moved the factors by {values[0]:.3f} to {values[-1]:.3f} of their size at the start")
    if result.base is not None:
        screen.say(f"fits {common.session.relative(result.base)}; {plural(result.fingerprints, 'fingerprint')} of its tensors kept")
    else:
        screen.remark(f"note: not checked against a base{f' (it names {result.base_name})' if result.base_name else ''}; give one with --base")
    for note in result.notes:
        screen.remark(f"note: {note}")
