"""The working folder's memory: ``.qlt/last.json`` holds the last base, adapter, exports and interrupted run.

It lets ``qlt export --merge --int8`` follow ``qlt extract ...`` without repeating paths. It is a convenience,
never a dependency: a missing or unreadable file means an empty memory, and flags override it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qlora_tools.errors import UsageError

_FIELDS = ("base", "tuned", "adapters", "model", "exports", "run")


class Session:
    """Remembered paths, relative to the working folder where they lie inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / ".qlt" / "last.json"

    def recall(self) -> dict[str, Any]:
        """What is remembered; unknown fields are left out."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {name: content[name] for name in _FIELDS if name in content} if isinstance(content, dict) else {}

    def remember(self, **values: Any) -> None:
        """Store ``values`` over what was known. ``None`` forgets a field."""
        merged = {**self.recall(), **values}
        known = {name: value for name, value in merged.items() if value is not None}
        self._path.parent.mkdir(exist_ok=True)
        beside = self._path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        beside.replace(self._path)

    def add_export(self, made: dict[str, Any], *, last: bool = True) -> None:
        """Remember an export by its path; it becomes the last one unless ``last`` is false."""
        others = [item for item in self.recall().get("exports") or [] if item.get("path") != made["path"]]
        self.remember(exports=[*others, made] if last else [made, *others])

    def scheme_of(self, path: str) -> str | None:
        """The scheme of an export: as its manifest says."""
        try:
            command = json.loads((Path(path) / "qlt-manifest.json").read_text(encoding="utf-8"))["command"]
            return str(command["scheme"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

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
