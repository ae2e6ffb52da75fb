"""Options that several verbs share, as decorators, and the :class:`Shared` record they fill."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import click

from qlora_tools.cli.screen import Screen
from qlora_tools.cli.session import Session


class Size(click.ParamType[int]):
    """``20MB``, ``1.5GB``, ``512KiB`` or a plain number of bytes; with ``needs_unit`` that is refused, where half of its readers would mean another unit."""

    name = "size"
    _units: ClassVar[dict[str, float]] = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}

    def __init__(self, *, needs_unit: bool = False) -> None:
        self.known = self._units if needs_unit else {"": 1, **self._units}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
        if not match or match[2].lower() not in self.known:
            self.fail(f"{value!r} is not a size; write 20MB, 1.5GiB{' or a number of bytes' if '' in self.known else ''}", param, ctx)
        return int(float(match[1]) * self.known[match[2].lower()])


SIZE = Size()
#: What a file that a verb's ``-o`` wrote says of itself: nothing else is replaced with ``--force``.
RESULT = "qlt.result/1"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Shared:
    """What every verb gets: where to write, on which device, and how to speak."""

    output: Path | None
    force: bool
    device: str
    dry_run: bool
    screen: Screen
    session: Session

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords that every verb which writes takes."""
        return {"output": self.output, "force": self.force, "device": self.device, "dry_run": self.dry_run, "progress": self.screen.progress}

    def base_and_adapters(self, base: str | None, adapters: list[tuple[str, float]]) -> tuple[str, list[tuple[str, float]]]:
        """The flags, or what the session remembers in their place; says on standard error what it picked up."""
        picked = []
        if base is None:
            base = str(self.session.pick("base", "--base"))
            picked.append(f"base {base}")
        if not adapters:
            adapters = [(str(path), float(weight)) for path, weight in self.session.pick("adapters", "--adapter")]
            picked.append(f"adapter {', '.join(path if weight == 1 else f'{path} x {weight}' for path, weight in adapters)}")
        if picked:
            self.screen.remark(f"using {' and '.join(picked)}")
        return base, adapters

    def report(self, result: Any) -> None:
        """Write ``result`` as JSON where ``-o`` says, of a verb that makes no folder.

        Raises:
            StorageError: the disk refused.
        """
        if self.output is not None and not self.dry_run:
            from qlora_tools.checkpoint.folder import replace_file
            from qlora_tools.cli.main import as_plain

            marked = {"schema": RESULT, **as_plain(result)}
            replace_file(self.output, f"{json.dumps(marked, indent=2, sort_keys=True)}\n".encode())

    def written(self, output: Path, seconds: float) -> str:
        """The last line of a verb that writes a folder."""
        return f"dry run: would write {self.session.relative(output)}" if self.dry_run else f"wrote {self.session.relative(output)} in {seconds:.1f} s"


def sharing(metavar: str, output_help: str, check: Callable[[Path, bool], None] | None = None) -> Callable[[F], F]:
    """``-o --force --device --json --dry-run -q`` as a decorator; the command gets one :class:`Shared` as its first argument. ``check``: of the output and
    ``--force``, before anything is done."""

    def decorate(function: F) -> F:
        @click.option("-o", "--output", type=click.Path(path_type=Path), metavar=metavar, help=output_help)
        @click.option("--force", is_flag=True, help="Replace an output that qlt made before.")
        @click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute.")
        @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
        @click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
        @click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
        @functools.wraps(function)
        def command(*args: Any, output: Path | None, force: bool, device: str, as_json: bool, dry_run: bool, quiet: bool, **kwargs: Any) -> Any:
            if check is not None and output is not None:
                check(output, force)
            screen = Screen(as_json=as_json, quiet=quiet)
            return function(Shared(output, force, device, dry_run, screen, Session(Path.cwd())), *args, **kwargs)

        return command  # type: ignore[return-value]

    return decorate


def check_report(path: Path, force: bool) -> None:
    """Refuse a file that is there, unless it holds a result, which ``force`` may replace.

    Raises:
        OutputExistsError: it is not to be written over.
    """
    from qlora_tools.errors import OutputExistsError

    if not os.path.lexists(path):
        return
    if not force:
        raise OutputExistsError(f"{path} is already there", hint="choose another file with -o, or replace it with --force")
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("schema") != RESULT:
        raise OutputExistsError(f"{path} holds no result of qlt, so --force does not replace it", hint="remove it yourself, or choose another file with -o")


#: For verbs that make a folder, and for those whose result is what they print.
shared = sharing("DIR", "Where to write. Default: a name made of inputs and setting.")
reporting = sharing("FILE", "Also write the result there, as JSON.", check_report)


class Headed(click.Option):
    """An option that the help text lists under ``heading``."""

    def __init__(self, *args: Any, heading: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class HeadedCommand(click.Command):
    """A command whose help lists :class:`Headed` options under their headings, in order of appearance, and the others last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(parameter.heading if isinstance(parameter, Headed) else "", []).append(record)
        for heading in sorted(sections, key=lambda heading: heading == ""):
            with formatter.section(heading or "Options"):
                formatter.write_dl(sections[heading])


def headed(heading: str) -> Callable[..., Callable[[F], F]]:
    """``click.option`` for options under ``heading``."""
    return functools.partial(click.option, cls=Headed, heading=heading)


def adapters_option(function: F) -> F:
    """``--adapter PATH[=WEIGHT]``, repeatable."""
    return click.option("--adapter", "adapters", multiple=True, metavar="DIR[=WEIGHT]", help="Adapter folder, with a weight if wanted; repeat for several.")(
        function
    )


def weighted(adapters: tuple[str, ...]) -> list[tuple[str, float]]:
    """``("x", "y=0.5")`` as ``[("x", 1.0), ("y", 0.5)]``.

    Raises:
        click.BadParameter: the weight is no number.
    """
    result = []
    for text in adapters:
        path, sign, weight = text.rpartition("=")
        if not sign or Path(text).exists():
            result.append((text, 1.0))
            continue
        try:
            result.append((path, float(weight)))
        except ValueError:
            raise click.BadParameter(f"{weight!r} is not a weight", param_hint="--adapter") from None
    return result


def examples(*lines: str) -> str:
    """An epilog of runnable lines."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
