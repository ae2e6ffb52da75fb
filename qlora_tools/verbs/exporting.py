"""What an export draws: a checkpoint or a base with adapters merged in, and the adapters that stay beside the weights.

Adapters come in three kinds. Merged ones are in the tensors that the graph stores. Kept ones become inputs of the graph, one file each.
Fixed ones become stored 16-bit branches; the branch that ``qlt merge --method residual`` left beside a checkpoint is one by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qlora_tools.adapters.copies import bound_without_copies
from qlora_tools.adapters.merged import MergedSource, base_fingerprint
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.engine.plan import Source
from qlora_tools.errors import UsageError
from qlora_tools.export.decoder.branches import Beside
from qlora_tools.export.onnx_adapter import adapter_names
from qlora_tools.manifest import sha256_file
from qlora_tools.progress import Progress
from qlora_tools.verbs.merge_branch import branch_of
from qlora_tools.verbs.merging import Merged, open_merged
from qlora_tools.verbs.opening import describe_input, folder_name, open_model, plain_config
from qlora_tools.verbs.quantize import codec_for

Given = Sequence[tuple[str | Path, float]]


@dataclass(frozen=True)
class Drawn:
    """The tensors, the config, the folder of the tokenizer, a name, and the inputs as a manifest names them. ``checkpoint``: itself, or the base.
    ``branch``: the folder of the residual branch that came along unasked."""

    source: Source
    checkpoint: LogicalCheckpoint
    config: Mapping[str, Any]
    name: str
    folders: tuple[Path, ...]
    inputs: Mapping[str, Mapping[str, str]]
    beside: Beside = field(default_factory=Beside)
    branch: Path | None = None

    @property
    def side_files(self) -> Path:
        return self.checkpoint.folder


def open_drawn(
    model: str | Path | None, base: str | Path | None, merge: Given, keep: Given, fixed: Given, target: str | None, residual: bool, progress: Progress
) -> Drawn:
    """Read all headers and check that everything belongs together. ``residual``: take along the branch beside the checkpoint, where there is one.

    Raises:
        UsageError: both or neither of ``model`` and ``base``, adapters to merge without a base, or two kept adapters of one name.
        What ``open_merged`` raises: an adapter that does not fit, or was made for another base.
    """
    if (model is None) == (base is None):
        raise UsageError(
            "an export needs a model, or a base with adapters", hint="qlt export MODEL --int8, or qlt export --base BASE --adapter DIR --merge --int8"
        )
    if merge and base is None:
        raise UsageError("adapters are merged into a base", hint="give the model as --base")
    chosen = str(base if model is None else model)
    if merge or keep or fixed:
        drawn = _with_adapters(open_merged(chosen, [*merge, *keep, *fixed], target, codec_for("nf4"), progress), len(merge), len(keep))
    else:
        drawn = _alone(open_model(chosen, progress))
    return _with_residual(drawn) if residual else drawn


def _alone(checkpoint: LogicalCheckpoint) -> Drawn:
    name, inputs = folder_name(checkpoint.folder), {"model": describe_input(checkpoint)}
    return Drawn(checkpoint, checkpoint, plain_config(checkpoint.config), name, (checkpoint.folder,), inputs)


def _with_adapters(opened: Merged, merged: int, kept: int) -> Drawn:
    """The first ``merged`` adapters go into the weights, the next ``kept`` become inputs, the others stored branches."""
    checkpoint, folders = opened.checkpoint, opened.adapter_folders
    source = MergedSource(opened.base, opened.adapters[:merged], ties=checkpoint.ties, fingerprint=base_fingerprint(checkpoint))
    into = Merged(checkpoint, opened.base, source, opened.adapters[:merged], folders[:merged], opened.target, opened.simulated)
    last = merged + kept
    names = adapter_names([folder_name(folder) for folder in folders[merged:last]])
    apart = [(bound_without_copies(adapter, checkpoint, checkpoint.ties), weight) for adapter, weight in opened.adapters[merged:]]
    beside = Beside(dict(zip(names, apart[:kept], strict=True)), apart[kept:])
    return Drawn(source, checkpoint, into.config, into.name, (checkpoint.folder, *folders), opened.inputs(), beside)


def _with_residual(drawn: Drawn) -> Drawn:
    folder = branch_of(drawn.checkpoint)
    if folder is None or folder in drawn.folders:
        return drawn
    adapter = read_adapter(folder, drawn.checkpoint.specs, drawn.checkpoint.family, ties=drawn.checkpoint.ties)
    MergedSource(drawn.checkpoint, [(adapter, 1.0)], fingerprint=base_fingerprint(drawn.checkpoint))  # refuses a branch of other weights
    inputs = {**drawn.inputs, "branch": {"name": folder_name(folder), "sha256": sha256_file(folder / "adapter_model.safetensors")}}
    beside = Beside(drawn.beside.kept, (*drawn.beside.fixed, (adapter, 1.0)))
    return replace(drawn, folders=(*drawn.folders, folder), inputs=inputs, beside=beside, branch=folder)
