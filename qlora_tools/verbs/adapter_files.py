"""Adapters of any format in and PEFT folders out: what import, convert and the adapter algebra have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_tools.adapters import portable_peft
from qlora_tools.adapters.adapter import Adapter
from qlora_tools.adapters.copies import without_copies
from qlora_tools.adapters.merged import base_fingerprint
from qlora_tools.adapters.modified_base import Restored, changed_init, needs_base, on_original_base
from qlora_tools.adapters.peft_files import task_type_of
from qlora_tools.adapters.peft_keys import parse_key
from qlora_tools.adapters.portable import Portable
from qlora_tools.adapters.recognise import open_stored, read_components, recognise
from qlora_tools.adapters.stored import Hints, StoredAdapter
from qlora_tools.checkpoint.folder import output_folder, seal
from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import UsageError
from qlora_tools.manifest import Manifest, read_manifest, sha256_file
from qlora_tools.names import split_tensor
from qlora_tools.progress import Progress
from qlora_tools.verbs.opening import describe_input, folder_name


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter in the portable form, by component (``""`` where there is one model), and where it came from.

    ``base_tensors``: sha256 of the base tensors it changes, from the base at hand or from the adapter's own manifest.
    """

    stored: StoredAdapter
    format: str
    components: Mapping[str, Portable]
    base: LogicalCheckpoint | None = None
    base_tensors: Mapping[str, str] | None = None
    restored: Restored | None = None

    @property
    def portable(self) -> Portable:
        """The one component."""
        (portable,) = self.components.values()
        return portable

    @property
    def task_type(self) -> str | None:
        """PEFT's task type: the base's where it is at hand, else what the adapter says."""
        if self.base is not None:
            return task_type_of(self.base.config)
        said = (self.stored.config or {}).get("task_type") if self.format == "peft" else None
        return said if isinstance(said, str) else None

    def described(self) -> dict[str, str]:
        """What a manifest says about it."""
        return {"name": source_name(self.stored.path), "sha256": sha256_file(self.stored.path)}


def adapter_path(source: str | Path) -> Path:
    """A file or folder as given, or the snapshot of a hub id."""
    path = Path(source).expanduser()
    return path if path.exists() else resolve_model(str(source))


def source_name(path: Path) -> str:
    """What people call an adapter: its folder's name where the file has the name that all of its kind have."""
    generic = ("adapter_model", "adapters", "adapter", "pytorch_lora_weights", "model", "lit_model", "pytorch_model")
    stem = path.name.split(".", 1)[0] if path.is_file() else ""
    return folder_name(path.parent) if stem in generic else stem or folder_name(path)


def load(
    path: Path,
    *,
    base: LogicalCheckpoint | None = None,
    format_name: str | None = None,
    hints: Hints | None = None,
    allow_pickle: bool = False,
    device: str = "cpu",
    progress: Progress,
) -> Loaded:
    """Recognise and read the adapter at ``path``; with ``base``, check that it fits, tensor by tensor.

    Raises:
        UsageError, UnsupportedError, CorruptError, IncompatibleError, MissingError: see ``adapters/recognise.py``,
        ``adapters/modified_base.py`` and the format's file.
    """
    hints = hints_for(hints or Hints(), base)
    if hints.alpha is not None and not math.isfinite(hints.alpha):
        raise UsageError(f"alpha {hints.alpha} is not a finite number", hint="give --alpha as it was in training")
    stored = open_stored(path, allow_pickle=allow_pickle)
    name = recognise(stored, format_name)
    init = None
    if name == "peft" and stored.config is not None:
        init = changed_init(stored.config, str(stored.path.parent))
        if init is not None and base is None:
            raise needs_base(init)
        stored = replace(stored, config={**stored.config, "init_lora_weights": True} if init else stored.config)
    components = read_components(stored, name, hints)
    manifest = read_manifest(stored.path.parent)
    loaded = Loaded(stored, name, components, base, manifest.base_tensors if manifest and manifest.kind == "adapter" else {})
    return loaded if base is None or len(components) != 1 else _fitted(loaded, base, init, device, progress)


def hints_for(hints: Hints, base: LogicalCheckpoint | None) -> Hints:
    """``hints`` with what the base tells."""
    return hints if base is None else replace(hints, modules=modules_of(base), base_config=base.config)


def _fitted(loaded: Loaded, base: LogicalCheckpoint, init: str | None, device: str, progress: Progress) -> Loaded:
    """The adapter checked against its base, with the base's own names and the hashes of what it changes."""
    ((component, portable),) = loaded.components.items()
    if loaded.format != "peft":
        portable = with_live_names(portable, base)
    bound = fit(portable, base, str(loaded.stored.path))
    ties = base.ties
    portable = without_copies(portable, bound, base, ties)
    stored = {name: ties.get(name, name) for name in bound.deltas}  # a tied tensor lies under the other's name
    restored = None
    if init is not None:
        targets = {parse_key(delta.a.key).path: (stored[name], delta.transposed) for name, delta in bound.deltas.items()}
        if quantized := sorted(name for name, _ in targets.values() if name in base.quantized):
            raise UsageError(
                f"the adapter started with {init} inside weights that {base.folder} holds only quantized: {quantized[0]}",
                hint="give the 16-bit model as --base",
            )
        portable, restored = on_original_base(portable, init, base, targets, device=device, progress=progress)
    if any(delta.transposed for name, delta in bound.deltas.items() if base.family.stores_inputs_first(name, base.specs[stored[name]].shape)):
        portable = replace(portable, inputs_first=True)
    return replace(loaded, components={component: portable}, base_tensors=_hashes(bound, base, progress), restored=restored)


def fit(portable: Portable, base: LogicalCheckpoint, where: str) -> Adapter:
    """The adapter bound to ``base``. Raises IncompatibleError with every name and shape that does not fit."""
    return portable_peft.bound(portable_peft.content(portable, modules=modules_of(base)), base, where)


def _hashes(bound: Adapter, base: LogicalCheckpoint, progress: Progress) -> dict[str, str]:
    fingerprint, found = base_fingerprint(base), {}
    with progress.task("fingerprint base", len(bound.deltas), "tensors") as task:
        for name in sorted(bound.deltas):
            stored = base.ties.get(name, name)
            if digest := fingerprint(stored):
                found[stored] = digest
            task.advance(1, name)
    return found


def modules_of(base: LogicalCheckpoint) -> dict[str, tuple[int, ...]]:
    """Module path -> shape of its weight, tied ones included."""
    found = {split_tensor(name)[0]: spec.shape for name, spec in base.specs.items() if name.endswith(".weight")}
    return found | {split_tensor(tied)[0]: base.specs[owner].shape for tied, owner in base.ties.items()}


def with_live_names(portable: Portable, base: LogicalCheckpoint) -> Portable:
    """Module paths of the live model, where the checkpoint leaves out the prefix of its body (``transformer.``)."""
    rename = base.family.live_names(base.config, base.specs)
    return replace(
        portable,
        layers={rename(module): layer for module, layer in portable.layers.items()},
        replacements={rename(name): value for name, value in portable.replacements.items()},
        token_rows={rename(name): value for name, value in portable.token_rows.items()},
    )


def save_peft(
    portable: Portable,
    dest: Path,
    *,
    command: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    sources: list[Path],
    base: LogicalCheckpoint | None = None,
    base_tensors: Mapping[str, str] | None = None,
    task_type: str | None = None,
    report: Mapping[str, Any] | None = None,
    force: bool = False,
) -> None:
    """Write ``portable`` as a PEFT folder with a manifest, whole or not at all."""
    known = None if base is None else map(base.family.live_names(base.config, base.specs), modules_of(base))
    stored = portable_peft.content(portable, modules=known, task_type=task_type)
    described = {**({"base": describe_input(base)} if base is not None else {}), **inputs}
    with output_folder(dest, force=force, inputs=sources) as folder:
        portable_peft.write(folder, stored)
        seal(folder, Manifest("adapter", command, inputs=described, base_tensors=dict(sorted((base_tensors or {}).items())), report=report or {}))


def one_component(loaded: Loaded, component: str | None) -> Loaded:
    """``loaded`` with the component that was asked for. Raises UsageError where there are several and none was chosen."""
    if len(loaded.components) == 1 and component is None:
        return loaded
    listed = ", ".join(sorted(loaded.components))
    if component is None:
        raise UsageError(f"{loaded.stored.path} adapts {len(loaded.components)} models: {listed}", hint="choose one with --component")
    return replace(loaded, components={component: loaded.components[component]})
