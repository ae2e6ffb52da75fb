"""``qlt adapters``: list, use, sum, resize, compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qlora_tools.cli.options import SIZE, Shared, examples, shared, weighted
from qlora_tools.cli.screen import Screen
from qlora_tools.cli.session import Session
from qlora_tools.cli.words import megabytes, percent, plural

if TYPE_CHECKING:
    from qlora_tools.adapters.combine import Row
    from qlora_tools.verbs.adapters import KeptAdapter

EPILOG = examples(
    "qlt adapters list --base base/",
    "qlt adapters use python && qlt merge",
    "qlt adapters sum python=0.7 sql=0.3 --rank 16 -o adapters/both",
    "qlt adapters resize adapters/tuned-r64 --energy 0.95",
    "qlt adapters compare adapters/python adapters/sql",
)
_SHOWN_ROWS = 12


@click.group("adapters", epilog=EPILOG)
def command() -> None:
    """List, choose, add, shrink and compare adapters, from their factors alone."""


@command.command("list")
@click.argument("folder", type=click.Path(path_type=Path), default=Path("adapters"))
@click.option("--base", metavar="MODEL", help="Say of each adapter whether it was made for this model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
def list_command(folder: Path, base: str | None, as_json: bool, quiet: bool) -> None:
    """Show the adapters in FOLDER (default: adapters/), read from headers."""
    from qlora_tools import api

    screen = Screen(as_json=as_json, quiet=quiet)
    found = api.list_adapters(folder=folder, base=base, progress=screen.progress)
    screen.table("", ["adapter", "format", "rank", "scale", "targets", "size", "base", "made for it", "made by"], [_kept(item) for item in found], left=2)
    for item in found:
        if item.problem:
            screen.remark(f"note: {item.path.name}: {item.problem}")
    screen.result({"adapters": found}, f"{plural(len(found), 'adapter')} in {folder}")


def _kept(item: KeptAdapter) -> tuple[str, ...]:
    size = megabytes(item.stored_bytes) if item.stored_bytes else ""
    fits = "" if item.fits_base is None else "yes" if item.fits_base else "no"
    targets = ", ".join(item.targets)
    return item.path.name, item.format or "unreadable", _span(item.ranks), _span(item.scales), targets, size, item.base_name or "", fits, item.made_by


def _span(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"{values[0]:g}" if values[0] == values[1] else f"{values[0]:g} - {values[1]:g}"


@command.command("use")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
def use_command(adapters: tuple[str, ...]) -> None:
    """Make these the adapters that merge and export take by default: a folder, or its name in adapters/."""
    from qlora_tools.errors import MissingError

    session = Session(Path.cwd())
    chosen = []
    for name, weight in weighted(tuple(_known(text) for text in adapters)):
        if not (Path(name) / "adapter_config.json").is_file():
            raise MissingError(f"{name} is not a PEFT adapter", hint="see `qlt adapters list`, or bring it in with `qlt import`")
        chosen.append((session.relative(name), weight))
    session.remember(adapters=[list(pair) for pair in chosen], exports=None)
    click.echo(f"using {', '.join(path if weight == 1 else f'{path} x {weight:g}' for path, weight in chosen)}")


def _known(text: str) -> str:
    """The folder in ``adapters/`` that a bare name (with or without a weight) means, where there is one."""
    for name, weight in ((text, ""), (text.rpartition("=")[0], text.rpartition("=")[2])):
        inside = Path("adapters") / name
        if name and not Path(name).exists() and inside.exists():
            return f"{inside}={weight}" if weight else str(inside)
    return text


@command.command("sum", epilog=examples("qlt adapters sum python sql", "qlt adapters sum python=0.7 sql=0.3 --rank 16 -o adapters/both"))
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option("--rank", type=int, metavar="N", help="Cut the sum to the best adapter of this rank. Default: exact, with the ranks added up.")
@click.option("--base", metavar="MODEL", help="Check all of them, and the sum, against this model.")
@shared
def sum_command(common: Shared, adapters: tuple[str, ...], rank: int | None, base: str | None) -> None:
    """Add adapters of one base with weights: a folder or file each, or its name in adapters/."""
    from qlora_tools import api

    chosen = weighted(tuple(_known(text) for text in adapters))
    result = api.sum_adapters(adapters=chosen, rank=rank, base=base, **common.arguments)
    screen = common.screen
    if result.rows:
        screen.say(f"{plural(len(result.rows), 'layer')}, largest rank {result.total.rank}, {megabytes(result.adapter_bytes)}")
        screen.say(_cost(result.total.error, result.total.optimum) if rank else "exact: no direction was cut off")
    for note in result.notes:
        screen.remark(f"note: {note}")
    _remember(common, result.output)
    screen.result(result, common.written(result.output, result.seconds))


@command.command("resize", epilog=examples("qlt adapters resize tuned-r64 --rank 16", "qlt adapters resize tuned-r64 --max-bytes 20MB"))
@click.argument("adapter")
@click.option("--rank", type=int, metavar="N", help="At most this rank in every layer.")
@click.option("--energy", type=float, metavar="SHARE", help="Per layer, the smallest rank that keeps this share of ||delta||^2.")
@click.option("--max-bytes", type=SIZE, metavar="SIZE", help="Spend at most this much (20MB) where it keeps most.")
@shared
def resize_command(common: Shared, adapter: str, rank: int | None, energy: float | None, max_bytes: int | None) -> None:
    """Cut an adapter to a lower rank, the best of that rank, and say what it costs."""
    from qlora_tools import api

    result = api.resize_adapter(adapter=_known(adapter), rank=rank, energy=energy, max_bytes=max_bytes, **common.arguments)
    screen = common.screen
    _show_rows(screen, result.rows)
    screen.say(f"total: {percent(result.total.kept_energy)} of the energy kept, {megabytes(result.bytes_before)} to {megabytes(result.bytes_after)}")
    screen.say(_cost(result.total.error, result.total.optimum))
    for module in result.dropped:
        screen.remark(f"dropped: {module} (kept nothing)")
    _remember(common, result.output)
    screen.result(result, common.written(result.output, result.seconds))


@command.command("compare")
@click.argument("first")
@click.argument("second")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
def compare_command(first: str, second: str, as_json: bool, quiet: bool) -> None:
    """Say how two adapters' changes relate: angle, size, and how far they act on the same directions."""
    from qlora_tools import api

    screen = Screen(as_json=as_json, quiet=quiet)
    result = api.compare_adapters(first=_known(first), second=_known(second), progress=screen.progress)
    rows = [
        (row.module, f"{row.cosine:+.3f}", f"{row.ratio:.3f}", f"{row.output_overlap:.3f}", f"{row.input_overlap:.3f}", f"{row.smallest_angle:.1f}")
        for row in result.layers
    ]
    screen.table("", ["module", "cosine", "size ratio", "output overlap", "input overlap", "smallest angle"], _shortened(rows))
    for label, modules in (("first", result.only_first), ("second", result.only_second)):
        if modules:
            screen.say(f"{plural(len(modules), 'module')} only in the {label}")
    for note in result.notes:
        screen.remark(f"note: {note}")
    screen.result(result, f"cosine {result.cosine:+.4f}, size ratio {result.ratio:.3f} over {plural(len(result.layers), 'common module')}")


def _show_rows(screen: Screen, rows: tuple[Row, ...]) -> None:
    shown = [(row.module, f"{row.full_rank} to {row.cut.rank}", percent(row.cut.kept_energy), f"{row.cut.error:.4f}", f"{row.cut.optimum:.4f}") for row in rows]
    screen.table("", ["module", "rank", "kept energy", "error", "best possible"], _shortened(shown))
    if len(rows) > _SHOWN_ROWS:
        screen.say(f"({len(rows)} layers; all are in qlt-manifest.json)")


def _shortened(rows: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    return rows if len(rows) <= _SHOWN_ROWS else [*rows[: _SHOWN_ROWS - 2], ("...", *("" for _ in rows[0][1:])), rows[-1]]


def _cost(error: float, optimum: float) -> str:
    return f"relative error {error:.4f} after rounding; no adapter of these ranks can do better than {optimum:.4f}"


def _remember(common: Shared, output: Path) -> None:
    if not common.dry_run:
        common.session.remember(adapters=[[common.session.relative(output), 1.0]], exports=None)
