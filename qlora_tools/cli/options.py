"""Options that several verbs share, as decorators, and the :class:`Shared` record they fill."""

from __future__ import annotations

import functools
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

    def written(self, output: Path, seconds: float) -> str:
        """The last line of a verb that writes a folder."""
        return f"dry run: would write {self.session.relative(output)}" if self.dry_run else f"wrote {self.session.relative(output)} in {seconds:.1f} s"


def shared(function: F) -> F:
    """``-o --force --device --json --dry-run -q``; the command gets one :class:`Shared` as its first argument."""

    @click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Where to write. Default: a name made of inputs and setting.")
    @click.option("--force", is_flag=True, help="Replace an output that qlt made before.")
    @click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute.")
    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    @click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
    @functools.wraps(function)
    def command(*args: Any, output: Path | None, force: bool, device: str, as_json: bool, dry_run: bool, quiet: bool, **kwargs: Any) -> Any:
        screen = Screen(as_json=as_json, quiet=quiet)
        return function(Shared(output, force, device, dry_run, screen, Session(Path.cwd())), *args, **kwargs)

    return command  # type: ignore[return-value]


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
