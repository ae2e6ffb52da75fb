"""Run a plan into a new checkpoint folder: weights, config, tokenizer, manifest, one rename."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_tools.checkpoint.folder import output_folder, seal
from qlora_tools.checkpoint.writer import CheckpointWriter
from qlora_tools.engine.plan import Plan, Source
from qlora_tools.engine.run import run
from qlora_tools.manifest import Manifest
from qlora_tools.progress import Progress
from qlora_tools.verbs.opening import config_json, copy_side_files, side_paths


def save_checkpoint(
    plan: Plan,
    sources: Mapping[str, Source],
    dest: Path,
    *,
    config: Mapping[str, Any],
    side_files: Path,
    manifest: Any,
    force: bool,
    inputs: Iterable[Path],
    device: str,
    title: str,
    progress: Progress,
    checked: Callable[[Path], None] = lambda folder: None,
) -> list[Any]:
    """Write ``plan`` as a Hugging Face folder at ``dest`` and return the units' reports.

    ``checked`` sees the folder, whole but for its manifest and under a name that does not last; what it raises leaves nothing behind.
    ``manifest`` is called with the reports after the weights are written and gives the :class:`Manifest` to seal with.
    """
    side_paths(side_files)  # what cannot be copied, or not be written, is refused before the weights and not after them
    description = config_json(config)
    with output_folder(dest, force=force, inputs=inputs) as folder:
        with CheckpointWriter(folder, plan.outputs) as writer:
            reports = run(plan, sources, writer, device=device, title=title, progress=progress)
        (folder / "config.json").write_bytes(description)
        copy_side_files(side_files, folder)
        checked(folder)
        sealed: Manifest = manifest(reports)
        seal(folder, sealed)
    return reports
