"""Which exports belong together, and which may judge another: those made of the same inputs in the same way, as their manifests say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qlora_tools.verbs.opening import readable_manifest
from qlora_tools.verbs.origins import same_inputs

#: What an export is called that quality is judged against.
SCHEME = "fp32"
#: Whether rounding looked at data is no matter of what the graph should compute.
_ASIDE = "calibration"
_SAME = ("adapters", "target", "task", "kept")


def judges(reference: Path, export: Path) -> bool:
    """Whether ``reference`` is an fp32 export of what ``export`` was made of. Not without fingerprints: a folder's name says nothing."""
    first = readable_manifest(reference)
    return first is not None and first.command.get("scheme") == SCHEME and of_one_model(reference, export)


def of_one_model(export: Path, other: Path) -> bool:
    """Whether two exports should compute the same: their inputs have the same fingerprints, and went in in the same way."""
    first, second = (readable_manifest(folder) for folder in (export, other))
    if first is None or second is None or {first.kind, second.kind} != {"export"}:
        return False
    inputs = [{role: entry for role, entry in manifest.inputs.items() if role != _ASIDE} for manifest in (first, second)]
    return all(first.command.get(name) == second.command.get(name) for name in _SAME) and same_inputs(*inputs)


def places_beside(export: Path, scheme: str) -> Iterator[Path]:
    """Where the reference of ``export``, made with ``scheme``, may lie: ``tuned-fp32`` for ``tuned-int8``, then ``tuned-fp32-2``, ..."""
    first = export.parent / f"{export.name.removesuffix('-' + scheme)}-{SCHEME}"
    yield first
    number = 2
    while True:
        yield first.with_name(f"{first.name}-{number}")
        number += 1
