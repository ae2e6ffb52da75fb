"""Model arguments: a folder, or a hub id that is downloaded once into the hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from qlora_tools.errors import MissingError, StorageError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


def resolve_model(name: str, revision: str | None = None) -> Path:
    """The local folder of ``name``: the folder itself, or the snapshot of a hub id (``org/name`` or ``org/name@revision``).

    Only weights in safetensors, configuration and tokenizer files are fetched; never code, never pickle.

    Raises:
        MissingError: neither a folder nor a repository the hub knows (or it cannot be reached).
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise MissingError(f"{name} is a file, expected the folder of a checkpoint", hint=f"give {folder.parent}")
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "/")):
        raise MissingError(f"{name} is not there", hint="give the folder of a checkpoint, or a hub id such as org/name")
    repository, _, pinned = name.partition("@")
    return _download(repository, revision or pinned or None)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_MODEL_FILES))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingError(
            f"{repository} is neither a folder here nor a repository the hub could give: {first}", hint="check the spelling, the network and `hf auth login`"
        ) from error
    except OSError as error:
        raise StorageError(f"{repository}: the download could not be stored: {error}", hint="set HF_HOME to a disk with room") from error
