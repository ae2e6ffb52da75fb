"""What made a folder: ``qlt-manifest.json``, written last, so that its presence means the folder is whole.

The file holds no time stamp, no absolute path and no machine name: the same inputs and options give the
same bytes. Schema ``qlt.manifest/1``:

* ``kind``: ``checkpoint``, ``adapter``, ``export`` or ``bench``;
* ``command``: the verb and the options that shaped the content;
* ``versions``: this package and the libraries whose code produced the numbers;
* ``inputs``: role -> {``name``, ``sha256``}; the sha256 of an input is its :func:`fingerprint`;
* ``files``: file name -> {``sha256``, ``bytes``} of everything beside the manifest;
* ``base_tensors`` (adapters): tensor name -> sha256 of the stored bytes that the adapter was made for;
* ``source_tensors`` (quantized checkpoints): tensor name -> sha256 of the bytes it was quantized from;
* ``report``: what the verb measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from qlora_tools.errors import CorruptError

FILE_NAME = "qlt-manifest.json"
SCHEMA = "qlt.manifest/1"
_LIBRARIES = (
    "qlora-tools",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "onnx",
    "onnx-ir",
    "onnxruntime-gpu",
    "onnxruntime",
    "safetensors",
    "numpy",
    "scipy",
    "numba",
)
_CHUNK_BYTES = 8 << 20


def library_versions() -> dict[str, str]:
    """Installed versions of this package and of the libraries that shape its output."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Manifest:
    """The content of ``qlt-manifest.json``; see the module's docstring for the fields."""

    kind: str
    command: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    base_tensors: Mapping[str, str] = field(default_factory=dict)
    source_tensors: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=library_versions)
    schema: str = SCHEMA

    def to_json(self) -> bytes:
        """Canonical bytes: sorted keys, two spaces, final newline."""
        return canonical_json(asdict(self))


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no NaN; the one way this package writes JSON that must be reproducible."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or ``None`` where there is none.

    Raises:
        CorruptError: the file is there but is not a manifest of a schema this version reads.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptError(f"{path} is not JSON: {error}", hint="make the folder anew") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise CorruptError(f"{path}: schema is {found!r}, expected {SCHEMA!r}", hint="made by another version: make the folder anew")
    known = {name: content[name] for name in Manifest.__dataclass_fields__ if name in content}
    if not isinstance(known.get("kind"), str) or not all(isinstance(known.get(name, {}), dict) for name in known.keys() - {"kind", "schema"}):
        raise CorruptError(f"{path}: fields are missing or of the wrong type", hint="make the folder anew")
    known.setdefault("command", {})
    return Manifest(**known)
