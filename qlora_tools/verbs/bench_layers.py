"""The report's section on layers: what manifests say of an extraction, and of a merge, layer by layer. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_tools.bench.record import Layer
from qlora_tools.manifest import read_manifest
from qlora_tools.verbs.opening import readable_manifest
from qlora_tools.verbs.origins import found_again


def layers_of(folder: Path) -> list[Layer]:
    """The layers of an adapter's folder, with ranks, energies and singular values as far as its manifest has them, or of a merged checkpoint's, with how
    much of the adapter's change each stored tensor holds; empty for folders made elsewhere."""
    manifest = read_manifest(folder)
    if manifest is None:
        return []
    if manifest.command.get("verb") == "merge":
        return [_retained(row) for row in manifest.report.get("tensors", [])]
    return [_extracted(row) for row in manifest.report.get("rows", [])]


def layers_of_models(folders: Iterable[Path], adapters: Sequence[Path]) -> list[Layer]:
    """What is known of the layers of what is benched: its adapters', and those of the one merged checkpoint that it is, or was exported from.

    Retentions are added where there is exactly one such merge: a layer has one figure.
    """
    rows = [layer for folder in adapters for layer in layers_of(folder)]
    merges = {str(found.resolve()): found for folder in folders if (found := _merge_behind(folder)) is not None}
    if len(merges) != 1:
        return rows
    kept = {layer.name: layer for layer in layers_of(next(iter(merges.values())))}
    if not rows:
        return list(kept.values())
    return [replace(row, retention=kept[row.name].retention) if row.name in kept else row for row in rows]


def _merge_behind(folder: Path) -> Path | None:
    """The merged checkpoint with a report that ``folder`` is, or that its manifest says it was exported from."""
    manifest = readable_manifest(folder)  # a folder of another version can be measured all the same
    if manifest is not None and manifest.kind == "export" and "model" in manifest.inputs:
        origin = found_again(manifest.inputs["model"], folder)
        folder = Path(origin) if isinstance(origin, Path) else folder
        manifest = readable_manifest(folder)
    return folder if manifest is not None and manifest.command.get("verb") == "merge" and manifest.report.get("tensors") else None


def _extracted(row: Mapping[str, Any]) -> Layer:
    found = row.get("certificate") or row["cut"]
    best = 1 - found["optimum"] ** 2
    values = row.get("singular_values")
    return Layer(
        row.get("name") or row["module"],
        tuple(row.get("shape") or ()),
        found["rank"],
        kept_energy=1 - found["error"] ** 2,
        best_energy=best,
        relative_error=found["error"],
        singular_values=tuple(values) if values else None,
    )


def _retained(row: Mapping[str, Any]) -> Layer:
    return Layer(row["name"], (), 0, retention=row.get("retention"))
