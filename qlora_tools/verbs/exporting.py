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
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.renamed import as_stored
from qlora_tools.engine.plan import Source
from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.export.decoder.branches import Beside
from qlora_tools.export.onnx_adapter import adapter_names
from qlora_tools.models.sizes import check_sizes
from qlora_tools.names import shortened
from qlora_tools.progress import Progress
from qlora_tools.verbs.merge_branch import branch_of
from qlora_tools.verbs.merging import Merged, bound_to, open_merged
from qlora_tools.verbs.opening import folder_name, open_model, plain_config
from qlora_tools.verbs.origins import describe_adapter, describe_checkpoint
from qlora_tools.verbs.quantize import codec_for

Given = Sequence[tuple[str | Path, float]]


#: What becomes of an adapter: its delta is in the weights, its factors are inputs of the graph, its factors are stored.
MERGED, KEPT, FIXED = "merged", "kept", "fixed"


@dataclass(frozen=True)
class Part:
    """An adapter of an export: ``use`` is one of the three above."""

    folder: Path
    weight: float
    use: str


@dataclass(frozen=True)
class Drawn:
    """The tensors, the config and a name. ``checkpoint``: itself, or the base. ``branch``: the folder of the residual branch that came along
    unasked. ``merged``: what adapters made of it."""

    source: Source
    checkpoint: LogicalCheckpoint
    config: Mapping[str, Any]
    name: str
    adapters: tuple[Part, ...] = ()
    beside: Beside = field(default_factory=Beside)
    branch: Path | None = None
    merged: Merged | None = None

    @property
    def target(self) -> str | None:
        """Onto which weights was merged; as :class:`~qlora_tools.verbs.merging.Merged` has it."""
        return self.merged.target if self.merged else None

    @property
    def simulated(self) -> str | None:
        """The codec that these were put through before."""
        return self.merged.simulated.name if self.merged and self.merged.simulated else None

    @property
    def side_files(self) -> Path:
        return self.checkpoint.folder

    @property
    def folders(self) -> tuple[Path, ...]:
        """Everything that is read."""
        return (self.checkpoint.folder, *(part.folder for part in self.adapters), *((self.branch,) if self.branch else ()))

    def inputs(self, dest: Path) -> dict[str, dict[str, str]]:
        """What the manifest of ``dest`` says about them: ``model``, or ``base`` and ``adapter``, ``adapter1``, ..., and ``branch``."""
        found = {"base" if self.adapters else "model": describe_checkpoint(as_stored(self.checkpoint), dest)}
        found |= {role: describe_adapter(part.folder, dest) for role, part in zip(self.roles, self.adapters, strict=True)}
        return found | ({"branch": describe_adapter(self.branch, dest)} if self.branch else {})

    @property
    def roles(self) -> tuple[str, ...]:
        """The adapters' names in a manifest."""
        return tuple(f"adapter{number or ''}" for number in range(len(self.adapters)))


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
        opened = open_merged(chosen, [*merge, *keep, *fixed], target, codec_for("nf4"), progress)
        drawn = _with_adapters(opened, len(merge), len(keep))
    else:
        drawn = _alone(open_model(chosen, progress))
    check_sizes(drawn.config, drawn.checkpoint.folder / "config.json")
    return _with_residual(drawn) if residual else drawn


def _alone(checkpoint: LogicalCheckpoint) -> Drawn:
    return Drawn(checkpoint, checkpoint, plain_config(checkpoint.config), folder_name(checkpoint.folder))


def _with_adapters(opened: Merged, merged: int, kept: int) -> Drawn:
    """The first ``merged`` adapters go into the weights, the next ``kept`` become inputs, the others stored branches."""
    checkpoint, folders, head = opened.checkpoint, opened.adapter_folders, opened.head
    if head is not None and head.adapter in folders[merged:]:
        raise UnsupportedError(
            f"adapter {head.adapter} brings {shortened(head.added)}, which the base does not have, and cannot be kept beside a graph",
            hint="merge it: qlt export --base BASE --adapter DIR --merge",
        )
    into, last = opened.of_first(merged), merged + kept
    names = adapter_names([folder_name(folder) for folder in folders[merged:last]])
    apart = [(bound_without_copies(adapter, checkpoint, checkpoint.ties), weight) for adapter, weight in opened.adapters[merged:]]
    beside = Beside(dict(zip(names, apart[:kept], strict=True)), apart[kept:])
    uses = [MERGED] * merged + [KEPT] * kept + [FIXED] * (len(folders) - last)
    parts = tuple(Part(folder, weight, use) for folder, (_, weight), use in zip(folders, opened.adapters, uses, strict=True))
    return Drawn(into.source, checkpoint, into.config, into.name, parts, beside, merged=into)


def _with_residual(drawn: Drawn) -> Drawn:
    folder = branch_of(as_stored(drawn.checkpoint))
    if folder is None or folder.resolve() in {part.folder.resolve() for part in drawn.adapters}:
        return drawn
    adapter = bound_to(drawn.checkpoint, folder)
    MergedSource(drawn.checkpoint, [(adapter, 1.0)], fingerprint=base_fingerprint(drawn.checkpoint))  # refuses a branch of other weights
    return replace(drawn, beside=Beside(drawn.beside.kept, (*drawn.beside.fixed, (adapter, 1.0))), branch=folder)
