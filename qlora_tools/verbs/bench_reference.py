"""Which exports belong together, and which may judge another: those made of the same inputs in the same way, as their manifests say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_tools.manifest import Manifest
from qlora_tools.verbs.exporting import KEPT, Drawn
from qlora_tools.verbs.opening import readable_manifest
from qlora_tools.verbs.origins import same_inputs

#: What an export is called that quality is judged against.
SCHEME = "fp32"


def judges(reference: Path, export: Path) -> bool:
    """Whether ``reference`` is an fp32 export of what ``export`` was made of. Not without fingerprints: a folder's name says nothing."""
    first = readable_manifest(reference)
    return first is not None and first.command.get("scheme") == SCHEME and of_one_model(reference, export) is True


def of_one_model(export: Path, other: Path) -> bool | None:
    """Whether two exports should compute the same, no adapter being on: their inputs have the same fingerprints, and went in in the same way. ``None``
    where a manifest does not tell."""
    first, second = (readable_manifest(folder) for folder in (export, other))
    if first is None or second is None:
        return None
    if {first.kind, second.kind} != {"export"} or first.command.get("task") != second.command.get("task"):
        return False
    return _alike(_made(first.inputs, first.command), _made(second.inputs, second.command))


def is_made_of(export: Path, drawn: Drawn) -> bool:
    """Whether ``export`` computes what an export of ``drawn`` made now, and without further words, would compute."""
    from qlora_tools.verbs.export_traced import own_task  # brings transformers with it

    manifest: Manifest | None = readable_manifest(export)
    if manifest is None or manifest.kind != "export":
        return False
    task = manifest.command.get("task")
    uses = {role: {"use": part.use, "weight": part.weight} for role, part in zip(drawn.roles, drawn.adapters, strict=True)}
    now = _made(drawn.inputs(export), {"adapters": uses, "target": drawn.target, "simulated": drawn.simulated})
    return (task is None or task == own_task(drawn.config)) and _alike(_made(manifest.inputs, manifest.command), now) is True


def places_beside(export: Path, scheme: str) -> Iterator[Path]:
    """Where the reference of ``export``, made with ``scheme``, may lie: ``tuned-fp32`` for ``tuned-int8``, then ``tuned-fp32-2``, ..."""
    first = export.parent / f"{export.name.removesuffix('-' + scheme)}-{SCHEME}"
    yield first
    number = 2
    while True:
        yield first.with_name(f"{first.name}-{number}")
        number += 1


_Made = tuple[list[Any], dict[str, Mapping[str, Any]]]


def _made(inputs: Mapping[str, Mapping[str, Any]], command: Mapping[str, Any]) -> _Made:
    """(how, of what). Kept adapters are left out, which do nothing until they are put on, and texts, which decide about rounding alone."""
    parts = {"model": inputs.get("base") or inputs.get("model") or {}}
    parts |= {"branch": inputs["branch"]} if "branch" in inputs else {}
    ways: list[Any] = []
    for role, part in (command.get("adapters") or {}).items():
        if part.get("use") != KEPT:
            parts[f"adapter {len(ways)}"] = inputs.get(role, {})
            ways.append((part.get("use"), part.get("weight")))
    return [*ways, command.get("target"), command.get("simulated")] if ways else [], parts


def _alike(one: _Made, other: _Made) -> bool | None:
    return same_inputs(one[1], other[1]) if one[0] == other[0] else False
