"""What storing a merged model lost, as a small LoRA adapter beside it: an ordinary PEFT folder whose base is the merged checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from qlora_tools.adapters.peft_files import task_type_of
from qlora_tools.adapters.portable import CONV, LINEAR, Layer, Portable
from qlora_tools.checkpoint.logical import LogicalCheckpoint, open_checkpoint
from qlora_tools.errors import IncompatibleError
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.manifest import read_manifest
from qlora_tools.names import split_tensor
from qlora_tools.verbs.adapter_files import save_peft, with_live_names
from qlora_tools.verbs.merging import Merged

SUFFIX = "-branch"


def branch_folder(checkpoint: Path) -> Path:
    """Where the branch of a merged checkpoint goes."""
    return checkpoint.with_name(checkpoint.name + SUFFIX)


def branch_of(checkpoint: LogicalCheckpoint) -> Path | None:
    """The branch that was left beside ``checkpoint`` when it was merged, as the branch's own manifest says; ``None`` without one.

    Raises:
        IncompatibleError: it was made for other weights than the checkpoint's.
    """
    folder = branch_folder(checkpoint.folder.resolve())
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None or manifest.command.get("verb") != "merge" or "branch_rank" not in manifest.command:
        return None
    if manifest.inputs.get("base", {}).get("headers_sha256") != checkpoint.stored.headers_sha256():
        raise IncompatibleError(f"{folder} is the branch of another checkpoint than {checkpoint.folder}", hint="merge again, or leave it out")
    return folder


def write_branch(found: Mapping[str, LowRank], merged: Merged, dest: Path, *, force: bool, inputs: Iterable[Path]) -> Path:
    """The branches of the weights of ``dest``, the merged checkpoint, in the dtype that the model computes in. Returns the folder.

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
    return folder


def _layer(branch: LowRank, shape: tuple[int, ...], dtype: torch.dtype) -> Layer:
    a, b = branch.a_RI.to(dtype), branch.b_OR.to(dtype)
    if len(shape) <= 2:
        return Layer(a, b, 1.0, LINEAR)
    return Layer(a.reshape(-1, *shape[1:]), b.reshape(*b.shape, *(1 for _ in shape[2:])), 1.0, CONV)
