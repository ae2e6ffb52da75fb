"""The ``.onnx_adapter`` files beside a graph that keeps adapters: one per adapter, tensors named after the graph's inputs.

ONNX Runtime's own file (a flatbuffer), so that its ``RunOptions.add_active_adapter`` and onnxruntime-genai's ``Adapters`` read it too. An adapter
holds only the inputs it changes; the others stay at their default, rank 0. The form of names and shapes is ``decoder/branches.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qlora_tools.adapters.formats.onnx_adapter import save_tensors
from qlora_tools.errors import UsageError
from qlora_tools.export.decoder.branches import Factors, kept_names
from qlora_tools.names import slug


def file_of(folder: Path, name: str) -> Path:
    """Where the adapter ``name`` of the export in ``folder`` lies."""
    return folder / f"{name}.onnx_adapter"


def adapter_names(labels: list[str]) -> list[str]:
    """Names that the files of adapters with these labels can have.

    Raises:
        UsageError: two would be the same.
    """
    names = [slug(label) for label in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"two adapters would be called `{twice[0]}`", hint="rename one of the folders: an adapter is chosen by its folder's name")
    return names


def write_adapter_file(path: Path, factors: Mapping[str, Factors]) -> None:
    """Write ``path`` anew; the same factors give the same bytes."""
    tensors: dict[str, torch.Tensor] = {}
    for matrix, pair in factors.items():
        tensors |= dict(zip(kept_names(matrix), (pair.a_IR, pair.b_RO), strict=True))
    save_tensors(tensors, path)
