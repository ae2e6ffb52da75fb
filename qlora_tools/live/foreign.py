"""A folder that transformers or diffusers is to load, doubted first: which files it would read, and what comes up about them.

Both join the names that an index or a config gives to the folder as they are, and unpickle whatever does not end in ``.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from qlora_tools.checkpoint.reader import plain_file, read_json, refuse_pickles
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError

#: What comes up when a config.json is refused. Its fields are checked by strict dataclasses of the hub's, and what those let through fails in the
#: arithmetic of a layer or in torch; all of it is the same news about a file that somebody else wrote.
REFUSALS: tuple[type[Exception], ...] = (
    ValueError,
    LookupError,
    OSError,
    ImportError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    StopIteration,
    StrictDataclassError,
)
#: Where weights are read as well: what the disk, memory, a device or a missing package says is about them, not about the folder.
_OF_THE_MACHINE = ("allocate memory", "out of memory", "cuda error")
_SAFE = "*.safetensors"
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAMED = "transformers_weights"


def load_foreign(owner: Any, folder: Path, config: Mapping[str, Any], words: Mapping[str, Any], *, library: str = "transformers") -> Any:
    """What ``owner.from_pretrained(folder, **words)`` gives, where ``words`` ask for safetensors; ``config`` is the folder's config.json.

    Raises:
        As :func:`check_weight_files`. CorruptError: weights that are no safetensors. UnsupportedError: the library refuses the folder.
    """
    check_weight_files(folder, config)
    try:
        return owner.from_pretrained(folder, **words)
    except (torch.OutOfMemoryError, ImportError):
        raise
    except SafetensorError as error:
        raise CorruptError(f"{folder}: its weights cannot be read as safetensors: {str(error)[:300]}", hint="download or copy them again") from error
    except REFUSALS as error:
        disk = isinstance(error, OSError) and error.errno is not None  # with a bare one transformers says that a folder lacks something
        if disk or any(words in str(error).lower() for words in _OF_THE_MACHINE):
            raise
        hint = "check config.json; code that comes with a checkpoint is never run" if "auto_map" in config else "check config.json"
        raise UnsupportedError(f"{folder}: {library} cannot load it: {str(error)[:300]}", hint=hint) from error


def check_weight_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Check the files that ``from_pretrained`` would read of ``folder``.

    Raises:
        MissingError: no weights. UnsupportedError: only weights that are not safetensors, be it those of an adapter inside the folder, which would be
        loaded along. CorruptError: a name that leaves the folder or is not a safetensors file's, or an index that is not JSON.
    """
    if not any(folder.glob(_SAFE)):
        refuse_pickles(folder)
        raise MissingError(f"{folder} holds no weights in safetensors", hint="give the folder of a complete checkpoint")
    names = {str(config[_NAMED])} if config.get(_NAMED) is not None else set[str]()
    for index in sorted(folder.glob(f"{_SAFE}.index.json")):
        listed = read_json(index).get("weight_map")
        names |= {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
    for name in sorted(names):
        plain_file(folder, name)
    if (folder / _ADAPTER).is_file() and not (folder / _ADAPTER_WEIGHTS).is_file():
        raise UnsupportedError(f"{folder} holds {_ADAPTER} beside its model and no {_ADAPTER_WEIGHTS}", hint=f"move {_ADAPTER} to a folder of its own")
