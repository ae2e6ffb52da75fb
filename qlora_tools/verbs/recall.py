"""The inputs of an export found again from its manifest: where they were, or where they are given; what became of them; what each adapter is for.

Of the hub only what is on this machine already is found: a manifest may be a stranger's, and names what he likes, of whatever size.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tools.adapters.peft_config import FILE_NAME as SETTINGS
from qlora_tools.adapters.peft_files import WEIGHTS
from qlora_tools.checkpoint.hub import cached_model
from qlora_tools.errors import MissingError
from qlora_tools.manifest import Manifest
from qlora_tools.progress import Progress
from qlora_tools.verbs.doctor import Check
from qlora_tools.verbs.exporting import KEPT, MERGED, Given
from qlora_tools.verbs.merging import adapter_folder
from qlora_tools.verbs.opening import folder_name, open_model
from qlora_tools.verbs.origins import Changed, changed, describe_adapter, describe_calibration, describe_checkpoint, found_again


@dataclass(frozen=True)
class Recalled:
    """``checkpoint`` and ``parts`` (folder, weight, use) are what to draw. ``name``: the checkpoint's. ``original``: it is the manifest's own, as far as its
    fingerprints tell. ``missing``: adapters of the manifest that are not at hand; ``strange``: given ones that it does not name; ``changed``: inputs that
    are others than they were. ``statistics``: the file that the export was calibrated with."""

    checkpoint: str | Path
    name: str
    original: bool
    parts: tuple[tuple[str | Path, float, str], ...]
    missing: tuple[str, ...]
    strange: tuple[str, ...]
    changed: tuple[Changed, ...]
    statistics: Path | None

    @property
    def adapters(self) -> Given:
        return [(path, weight) for path, weight, _ in self.parts]

    def of(self, use: str) -> Given:
        """The adapters for one use."""
        return [(path, weight) for path, weight, found in self.parts if found == use]


def recall(manifest: Manifest, export: Path, against: str | Path | None, adapters: Given, progress: Progress) -> Recalled:
    """The inputs of ``export``. ``against`` and ``adapters`` go before what the manifest says; adapters of the manifest are looked for where none are
    given and the checkpoint is its own.

    Raises:
        MissingError: the checkpoint is not where it was, or not on this machine. What opening it raises.
    """
    role = "base" if "base" in manifest.inputs else "model"
    recorded = manifest.inputs.get(role, {})
    place = against or _at_hand(recorded, export)
    if place is None:
        hint = "give it with --against" + (f", or download it with --against {shlex.quote(recorded['hub'])}" if "hub" in recorded else "")
        raise MissingError(f"{export} was made of `{recorded.get('name')}`, which is not {_where(recorded)}", hint=hint)
    checkpoint = open_model(place, progress)
    other = changed(role, recorded, describe_checkpoint(checkpoint, export))
    original = other is None
    parts, missing, strange, differing = _adapters(manifest, export, adapters, look=against is None or original)
    statistics, calibration = _calibration(manifest, export)
    changes = (*((other,) if other else ()), *differing, *_branch(manifest, export), *calibration)
    return Recalled(place, folder_name(checkpoint.folder), original, parts, missing, strange, changes, statistics if original else None)


def _at_hand(entry: Mapping[str, Any], export: Path) -> Path | None:
    """:func:`found_again`, and of the hub what need not be downloaded."""
    place = found_again(entry, export)
    return cached_model(place) if isinstance(place, str) else place


def _adapter_at_hand(entry: Mapping[str, Any], export: Path) -> Path | None:
    """The same, where it holds an adapter."""
    place = _at_hand(entry, export)
    return place if place is not None and all((place / name).is_file() for name in (SETTINGS, WEIGHTS)) else None


def _where(entry: Mapping[str, Any]) -> str:
    if "hub" in entry:
        return "in this machine's cache of the hub"
    return f"at {entry['path']} from there any more" if "path" in entry else "said to lie anywhere"


def _whole(path: str | Path) -> Path:
    """An adapter's folder as given.

    Raises:
        MissingError: there is none, or not its weights.
    """
    folder = adapter_folder(path)
    if not (folder / WEIGHTS).is_file():
        raise MissingError(f"{folder / WEIGHTS} is not there", hint="give the folder of a whole adapter")
    return folder


Parts = tuple[tuple[str | Path, float, str], ...]


def _adapters(manifest: Manifest, export: Path, given: Given, *, look: bool) -> tuple[Parts, tuple[str, ...], tuple[str, ...], list[Changed]]:
    """Parts, missing, strange, changed. Given adapters are matched by the hash of their weights; what the manifest does not name is taken as merged."""
    waiting = [(describe_adapter(_whole(path), export), path, weight) for path, weight in given]
    parts: list[tuple[str | Path, float, str]] = []
    missing, differing = list[str](), list[Changed]()
    for role, entry in manifest.inputs.items():
        if not role.startswith("adapter"):
            continue
        said = (manifest.command.get("adapters") or {}).get(role, {"use": MERGED, "weight": 1.0})
        match = next((item for item in waiting if item[0]["sha256"] == entry.get("sha256")), None)
        place = _adapter_at_hand(entry, export) if look and not given else None
        if match is not None:
            waiting.remove(match)
            parts.append((match[1], match[2], said["use"]))
        elif place is not None:
            match = describe_adapter(adapter_folder(place), export), place, said["weight"]
            parts.append((place, float(said["weight"]), said["use"]))
        else:
            missing.append(f"`{entry.get('name')}`{' (kept)' if said['use'] == KEPT else ''}")
            continue
        differing += [found for found in [changed(role, entry, match[0])] if found]
    parts += [(path, weight, MERGED) for _, path, weight in waiting]
    return tuple(parts), tuple(missing), tuple(described["name"] for described, *_ in waiting), differing


def _branch(manifest: Manifest, export: Path) -> list[Changed]:
    entry = manifest.inputs.get("branch", {})
    place = _adapter_at_hand(entry, export)
    found = changed("branch", entry, describe_adapter(place, export)) if place is not None else None
    return [found] if found else []


def _calibration(manifest: Manifest, export: Path) -> tuple[Path | None, list[Changed]]:
    """The file of statistics, if it is the one that it was. A text is looked at, but not run again unasked."""
    entry = manifest.inputs.get("calibration", {})
    path = _at_hand(entry, export)
    if path is None or not path.is_file():
        return None, []
    found = changed("calibration", entry, describe_calibration(path, export))
    return (None, [found]) if found else (path if path.suffix == ".safetensors" else None, [])


def check_inputs(manifest: Manifest, found: Recalled) -> Check:
    """What the manifest was made of beside what is there. Never a failure by itself: a merged checkpoint stands for its base and adapter as well."""
    notes = list(_notes(manifest, found))
    if notes:
        return Check("inputs", "warn", "; ".join(notes), "give the checkpoint and the adapters that it was made of, with their weights")
    beside = [f"{use} `{folder_name(Path(path))}`{'' if weight == 1 else f' x {weight:g}'}" for path, weight, use in found.parts]
    return Check("inputs", "ok", ", ".join([f"`{found.name}`", *beside]))


def _notes(manifest: Manifest, found: Recalled) -> Iterator[str]:
    recorded = manifest.inputs.get("base", manifest.inputs.get("model", {}))
    for change in found.changed:
        if change.role in ("base", "model") and recorded.get("name") != found.name:
            yield f"the export was made of `{recorded.get('name')}`, given was `{found.name}`, which {change.what}"
        else:
            yield str(change)
    yield from (f"adapter {name} is part of the export and was not given" for name in found.missing)
    yield from (f"adapter `{name}` was given and is not part of the export" for name in found.strange)
