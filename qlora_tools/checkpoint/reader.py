"""A Hugging Face checkpoint folder as stored: config.json and one or many safetensors shards.

The index is the only truth about which tensor lies where; it is checked against the headers of the shards it
names. Shard names that are not plain file names, links that leave the folder, stale index files and pickle
are refused. What the stored tensors *mean* (quantized parts and so on) is ``logical.py``'s business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError
from qlora_tools.names import shortened
from qlora_tools.specs import TensorSpec, byte_view

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w][\w.-]*\.safetensors")
_PICKLE = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_JSON_BYTES = 64 << 20
_HASH_TILE_BYTES = 32 << 20
#: How JSON spells one half of a character; two in a row are one character.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class CheckpointReader:
    """Stored tensors of a checkpoint folder by name. Files are opened once; reads are thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise MissingError(f"{folder} is not a folder", hint="give the folder of a checkpoint, or a hub id such as org/name")
        self.config = read_json(own_file(folder / "config.json")) if (folder / "config.json").exists() else {}
        self._files = [SafetensorsFile(path) for path in _shards(folder)]
        self._owner = {name: file for file in self._files for name in file.specs}
        self.specs: Mapping[str, TensorSpec] = {name: self._owner[name].specs[name] for name in sorted(self._owner)}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The stored tensor, or its rows ``[start, stop)``, in the stored dtype."""
        if name not in self._owner:
            raise MissingError(f"{self.folder} holds no tensor `{name}`")
        return self._owner[name].read(name, rows)

    def path_of(self, name: str) -> Path:
        """The file that holds ``name``, for messages."""
        return self._owner[name].path

    def sha256(self, name: str) -> str:
        """Hex sha256 of the tensor's stored bytes, read in bounded pieces."""
        digest = hashlib.sha256()
        spec = self.specs[name]
        step = max(1, _HASH_TILE_BYTES // max(1, spec.row_bytes))
        for start in range(0, spec.shape[0], step) if spec.shape else ():
            digest.update(byte_view(self.read(name, (start, min(start + step, spec.shape[0])))))
        if not spec.shape:
            digest.update(byte_view(self.read(name)))
        return digest.hexdigest()

    def headers_sha256(self) -> str:
        """One hash over config and tensor specs: tells two different models apart without reading weights."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for spec in self.specs.values():
            digest.update(f"{spec}\n".encode())
        return digest.hexdigest()


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The same hash for a tensor in memory, in its stored dtype."""
    return hashlib.sha256(byte_view(tensor)).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        MissingError, CorruptError: not there; too large, not JSON, not an object, or with text that no file can hold.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CorruptError(f"{path} has {size} bytes, at most {_MAX_JSON_BYTES} are read", hint="this is not a configuration file")
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if isinstance(content, dict) and _HALF.search(text):
            _refuse_half_characters(path, content)
    except FileNotFoundError:
        raise MissingError(f"{path} is not there", hint="the checkpoint is incomplete: download or copy it again") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptError):
            raise
        raise CorruptError(f"{path} is not JSON: {error}", hint="download or copy it again") from None
    if not isinstance(content, dict):
        raise CorruptError(f"{path} holds a {type(content).__name__}, expected an object", hint="download or copy it again")
    return content


def _refuse_half_characters(path: Path, content: Mapping[str, Any]) -> None:
    """JSON can spell one half of a surrogate pair, UTF-8 cannot: an output made from it could not be written, which would show after all the work.

    Raises:
        CorruptError: names the key.
    """
    for key, value in content.items():
        try:
            json.dumps({key: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise CorruptError(f"{path}: {key[:60]!r} holds half of a character (a lone surrogate)", hint="repair the text, or download it again") from None


def own_file(path: Path) -> Path:
    """``path`` if it is its folder's own: a link is followed only inside the folder or into the ``blobs`` of the hub cache the folder belongs to.

    Raises:
        CorruptError: a link that leaves the folder. What it points to is the reader's, not the author's, and would be copied into what is made.
    """
    if path.is_symlink():
        target, home = path.resolve(), path.parent.resolve()
        blobs = home.parent.parent / "blobs"
        if not (target.is_relative_to(home) or (home.parent.name == "snapshots" and target.is_relative_to(blobs))):
            raise CorruptError(f"{path} is a link that leaves the folder", hint="copy the file it points to into the folder")
    return path


def plain_file(folder: Path, name: str, pattern: re.Pattern[str] = _SHARD) -> Path:
    """``folder/name`` if ``name`` is a plain file name that stays in the folder; links as in :func:`own_file`."""
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise CorruptError(
            f"{folder}: the index names the file {name!r}, expected a plain *.safetensors name",
            hint="do not use this checkpoint: its index points outside its folder",
        )
    return own_file(folder / name)


def refuse_pickles(folder: Path) -> None:
    """Raises UnsupportedError for a folder whose weights are pickles; the caller has found no safetensors there."""
    pickles = sorted(path.name for pattern in _PICKLE for path in folder.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{folder} holds {shortened(pickles, 2)}: pickle files can run code and are not read",
            hint="convert it with transformers: AutoModel.from_pretrained(folder, weights_only=True).save_pretrained(new_folder)",
        )


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        return _indexed_shards(folder)
    if (folder / SINGLE).exists():
        return [plain_file(folder, SINGLE)]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1 and found[0] != "adapter_model.safetensors":
        return [plain_file(folder, found[0])]
    if found == ["adapter_model.safetensors"]:
        raise UnsupportedError(f"{folder} is an adapter, not a model", hint="give its base with --base and this folder with --adapter")
    refuse_pickles(folder)
    raise MissingError(f"{folder} holds no {SINGLE} and no {INDEX}", hint="give the folder of a complete checkpoint, or a hub id such as org/name")


def _indexed_shards(folder: Path) -> list[Path]:
    path = own_file(folder / INDEX)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptError(f"{path}: `weight_map` is missing or empty", hint="download or copy it again")
    shards = {name: plain_file(folder, name) for name in sorted({str(value) for value in weight_map.values()})}
    if (folder / SINGLE).exists() and SINGLE not in shards:
        raise CorruptError(f"{folder} holds both {SINGLE} and an index that does not name it", hint="delete the one that is stale")
    for name, shard in shards.items():
        with SafetensorsFile(shard) as file:
            held, listed = set(file.specs), {tensor for tensor, owner in weight_map.items() if owner == name}
        if held != listed:
            wrong = sorted(held ^ listed)
            raise CorruptError(
                f"{path} and {name} disagree on {len(wrong)} tensors: {shortened(wrong, 3)}", hint="the folder mixes two checkpoints: download it again"
            )
    return list(shards.values())
