"""``qlt verify``."""

from __future__ import annotations

from pathlib import Path

import click

from qlora_tools.cli.options import Shared, adapters_option, examples, reporting, weighted

EPILOG = examples(
    "qlt verify exports/tuned-int8                 # against what it was made of, as its manifest says",
    "qlt verify exports/base-tuned-r16-int4 --against elsewhere/base",
    "qlt verify exports/base-tuned-r16-int4 --against base/ --adapter adapters/tuned-r16=0.5",
    "qlt verify exports/tuned-int4 --text heldout.txt --json",
)


@click.command("verify", epilog=EPILOG)
@click.argument("export", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--against", metavar="MODEL", help="The checkpoint to hold it against: the base, where it has adapters. Default: where it was.")
@adapters_option
@click.option("--target", type=click.Choice(["original", "trained"]), help="As it was given to qlt export. Default: as it was.")
@click.option(
    "--calib",
    metavar="TEXT|STATS",
    help="What the export was calibrated with: its weights are then compared bit for bit too. Default: the file of statistics, where it was.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8 text to run, through the whole model. Default: random tokens, through the first layers of a large one.",
)
@reporting
def command(common: Shared, export: Path, against: str | None, adapters: tuple[str, ...], target: str | None, calib: str | None, text: Path | None) -> None:
    """Hold EXPORT against its checkpoint again: files, weights, graph and what it computes. Exits with 1 when a check fails."""
    from qlora_tools import api

    screen, chosen = common.screen, weighted(adapters)
    found = api.verify(export=export, against=against, adapters=chosen, target=target, calib=calib, text=text, dry_run=common.dry_run, progress=screen.progress)
    if found.dry_run:
        screen.result(found, f"would verify {export} against {' + '.join([found.against, *found.adapters])}")
        return
    screen.table("", ["", "check", "found"], [(check.status, check.name, check.found) for check in found.checks], left=3)
    for check in found.checks:
        if check.hint and check.status != "ok":
            screen.say(f"hint ({check.name}): {check.hint}")
    screen.result(found, "verified" if found.passed else "NOT verified")
    common.report(found)
    if not found.passed:
        raise click.exceptions.Exit(1)
