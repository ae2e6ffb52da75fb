"""What a folder was made of: inputs as a manifest records them, and the same inputs found again from that record.

An input's entry has ``name``; where it lies (``path``, from the folder that was made, or ``hub``, an id with its revision); and fingerprints.
``headers_sha256`` is over names, shapes and dtypes and the config, ``content_sha256`` over values: rows at the beginning, in the middle and at the end of
every stored tensor, which any training changes and which are read in a moment. Adapters and texts are small and hashed whole.

Left out: single bits that changed in between those rows. `qlt verify` finds them where they matter, in the weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tools.adapters.peft_config import FILE_NAME as SETTINGS
from qlora_tools.adapters.peft_files import WEIGHTS
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.statistics import Statistics
from qlora_tools.engine.plan import Source
from qlora_tools.manifest import sha256_file
from qlora_tools.specs import byte_view
from qlora_tools.verbs.opening import describe_input, folder_name

#: Tensors up to this size are hashed whole; of a larger one, whole rows at three places, of at least so many bytes together.
_WHOLE_BYTES, _PLACE_BYTES = 4096, 256


def content_sha256(stored: Source) -> str:
    """One hash over values of every tensor of ``stored``; see the module's docstring."""
    digest = hashlib.sha256()
    for name, spec in sorted(stored.specs.items()):
        digest.update(f"{spec}\n".encode())
        count = spec.shape[0] if spec.shape else 0
        if spec.nbytes <= _WHOLE_BYTES or not count:
            digest.update(byte_view(stored.read(name)))
            continue
        rows = min(max(1, _PLACE_BYTES // max(spec.row_bytes, 1)), count)
        for first in sorted({0, (count - rows) // 2, count - rows}):
            digest.update(byte_view(stored.read(name, (first, first + rows))))
    return digest.hexdigest()


def whereabouts(path: Path, dest: Path) -> dict[str, str]:
    """Where ``path`` lies, seen from ``dest``, a folder that need not be there yet; for a snapshot of the hub, what it can be had by."""
    real = path.resolve()
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return {"hub": f"{repository.name.removeprefix('models--').replace('--', '/')}@{real.name}"}
    try:
        return {"path": Path(os.path.relpath(real, dest.parent.resolve() / dest.name)).as_posix()}
    except ValueError:  # on another drive there is no way from one to the other
        return {}


def found_again(entry: Mapping[str, Any], folder: Path) -> str | Path | None:
    """The input that ``entry`` of the manifest of ``folder`` is about, as a verb takes it; ``None`` where it does not say, or nothing is there."""
    if "hub" in entry:
        return str(entry["hub"])
    if "path" not in entry:
        return None
    path = Path(os.path.normpath(folder.resolve() / str(entry["path"])))
    return path if path.exists() else None


def same_inputs(recorded: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """Whether two folders were made of the same values, in the same roles; ``None`` where entries have no fingerprint in common to tell by."""
    if recorded.keys() != given.keys() or any(changed(role, recorded[role], entry) is not None for role, entry in given.items()):
        return False
    return True if all(entry.keys() & recorded[role].keys() & {"content_sha256", "sha256"} for role, entry in given.items()) else None


def from_one_place(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether two entries of one manifest's folder name the same place: one path, or one repository of the hub in whatever revision."""
    if "path" in recorded and "path" in given:
        return bool(recorded["path"] == given["path"])
    hubs = [str(entry["hub"]).partition("@")[0] for entry in (recorded, given) if "hub" in entry]
    return len(hubs) == 2 and hubs[0] == hubs[1]


def describe_checkpoint(checkpoint: LogicalCheckpoint, dest: Path) -> dict[str, str]:
    """The entry of a model or a base."""
    return {**describe_input(checkpoint), "content_sha256": content_sha256(checkpoint.stored), **whereabouts(checkpoint.folder, dest)}


def describe_adapter(folder: Path, dest: Path) -> dict[str, str]:
    """The entry of a PEFT folder."""
    found = {"name": folder_name(folder), "sha256": sha256_file(folder / WEIGHTS), "config_sha256": sha256_file(folder / SETTINGS)}
    return found | whereabouts(folder, dest)


def describe_calibration(path: Path, dest: Path) -> dict[str, str]:
    """The entry of a text, or of a file of statistics."""
    entry = {"name": path.name, **whereabouts(path, dest)}
    if path.suffix != ".safetensors":
        return entry | {"sha256": sha256_file(path)}
    with Statistics(path) as statistics:
        return entry | {"content_sha256": content_sha256(statistics)}


@dataclass(frozen=True)
class Changed:
    """An input that is not what it was: ``role`` and ``name`` in the manifest, and in words what differs."""

    role: str
    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.role} `{self.name}` {self.what} than it had"


def changed(role: str, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> Changed | None:
    """How ``given`` differs from what was ``recorded`` of that input; ``None`` where no fingerprint of both says so."""
    words = {
        "headers_sha256": "has tensors of other names, shapes or dtypes, or another config.json",
        "sha256": "holds other values",
        "content_sha256": "holds other values",
        "config_sha256": f"has another {SETTINGS}",
    }
    name = str(recorded.get("name"))
    for field, what in words.items():
        if field in recorded and field in given and recorded[field] != given[field]:
            return Changed(role, name, what)
    return None
