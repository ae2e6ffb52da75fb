"""Model arguments: a folder, or a hub id that is downloaded once into the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qlora_tools.errors import MissingError, StorageError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja")


def resolve_model(name: str, revision: str | None = None, files: Sequence[str] = _MODEL_FILES) -> Path:
    """The local folder of ``name``: the folder itself, or the snapshot of a hub id (``org/name`` or ``org/name@revision``).

    Only weights in safetensors, configuration and tokenizer files are fetched, or of these what matches ``files``; never code, never pickle.

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
    return _download(repository, revision or pinned or None, files)


def cached_model(name: str) -> Path | None:
    """The snapshot of a hub id that is on this machine whole, as :func:`resolve_model` left it; ``None`` where that would have to download something."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    if not _HUB_ID.fullmatch(name) or ".." in revision:
        return None
    try:
        found = Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(_MODEL_FILES), local_files_only=True))
    except (HFValidationError, OSError):  # what is not there is a FileNotFoundError
        return None
    return found if any(found.glob("*.safetensors")) else None  # its config alone may be there, for an estimate


def _download(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingError(
            f"{repository} is neither a folder here nor a repository the hub could give: {first}", hint="check the spelling, the network and `hf auth login`"
        ) from error
    except OSError as error:
        raise StorageError(f"{repository}: the download could not be stored: {error}", hint="set HF_HOME to a disk with room") from error


def resolve_config(name: str) -> Path:
    """The ``config.json`` of ``name``: that of a folder, the JSON file itself, or the only file fetched of a hub id.

    Raises:
        MissingError: none of these.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingError(f"{name} holds no config.json", hint="give the folder of a checkpoint")
        return path / "config.json"
    return resolve_model(name, files=["config.json"]) / "config.json"
