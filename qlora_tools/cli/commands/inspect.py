"""``qlt inspect``."""

from __future__ import annotations

import click

from qlora_tools.cli.options import Shared, examples, reporting
from qlora_tools.cli.words import megabytes

EPILOG = examples("qlt inspect base/", "qlt inspect adapters/tuned-r16", "qlt inspect exports/tuned-int8 --json")


@click.command("inspect", epilog=EPILOG)
@click.argument("path")
@reporting
def command(common: Shared, path: str) -> None:
    """Say what PATH holds: a checkpoint, adapter, export or safetensors file, or a hub id. Reads headers only."""
    from qlora_tools import api
    from qlora_tools.verbs.inspect import as_json

    found = api.inspect(path=path)
    screen = common.screen
    screen.say(f"{found.path}: {found.kind}")
    for name, value in found.facts.items():
        if value in ({}, [], None):
            continue
        text = (
            f"{value:,} ({megabytes(value)})"
            if name.endswith("_bytes")
            else f"{value:,}"
            if isinstance(value, int) and not isinstance(value, bool)
            else as_json(value)
        )
        screen.say(f"  {name.replace('_', ' '):<16} {text}")
    if found.made_by:
        screen.say(
            f"  {'made by':<16} qlt {' '.join(f'{key}={value}' if key != 'verb' else str(value) for key, value in found.made_by.items() if value is not None)}"
        )
    if found.groups:
        rows = [
            (group.name, group.role, str(group.count), group.dtype, "x".join(map(str, group.shape)), group.stored_as, megabytes(group.stored_bytes))
            for group in found.groups
        ]
        screen.table("", ["tensor", "role", "count", "dtype", "shape", "stored", "bytes"], rows, left=2)
    screen.result(found)
    common.report(found)
