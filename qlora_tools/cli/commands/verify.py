"""``qlt verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qlora_tools.cli.options import Shared, adapters_option, examples, shared, weighted

EPILOG = examples(
    "qlt verify exports/tuned-int8 --against tuned/",
    "qlt verify exports/base-tuned-r16-int4 --against base/ --adapter adapters/tuned-r16",
    "qlt verify exports/tuned-int4 --against tuned/ --text heldout.txt --json",
)


@click.command("verify", epilog=EPILOG)
@click.argument("export", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--against", metavar="MODEL", required=True, help="The checkpoint that it was made of: the base, where adapters are given.")
@adapters_option
@click.option("--target", type=click.Choice(["original", "trained"]), help="As it was given to qlt export.")
@click.option("--calib", metavar="TEXT|STATS", help="What the export was calibrated with: its weights are then compared bit for bit too.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to run, through the whole model. Default: random tokens, through the first layers of a large one.",
)
@shared
def command(common: Shared, export: Path, against: str, adapters: tuple[str, ...], target: str | None, calib: str | None, text: Path | None) -> None:
    """Hold EXPORT against its checkpoint again: files, weights, graph and what it computes. Exits with 1 when a check fails."""
    from qlora_tools import api

    screen, chosen = common.screen, weighted(adapters)
    if common.dry_run:
        beside = "".join(f" + {path}" for path, _ in chosen)
        screen.result(
            {"export": str(export), "against": against, "adapters": [list(pair) for pair in chosen]}, f"would verify {export} against {against}{beside}"
        )
        return
    found = api.verify(export=export, against=against, adapters=chosen, target=target, calib=calib, text=text, progress=screen.progress)
    screen.table("", ["", "check", "found"], [(check.status, check.name, check.found) for check in found.checks], left=3)
    for check in found.checks:
        if check.hint and check.status != "ok":
            screen.say(f"hint ({check.name}): {check.hint}")
    screen.result(found, "verified" if found.passed else "NOT verified")
    if common.output:
        from qlora_tools.cli.main import as_plain

        common.output.write_text(json.dumps(as_plain(found), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if not found.passed:
        raise click.exceptions.Exit(1)
