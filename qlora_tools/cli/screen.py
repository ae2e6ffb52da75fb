"""Everything the user sees: data on standard output, progress and remarks on standard error.

Bars are drawn only when standard error is a terminal; with ``-q`` or ``--json`` remarks are dropped too.
rich is imported at the first drawing, so that help texts stay fast.

Names, titles and notes come out of other people's files. Whatever is shown goes through :func:`~qlora_tools.cli.words.printable`, a pipe included, since
what it ends in is shown later, and rich is never let to read it as markup or emoji. JSON is not changed: it spells such characters out by itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from qlora_tools.cli.words import printable
from qlora_tools.progress import SILENT, Progress, Task


class Screen:
    """How one command speaks."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    @property
    def progress(self) -> Progress:
        """Bars on a terminal, remarks alone elsewhere, nothing when quiet."""
        if self.quiet:
            return SILENT
        return _Bars() if sys.stderr.isatty() else _Remarks()

    def say(self, text: str = "") -> None:
        """One line of the result, for people."""
        if not self.as_json and not self.quiet:
            click.echo(printable(text))

    def remark(self, text: str) -> None:
        """One line beside the result, on standard error."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def result(self, record: Any, text: str = "") -> None:
        """The result: JSON if asked, otherwise ``text`` (also with ``-q``, when it is all there is)."""
        from qlora_tools.cli.main import as_plain

        if self.as_json:
            click.echo(json.dumps(as_plain(record), indent=2, sort_keys=True, default=str))
        elif text:
            click.echo(printable(text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
        """A table; the first ``left`` columns hold words, the others numbers."""
        if self.as_json or self.quiet:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        drawn = Table(title=printable(title) or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for position, column in enumerate(columns):
            drawn.add_column(column, justify="left" if position < left else "right", overflow="fold")
        for row in rows:
            drawn.add_row(*map(printable, row))
        Console(width=self.width, highlight=False, markup=False, emoji=False).print(drawn)

    @property
    def width(self) -> int:
        """Characters in a line of tables: the terminal's, 140 elsewhere."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else 140

    def card(self, title: str, rows: Sequence[tuple[str, str]], *, err: bool = False) -> None:
        """What belongs together, a name and a value per row: framed on a terminal, plain lines elsewhere. ``err``: on standard error."""
        rows = [(printable(name), printable(value)) for name, value in rows if value]
        if self.quiet or (self.as_json and not err) or not rows:
            return
        stream = sys.stderr if err else sys.stdout
        width = max(len(name) for name, _ in rows)
        if not stream.isatty():
            for name, value in rows:
                click.echo(f"{name:<{width}}  {value}", err=err)
            return
        from rich import box
        from rich.console import Console
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for name, value in rows:
            grid.add_row(Text(name, style="dim"), Text(value))
        Console(file=stream, highlight=False, markup=False, emoji=False).print(Panel(grid, title=title, title_align="left", box=box.ROUNDED, expand=False))


class _Remarks:
    """Notes as plain lines, no bars: standard error is a file or a pipe."""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        with SILENT.task(title, total, unit) as task:
            yield task

    def note(self, message: str) -> None:
        click.echo(printable(message), err=True)


class _Bars(_Remarks):
    """One rich bar per task, with bytes or counts, speed and the time left."""

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        counted = (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (MofNCompleteColumn(), TextColumn(unit))
        said, label = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[label]}", style="dim", markup=False)
        columns = (said, BarColumn(bar_width=24), *counted, TimeRemainingColumn(), label)
        quiet_clock = unit == "runs"  # beside measured processes nothing of ours may wake up by itself
        with RichProgress(*columns, console=Console(stderr=True), transient=True, auto_refresh=not quiet_clock) as drawn:
            number = drawn.add_task(printable(title) or "working", total=total, label="")

            class Bar:
                def advance(self, amount: float = 1, label: str = "") -> None:
                    drawn.update(number, advance=amount, label=printable(label)[-48:], refresh=quiet_clock)

            yield Bar()
