"""What storing a merged model lost, as a small LoRA adapter beside it: an ordinary PEFT folder whose base is the merged checkpoint.

The two know each other: the branch's manifest has the checkpoint's fingerprints, and the checkpoint's has the branch (``report.branch``: where it
lies from there, and the hash of its weights). What lies beside a checkpoint under a likely name is nobody's branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from qlora_tools.adapters.peft_files import WEIGHTS, task_type_of
from qlora_tools.adapters.portable import CONV, LINEAR, Layer, Portable
from qlora_tools.checkpoint.folder import replace_file
from qlora_tools.checkpoint.logical import LogicalCheckpoint, open_checkpoint
from qlora_tools.errors import IncompatibleError, MissingError
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.manifest import FILE_NAME, read_manifest
from qlora_tools.names import split_tensor
from qlora_tools.verbs.adapter_files import save_peft, with_live_names
from qlora_tools.verbs.merging import Merged
from qlora_tools.verbs.origins import changed, describe_adapter, found_again

SUFFIX = "-branch"


def branch_folder(checkpoint: Path) -> Path:
    """Where the branch of a merged checkpoint goes."""
    return checkpoint.with_name(checkpoint.name + SUFFIX)


def branch_of(checkpoint: LogicalCheckpoint) -> Path | None:
    """The branch that the manifest of ``checkpoint`` names; ``None`` without one.

    Raises:
        MissingError: it is not where it was. IncompatibleError: it is another one by now, or made for other weights than the checkpoint's.
    """
    named = _named(checkpoint.folder)
    if named is None:
        return None
    folder = found_again(named, checkpoint.folder)
    if folder is None or not (Path(folder) / WEIGHTS).is_file():
        raise MissingError(
            f"{checkpoint.folder} was merged with a branch beside it, `{named.get('name')}`, which is not at {named.get('path')} from there",
            hint="put it back, give it with --branch and --no-residual, or leave it out with --no-residual",
        )
    folder = Path(folder)
    manifest = read_manifest(folder)
    base = manifest.inputs.get("base", {}) if manifest else {}
    if changed("branch", named, describe_adapter(folder, checkpoint.folder)) or base.get("headers_sha256") != checkpoint.stored.headers_sha256():
        raise IncompatibleError(
            f"{folder} is the branch of another checkpoint than {checkpoint.folder}", hint="merge again, or leave it out with --no-residual"
        )
    return folder


def _named(folder: Path) -> Mapping[str, str] | None:
    manifest = read_manifest(folder)
    found = manifest.report.get("branch") if manifest else None
    return found if isinstance(found, Mapping) else None


def write_branch(found: Mapping[str, LowRank], merged: Merged, dest: Path, *, force: bool, inputs: Iterable[Path]) -> Path:
    """The branches of the weights of ``dest``, the merged checkpoint, in the dtype that the model computes in, and its name in the manifest there.
    Returns the folder.

    Raises:
        OutputExistsError: it is there already.
    """
    folder, checkpoint = branch_folder(dest), open_checkpoint(dest)
    layers = {split_tensor(name)[0]: _layer(branch, merged.source.specs[name].shape, checkpoint.specs[name].torch_dtype) for name, branch in found.items()}
    turned = any(merged.checkpoint.family.stores_inputs_first(name, merged.source.specs[name].shape) for name in found)
    portable = with_live_names(Portable(layers, base_name=str(dest), inputs_first=turned), checkpoint)
    rank = max(branch.rank for branch in found.values())
    hashes = {name: checkpoint.sha256(name) for name in sorted(found) if name not in checkpoint.quantized}
    save_peft(
        portable,
        folder,
        command={"verb": "merge", "branch_rank": rank},
        inputs={},
        sources=[*inputs, dest],
        base=checkpoint,
        base_tensors=hashes,
        task_type=task_type_of(checkpoint.config),
        force=force,
    )
    sealed = read_manifest(dest)
    assert sealed is not None, "a merged checkpoint has been sealed"
    named = replace(sealed, report={**sealed.report, "branch": describe_adapter(folder, dest)})
    replace_file(dest / FILE_NAME, named.to_json())
    return folder


def _layer(branch: LowRank, shape: tuple[int, ...], dtype: torch.dtype) -> Layer:
    a, b = branch.a_RI.to(dtype), branch.b_OR.to(dtype)
    if len(shape) <= 2:
        return Layer(a, b, 1.0, LINEAR)
    return Layer(a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *(1 for _ in shape[2:])), 1.0, CONV)
