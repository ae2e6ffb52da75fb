"""A model whose weights come and go: a part of it is filled from the checkpoint while it is needed and emptied again.

Everything that is read is hashed in passing, for the file of statistics to say what it was taken from. Quantized checkpoints are decoded.
What lies outside the large parts (norms, biases, small embeddings) stays. Checkpoints whose tensors transformers renames while
loading cannot be read part by part: they are loaded whole, and coming and going then do nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import tensor_sha256
from qlora_tools.errors import IncompatibleError, QltError
from qlora_tools.live.base import build_empty, load_base, tensor_names
from qlora_tools.names import shortened
from qlora_tools.progress import SILENT, Progress

_TILE_BYTES = 32 << 20


class Weights:
    """``model`` and where its weights come from. ``name_of``: parameter or persistent buffer -> tensor of the checkpoint; ``sha256``: by tensor, of the
    stored bytes (of its parts in order of name, joined by ``+``, where it is quantized), once it was read. ``whole``: load everything now."""

    def __init__(self, checkpoint: LogicalCheckpoint, task: str, dtype: torch.dtype, device: str, progress: Progress = SILENT, *, whole: bool = False) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.sha256: dict[str, str] = {}
        self.model: Any = build_empty(checkpoint, task, dtype=dtype)
        names = tensor_names(self.model, checkpoint)
        self.streamed = not self._strangers(names) and not whole
        #: Modules of a head that the checkpoint does not hold.
        self.missing = tuple(sorted({name.rpartition(".")[0] for name, stored in names.items() if stored is None})) if self.streamed else ()
        if self.streamed:
            self.name_of: Mapping[str, str | None] = names
            for module in self.model.modules():
                for leaf, buffer in module._buffers.items():
                    if buffer is not None and buffer.device.type != "meta":
                        module._buffers[leaf] = buffer.to(device)
        else:
            base = load_base(checkpoint, task, checkpoint.codec, dtype=dtype, device=device, progress=progress)
            self.model, self.name_of = base.model, {f"{path}.weight": name for path, name in base.tensor_of.items()}
            self.sha256.update(base.sha256 if checkpoint.codec is None else {name: checkpoint.sha256(name) for name in checkpoint.quantized})

    def _strangers(self, names: Mapping[str, str | None]) -> list[str]:
        """What the model needs and the checkpoint has not under any name known here. A head may be missing: nobody asks it."""
        missing = [name for name, stored in names.items() if stored is None and self.checkpoint.family.role(name.rpartition(".")[0]) != "head"]
        if missing and self.checkpoint.quantized:
            raise IncompatibleError(
                f"{self.checkpoint.folder}: {len(missing)} weights of {type(self.model).__name__} are not in the checkpoint: {shortened(missing, 3)}",
                hint="give the 16-bit model, which may have them under older names",
            )
        return missing

    def weight_of(self, path: str) -> str | None:
        """The tensor that holds the weight of the module at ``path``."""
        return self.name_of.get(f"{path}.weight")

    def fill(self, path: str, leaving: Iterable[str] = ()) -> None:
        """Read the weights of the module at ``path`` and all below it, but not of the modules at ``leaving``."""
        if not self.streamed:
            return
        for module, leaf, name in list(self._parts(path, tuple(leaving))):
            tensor = self.read(name)
            if tuple(tensor.shape) != tuple(getattr(module, leaf).shape):
                raise IncompatibleError(
                    f"{self.checkpoint.folder}: `{name}` is {list(tensor.shape)}, the model has {list(getattr(module, leaf).shape)}",
                    hint="config.json does not belong to these weights",
                )
            tensor = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    def empty(self, path: str) -> None:
        """Forget the weights of the module at ``path`` and all below it."""
        if not self.streamed:
            return
        for module, leaf, _ in list(self._parts(path, ())):
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(getattr(module, leaf).to("meta"), requires_grad=False)

    def _parts(self, path: str, leaving: tuple[str, ...]) -> Any:
        """(module, leaf, tensor's name) of everything at or below ``path`` that the checkpoint holds."""
        dotted = tuple(f"{other}." for other in leaving)
        root = self.model.get_submodule(path)
        for below, module in root.named_modules():
            full = ".".join(part for part in (path, below) if part)
            if f"{full}.".startswith(dotted):
                continue
            for leaf in (*module._parameters, *module._buffers):
                if (name := self.name_of.get(f"{full}.{leaf}" if full else leaf)) is not None:
                    yield module, leaf, name

    def read(self, name: str) -> torch.Tensor:
        """A tensor, dense; hashed."""
        item = self.checkpoint.quantized.get(name)
        if item is None:
            tensor = self.checkpoint.stored.read(name)
            if name not in self.sha256:
                self.sha256[name] = tensor_sha256(tensor)
            return tensor
        if name not in self.sha256:
            self.sha256[name] = self.checkpoint.sha256(name)
        return self.checkpoint.read(name)

    def read_rows(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """The rows [start, stop) of a tensor, dense; not hashed."""
        return self.checkpoint.read(name, rows)

    def lookup(self, path: str, module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        """What the embedding at ``path`` gives for ``ids``, reading its table tile by tile and keeping only the rows that are wanted."""
        name = str(self.weight_of(path))
        wanted, positions = torch.unique(ids.cpu(), return_inverse=True)
        rows = torch.empty(len(wanted), module.embedding_dim, dtype=self.dtype)
        step = max(1, _TILE_BYTES // max(1, self.checkpoint.specs[name].row_bytes))
        for start in range(0, module.num_embeddings, step):
            stop = min(start + step, module.num_embeddings)
            first, last = torch.searchsorted(wanted, torch.tensor([start, stop])).tolist()
            if first < last:
                rows[first:last] = self.read_rows(name, (start, stop))[wanted[first:last] - start].to(self.dtype)
        held = module._parameters["weight"]
        module._parameters["weight"] = nn.Parameter(rows.to(self.device), requires_grad=False)
        try:
            return type(module).forward(module, positions.to(ids.device))  # type: ignore[no-any-return]
        finally:
            module._parameters["weight"] = held


def reaches_outside(error: BaseException) -> bool:
    """Whether ``error`` says that a model used weights of a block that was empty: its code reaches into blocks from outside."""
    return not isinstance(error, QltError) and "meta" in str(error)


def head_of(model: Any) -> str | None:
    """Path of the linear that gives a language model's logits."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((path for path, module in model.named_modules() if module is head), None) if isinstance(head, nn.Linear) else None


def stops_of(model: Any) -> tuple[list[str], list[str]]:
    """(paths of the blocks, paths of the embeddings) of ``model``: what is filled and emptied.

    Blocks are the elements of its outermost lists of modules. A model without lists has none, and stays whole.
    """
    blocks: list[str] = []
    embeddings: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(f"{block}." for block in blocks)):
            continue
        if isinstance(module, nn.ModuleList):
            blocks += [
                f"{path}.{name}" for name, child in module.named_children() if not isinstance(child, nn.ModuleList) and any(True for _ in child.parameters())
            ]
        elif isinstance(module, nn.Embedding) and module.max_norm is None and _takes_ids_alone(module):
            embeddings.append(path)
    return blocks, embeddings


def _takes_ids_alone(module: nn.Embedding) -> bool:
    """False for position embeddings that compute their ids from something else."""
    return len(inspect.signature(type(module).forward).parameters) == 2
