"""The working folder's memory: ``.qlt/last.json`` holds the last base, adapter, exports and interrupted run.

It lets ``qlt export --merge --int8`` follow ``qlt extract ...`` without repeating paths. It is a convenience,
never a dependency: a missing or unreadable file means an empty memory, what is not as it was written is forgotten, a folder that
cannot be written costs a remark and no result, and flags override all of it.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from qlora_tools.errors import CorruptError, UsageError
from qlora_tools.manifest import misfit, read_manifest, strict_json

_MAYBE = (str, None)
_EXPORT = {"path": str, "scheme": str, "model": _MAYBE, "base": _MAYBE, "target": _MAYBE, "adapters": [[object]]}
#: What is remembered, and its shape (see ``manifest.misfit``); of adapters, pairs of a path and a weight.
_FIELDS = {"base": str, "tuned": str, "adapters": [[object]], "model": str, "exports": [_EXPORT], "run": str}


class Session:
    """Remembered paths, relative to the working folder where they lie inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / ".qlt" / "last.json"
        self._has_said = False

    def recall(self) -> dict[str, Any]:
        """What is remembered; fields that are unknown, or not as they were written, are left out."""
        try:
            content = strict_json(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        known = {name: value for name, value in content.items() if _is_as_written(name, value)} if isinstance(content, dict) else {}
        if "exports" in known:
            known["exports"] = [{**dict.fromkeys(_EXPORT), **item} for item in known["exports"]]
        return known

    def remember(self, **values: Any) -> None:
        """Store ``values`` over what was known. ``None`` forgets a field. Where nothing can be written that is said, once."""
        merged = {**self.recall(), **values}
        known = {name: value for name, value in merged.items() if value is not None}
        beside = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(exist_ok=True)
            beside.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            beside.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            self._say(f"note: {self._path.parent.name}/ of this folder cannot be written ({error.strerror}): the next verb needs its paths given")

    def _say(self, text: str) -> None:
        """A remark by the rules of the screen, which is not at hand: none with ``-q``."""
        context = click.get_current_context(silent=True)
        if not self._has_said and not (context is not None and context.params.get("quiet")):
            click.echo(text, err=True)
        self._has_said = True

    def add_export(self, made: dict[str, Any], *, last: bool = True) -> None:
        """Remember an export by its path; it becomes the last one unless ``last`` is false."""
        others = [item for item in self.recall().get("exports") or [] if item.get("path") != made["path"]]
        self.remember(exports=[*others, made] if last else [made, *others])

    def scheme_of(self, path: str) -> str | None:
        """The scheme of an export: as its manifest says."""
        try:
            manifest = read_manifest(Path(path))
        except (CorruptError, OSError):
            return None
        scheme = manifest.command.get("scheme") if manifest else None
        return None if scheme is None else str(scheme)

    def pick(self, name: str, flag: str) -> Any:
        """The remembered value of ``name``.

        Raises:
            UsageError: nothing is remembered; the hint names the flag to give instead.
        """
        value = self.recall().get(name)
        if not value:
            raise UsageError(
                f"no {name} given, and none remembered in {self._path.parent.name}/ of this folder",
                hint=f"give it with {flag}, or run the step that makes it first",
            )
        return value

    def relative(self, path: Path | str) -> str:
        """``path`` as the user would type it from the working folder."""
        path = Path(path)
        try:
            return str(path.resolve().relative_to(self.folder.resolve()))
        except ValueError:
            return str(path)


def _is_as_written(name: str, value: Any) -> bool:
    """Whether a field is known, and of its shape; adapters are pairs of a path and a weight."""
    if name not in _FIELDS or misfit(value, _FIELDS[name]) is not None:
        return False
    listed = [value] if name == "adapters" else [item["adapters"] for item in value] if name == "exports" else []
    return all(len(pair) == 2 and isinstance(pair[0], str) and misfit(pair[1], float) is None for pairs in listed for pair in pairs)
