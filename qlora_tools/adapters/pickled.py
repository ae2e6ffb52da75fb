"""State dicts in torch's pickle format, on request only: the one place of the package that unpickles.

``weights_only`` restricts what the file may build to tensors and plain containers, but the format remains a program: who
asks for it says that they trust the file. Everything comes out as a flat map of names to tensors.
"""

from __future__ import annotations

import pickle  # noqa: TID251 (for the name of its error)
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.errors import CorruptError, UnsupportedError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".lora")
#: Keys under which training scripts put the state dict beside other things.
_NESTS = ("model_state_dict", "state_dict", "module", "model")


def read_pickled(path: Path, *, allowed: bool) -> dict[str, torch.Tensor]:
    """The tensors of a file that ``torch.save`` wrote.

    Raises:
        UnsupportedError: not ``allowed``. CorruptError: not such a file, or it holds more than tensors.
    """
    if not allowed:
        raise UnsupportedError(
            f"{path} is a pickle, which can run code when opened", hint="if you trust where it comes from, add --allow-pickle; else ask for safetensors"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 (restricted to tensors, asked for by the user)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, ImportError, TypeError, IndexError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CorruptError(f"{path} cannot be read as tensors alone: {first}", hint="convert it to safetensors where it was made") from None
    return _tensors(content, str(path))


def _tensors(content: Any, where: str) -> dict[str, torch.Tensor]:
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping):
        raise CorruptError(f"{where} holds {type(content).__name__}, expected a state dict")
    strange = [
        str(name)[:80] for name, value in content.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided
    ]
    if strange:
        raise CorruptError(f"{where} holds more than named dense tensors: {', '.join(strange[:5])}", hint="save the adapter's state dict alone")
    return {name: value.detach() for name, value in content.items()}
