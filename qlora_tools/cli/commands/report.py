"""``qlt report``, and how benchmarks are told on a terminal: tables, the picked setting, changes against a baseline."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_tools.cli.options import Shared, examples, shared

if TYPE_CHECKING:
    from qlora_tools.bench.compare import Change, Compared
    from qlora_tools.bench.pick import Picked
    from qlora_tools.bench.record import BenchRecord
    from qlora_tools.cli.screen import Screen

EPILOG = examples(
    "qlt report                                 # the latest benchmark below runs/, drawn again",
    "qlt report runs/bench-001 runs/bench-002",
    "qlt report moved/bench-001 -o pages",
    "qlt report runs/bench-002 --compare runs/bench-001 --margin 3%",
    'qlt report --pick "kl<0.01,file<4GB;smallest"',
)


class _Margin(click.ParamType[float]):
    """``5%`` or ``0.05``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", str(value))
        if not match or (not match[2] and float(match[1]) >= 1):
            self.fail(f"{value!r} is not a share; write 5% or 0.05", param, ctx)
        return float(match[1]) / (100 if match[2] else 1)


MARGIN = _Margin()


def judging_options(function: Any) -> Any:
    """``--compare``, ``--margin`` and ``--pick``, which need a record and nothing else."""
    function = click.option(
        "--pick", metavar="WISHES", help='Name the best setting that meets wishes such as "kl<0.01,vram<6GB"; ";smallest" or ";closest" instead of fastest.'
    )(function)
    function = click.option("--margin", type=MARGIN, default="5%", show_default=True, help="With --compare: changes up to this share are none.")(function)
    return click.option(
        "--compare", type=click.Path(exists=True, path_type=Path), metavar="RUN", help="Hold against an older run; exits with 1 where something is worse."
    )(function)


@click.command("report", epilog=EPILOG)
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@judging_options
@shared
def command(common: Shared, runs: tuple[Path, ...], compare: Path | None, margin: float, pick: str | None) -> None:
    """Draw the table, the page and the plots of RUNS again from their bench.json. Nothing is measured."""
    from qlora_tools import api

    words = {name: value for name, value in common.arguments.items() if name != "device"}
    result = api.report(runs=runs, compare=compare, margin=margin, pick=pick, **words)
    screen = common.screen
    if len(result.reports) > 1:
        screen.table("", ["run", "title", "measured", "settings", "cases"], [_line(common, item.run, item.record) for item in result.reports], left=3)
    for item in result.reports:
        if len(result.reports) > 1:
            screen.say(common.session.relative(item.run))
        show(screen, item.record)
        tell_judgements(screen, item.picked, item.compared)
    lines = [_written(common, item.run, item.output) for item in result.reports]
    screen.result(result, "\n".join(lines))
    leave(*((item.picked, item.compared) for item in result.reports))


def leave(*judged: tuple[Picked | None, Compared | None]) -> None:
    """Exit with 1 where something got worse, or no setting meets the wishes: what scripts ask for."""
    if any((picked is not None and picked.setting is None) or (compared is not None and compared.worse) for picked, compared in judged):
        raise click.exceptions.Exit(1)


def show(screen: Screen, record: BenchRecord) -> None:
    """The table of a record, and what must be said beside it."""
    from qlora_tools.bench.table import bench_table, method, remarks

    for number, part in enumerate(bench_table(record).parts(screen.width)):
        title = record.title if number == 0 else ""
        screen.table(title, [column.stacked for column in part.columns], [[cell.text for cell in row] for row in part.rows])
    for remark in (*remarks(record), method(record)):
        if remark:
            screen.say(remark)


def tell_judgements(screen: Screen, picked: Picked | None, compared: Compared | None) -> None:
    """What was picked, and what changed."""
    if compared is not None:
        _tell_changes(screen, compared)
    if picked is None:
        return
    screen.say()
    if picked.setting is None:
        screen.say(f"no setting meets {picked.asked}")
    else:
        screen.say(f"picked {picked.name}: {'; '.join(picked.remarks)}")
        screen.say(f"make it: {picked.export}" if picked.export else "it runs as it is: nothing has to be exported")
        return
    for remark in picked.remarks:
        screen.say(remark)


def _tell_changes(screen: Screen, compared: Compared) -> None:
    screen.say()
    title = f"Against {compared.baseline}, margin {100 * compared.margin:g} %"
    rows = [[change.name, change.case.name if change.case else "", change.metric, *_figures(change), change.verdict] for change in compared.changes]
    screen.table(title, ["Setting", "Work", "Figure", "Before", "Now", "Ratio", "95 % interval", "Verdict"], rows, left=3)
    for change in compared.changes:
        if change.reason and (change.ratio is None or change.verdict == "unknown"):
            screen.say(f"{change.name}, {change.metric}: {change.verdict}: {change.reason}")
    for difference in compared.differences:
        screen.say(f"not the same: {difference.what}: {difference.old} before, {difference.new} now")
    for found, where in ((compared.missing, "only in the baseline"), (compared.added, "not in the baseline")):
        if found:
            screen.say(f"{where}: {', '.join(found)}")
    worse = compared.worse
    screen.say(f"{len(worse)} figures are worse" if worse else "nothing is worse")


def _figures(change: Change) -> list[str]:
    """Before, now, ratio, interval."""
    scale, form = {"s": (1e3, "{:.3f} ms"), "B": (1e-6, "{:,.1f} MB"), "nats": (1.0, "{:.3g}"), "share": (1e2, "{:.3g} %")}.get(change.unit, (1.0, "{:g}"))
    found = ["n/a" if value is None else form.format(value * scale) for value in (change.old, change.new)]
    ratio = "n/a" if change.ratio is None else f"{change.ratio:.3f}"
    return [*found, ratio, "" if change.ci95 is None else f"{change.ci95[0]:.3f} to {change.ci95[1]:.3f}"]


def _line(common: Shared, run: Path, record: BenchRecord) -> list[str]:
    return [common.session.relative(run), record.title, record.created, str(len(record.settings)), str(len(record.workload.cases))]


def _written(common: Shared, run: Path, output: Path | None) -> str:
    if output is None:
        return f"{common.session.relative(run)} is not in a folder of qlt bench: give -o DIR to draw its page and plots"
    where = common.session.relative(output)
    return f"dry run: would write {where}" if common.dry_run else f"wrote {where}/report.html, report.md and plots/"
