"""``qlt import``: an adapter of any known format as a PEFT folder."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_tools.adapters.combine import kinds_of
from qlora_tools.adapters.portable import Portable
from qlora_tools.adapters.stored import Hints
from qlora_tools.checkpoint.folder import check_output
from qlora_tools.errors import UsageError
from qlora_tools.names import slug
from qlora_tools.progress import SILENT, Progress
from qlora_tools.verbs.adapter_files import adapter_path, load, one_component, save_peft, source_name
from qlora_tools.verbs.opening import open_model, resolve_device


@dataclass(frozen=True)
class ImportResult:
    """What was (or would be) written. ``ranks``: smallest and largest. ``holds``: what it has beside plain linear factors. ``moved``: for an adapter that started inside the weights
    (PiSSA, OLoRA), how far training took each module from there, relative to where it started."""

    output: Path
    source: Path
    format: str
    base: Path | None
    base_name: str | None
    dry_run: bool
    layers: int
    ranks: tuple[int, int]
    holds: tuple[str, ...]
    replaced: tuple[str, ...]
    fingerprints: int
    adapter_bytes: int
    notes: tuple[str, ...]
    moved: dict[str, float]
    seconds: float


def import_adapter(
    *,
    source: str | Path,
    base: str | Path | None = None,
    format_name: str | None = None,
    alpha: float | None = None,
    rank: int | None = None,
    component: str | None = None,
    allow_pickle: bool = False,
    output: Path | None = None,
    force: bool = False,
    device: str = "auto",
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ImportResult:
    """Recognise the adapter in ``source`` (folder, file or hub id) and write it for PEFT; every key ends in it or is refused by name.

    ``base`` is needed where the file does not tell names, orders or starting points; with it everything is checked against the
    model, and the sha256 of its changed tensors are kept. ``alpha``: for files that store none. ``rank``: as it was in
    training, refused where the tensors of such a file say another. ``component``: of a file for several models. ``allow_pickle``: read
    torch's pickle format.
    """
    began = time.perf_counter()
    path = adapter_path(source)
    checkpoint = open_model(base, progress) if base is not None else None
    dest = output or Path("adapters") / slug(source_name(path))
    inputs = [path, *([checkpoint.folder] if checkpoint else [])]
    check_output(dest, force=force, inputs=inputs)
    hints = Hints(alpha=alpha, rank=rank, component=component)
    loaded = load(path, base=checkpoint, format_name=format_name, hints=hints, allow_pickle=allow_pickle, device=resolve_device(device), progress=progress)
    if component is not None and component not in loaded.components:
        raise UsageError(f"{path} is for one model and names no components", hint="leave --component out")
    loaded = one_component(loaded, component)
    portable = _named(loaded.portable, base)
    if not dry_run:
        save_peft(
            portable,
            dest,
            command={"verb": "import", "format": loaded.format, "alpha": alpha, "rank": rank, "component": component},
            inputs={"adapter": loaded.described()},
            sources=inputs,
            base=checkpoint,
            base_tensors=loaded.base_tensors,
            task_type=loaded.task_type,
            report={"notes": list(portable.notes), "moved": dict(loaded.restored.moved) if loaded.restored else {}},
            force=force,
        )
    ranks = [layer.rank for layer in portable.layers.values()]
    return ImportResult(
        output=dest,
        source=path,
        format=loaded.format,
        base=checkpoint.folder if checkpoint else None,
        base_name=portable.base_name,
        dry_run=dry_run,
        layers=len(portable.layers),
        ranks=(min(ranks, default=0), max(ranks, default=0)),
        holds=kinds_of(portable),
        replaced=tuple(sorted((*portable.replacements, *portable.token_rows))),
        fingerprints=len(loaded.base_tensors or {}),
        adapter_bytes=portable.nbytes,
        notes=portable.notes,
        moved=dict(loaded.restored.moved) if loaded.restored else {},
        seconds=time.perf_counter() - began,
    )


def _named(portable: Portable, base: str | Path | None) -> Portable:
    """The name of the base that the adapter says, else that of the base at hand."""
    return portable if portable.base_name or base is None else replace(portable, base_name=str(base))
