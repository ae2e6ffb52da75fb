"""Recipes: a verb's options in a TOML file, ``--config FILE`` to read and ``--save-config FILE`` to write one.

A recipe becomes click's ``default_map``, so its values pass the same checks as the command line's and lose to it. Keys are the
options' long names, with - or _; a choice between flags has one key (``base-format = "int8"``). Unknown keys are refused with the
nearest known one, and so are tables, and values that click would bend into shape (``rank = 16.7``, ``rank = true``).
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qlora_tools.cli.options import headed
from qlora_tools.errors import OutputExistsError, StorageError, UsageError
from qlora_tools.names import nearest

_MAX_BYTES = 1 << 20
#: The first line of every recipe written here.
_MARK = "# qlt recipe"
#: How a command speaks and what it does this once, which is no part of a recipe.
_NOT_IN_RECIPES = frozenset({"config", "save_config", "force", "as_json", "dry_run", "quiet", "resume", "help"})


def config_option(function: Any) -> Any:
    """``--config FILE.toml``; the command itself does not see it."""

    def read(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
        if path is not None:
            ctx.default_map = {**(ctx.default_map or {}), **read_recipe(path, ctx.command)}

    return headed("Run")(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=read,
        metavar="FILE.toml",
        help="Take options from a file; those of the command line win.",
    )(function)


def read_recipe(path: Path, command: click.Command) -> dict[str, Any]:
    """Parameter name -> value, for the options that ``command`` has.

    Raises:
        UsageError: not TOML, a key that no option has, a table, or a value of the wrong kind; the message names file and key.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path}: {path.stat().st_size} bytes are too many for a recipe")
        content = tomllib.loads(path.read_bytes().decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}", hint='a line is `name = value`, with text in quotes: lr = 2e-4, schedule = "cosine"') from error
    known = _keys(command)
    values: dict[str, Any] = {}
    for key, value in content.items():
        parameter = known.get(key.replace("_", "-"))
        if parameter is None:
            raise UsageError(
                f"{path}: `{key}` is not an option of qlt {command.name}", hint=f"did you mean {' or '.join(nearest(key.replace('_', '-'), known))}?"
            )
        assert parameter.name is not None
        if parameter.name in values:
            raise UsageError(f"{path}: `{key}` is given twice, with - and with _")
        _refuse_wrong_kind(path, key, value, parameter)
        values[parameter.name] = value
    return values


def write_recipe(path: Path, values: Mapping[str, Any], *, force: bool = False) -> None:
    """Write ``values`` (option name with _ -> value; ``None`` and empty lists are left out) so that ``--config`` reads them back.

    ``force`` replaces a file that this function wrote, and no other.

    Raises:
        OutputExistsError: the file is there. StorageError: it cannot be written.
    """
    from qlora_tools.checkpoint.folder import replace_file

    if os.path.lexists(path):
        if not force:
            raise OutputExistsError(f"{path} is already there", hint="choose another name, or replace it with --force")
        if not _is_ours(path):
            raise OutputExistsError(f"{path} does not begin with `{_MARK}`, so --force does not replace it", hint="remove it yourself, or choose another name")
    lines = [f"{name.replace('_', '-')} = {_toml(value)}" for name, value in values.items() if value is not None and value not in ((), [])]
    try:
        replace_file(path, "\n".join([_MARK, *lines, ""]).encode())
    except UnicodeEncodeError as error:
        raise StorageError(f"{path} cannot be written: {error}", hint="give paths whose names are text in UTF-8") from error


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(len(_MARK) + 2).rstrip() == _MARK.encode()


def _keys(command: click.Command) -> dict[str, click.Option]:
    """Key -> option. Flags that choose a value of one parameter share its name as the key."""
    keys: dict[str, click.Option] = {}
    for parameter in command.params:
        if not isinstance(parameter, click.Option) or parameter.name in _NOT_IN_RECIPES:
            continue
        words = [parameter.name or ""] if _chooses(parameter) else [text.lstrip("-") for text in parameter.opts if text.startswith("--")]
        keys |= {word.replace("_", "-"): parameter for word in words}
    return keys


def _chooses(option: click.Option) -> bool:
    return option.is_flag and not option.is_bool_flag


def _refuse_wrong_kind(path: Path, key: str, value: Any, option: click.Option) -> None:
    if option.multiple:
        fits, wanted = isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of texts"
    elif option.is_flag and not _chooses(option):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(option.type, click.types.IntParamType):
        fits, wanted = type(value) is int, "a whole number"
    elif isinstance(option.type, click.types.FloatParamType):
        fits, wanted = type(value) in (int, float), "a number"
    else:
        fits, wanted = isinstance(value, str), "a text in quotes"
    if not fits:
        found = "a table" if isinstance(value, dict) else str(value)[:60]
        raise UsageError(
            f"{path}: `{key}` is {found}, expected {wanted}", hint="a recipe is flat: one `name = value` a line" if isinstance(value, dict) else None
        )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
