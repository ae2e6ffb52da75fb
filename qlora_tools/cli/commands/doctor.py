"""``qlt doctor``."""

from __future__ import annotations

import click

from qlora_tools.cli.options import Shared, examples, reporting

EPILOG = examples("qlt doctor", "qlt doctor --json")


@click.command("doctor", epilog=EPILOG)
@reporting
def command(common: Shared) -> None:
    """Check this installation: libraries, kernels, GPU, disk. Exits with 1 when a check fails."""
    from qlora_tools import api

    found = api.doctor()
    screen = common.screen
    screen.table("", ["", "check", "found"], [(check.status, check.name, check.found) for check in found.checks], left=3)
    for check in found.checks:
        if check.hint and check.status != "ok":
            screen.say(f"hint ({check.name}): {check.hint}")
    screen.say("  ".join(f"{name} {value}" for name, value in found.machine.items()))
    screen.say("  ".join(f"{name} {version}" for name, version in found.versions.items()))
    screen.result(found)
    common.report(found)
    if not found.healthy:
        raise click.exceptions.Exit(1)
