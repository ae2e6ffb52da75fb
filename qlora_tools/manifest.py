"""What made a folder: ``qlt-manifest.json``, written last, so that its presence means the folder is whole.

The file holds no time stamp, no absolute path and no machine name: the same inputs and options give the
same bytes. Schema ``qlt.manifest/1``:

* ``kind``: ``checkpoint``, ``adapter``, ``export`` or ``bench``;
* ``command``: the verb and the options that shaped the content; of an export also ``adapters``: role -> {``use``, ``weight``};
* ``versions``: this package and the libraries whose code produced the numbers;
* ``inputs``: role -> {``name``, ``sha256``}; the sha256 of an input is its :func:`fingerprint`;
* ``files``: file name -> {``sha256``, ``bytes``} of everything beside the manifest;
* ``base_tensors`` (adapters): tensor name -> sha256 of the stored bytes that the adapter was made for;
* ``source_tensors`` (quantized checkpoints): tensor name -> sha256 of the bytes it was quantized from;
* ``report``: what the verb measured.

A manifest may come from anywhere, so :func:`read_manifest` holds it against what is written here before anybody acts on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
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
#: Beyond so many lists and maps within each other, walking or writing a value ends in a RecursionError.
_MOST_LEVELS = 64
_MOST_WHOLE, _MOST_FLOAT = 1 << 63, 1e100

_NAMED = {str: "text", int: "a whole number", float: "a number", bool: "true or false", None: "null"}
#: What becomes of an export's adapter.
_USES = ("merged", "kept", "fixed")
_MAYBE = (str, None)
_COST = {"rank": int, "error": float, "optimum": float}
_ROW = {"shape": ([int], None), "singular_values": ([float], None), "name": _MAYBE, "certificate": (_COST, None)}
#: Shapes (see :func:`misfit`) of what verbs read of a manifest, and of an export's command.
_SHAPE = {
    "kind": str,
    "command": ({str: object}, None),
    "inputs": ({str: {str: str}}, None),
    "base_tensors": ({str: str}, None),
    "source_tensors": ({str: str}, None),
    "report": (
        {
            "rows": ([tuple({**_ROW, name: str, cost: _COST} for name in ("name", "module") for cost in ("certificate", "cut"))], None),
            "tensors": ([{"name": str, "retention": (float, None)}], None),
            "branch": ({str: str}, None),
        },
        None,
    ),
    "files": ({str: {"sha256": str, "bytes": int}}, None),
    "versions": ({str: str}, None),
}
_EXPORT = {
    **dict.fromkeys(("scheme", "device", "compute", "target", "task", "calib"), _MAYBE),
    "head_bits": (int, None),
    "standard": (bool, None),
    "kept": ([str], None),
    "adapters": ({str: {"use": str, "weight": float}}, None),
}


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


def strict_json(content: str | bytes) -> Any:
    """The value of foreign JSON, which Python reads more freely than it can use: without NaN and infinity, numbers that would overflow what is computed
    from them, and values nested so deep that nobody can walk them.

    Raises:
        ValueError: it is none; what is wrong, in words.
    """
    try:
        value = json.loads(content, parse_constant=_no_number, parse_float=_float, parse_int=_whole)
    except RecursionError:
        value = None
    else:
        if not _is_deep(value, _MOST_LEVELS):
            return value
    raise ValueError(f"its values lie more than {_MOST_LEVELS} levels deep")


def _no_number(text: str) -> Any:
    raise ValueError(f"{text[:40]} is no number that can be read")


def _float(text: str) -> float:
    value = float(text)
    return value if abs(value) < _MOST_FLOAT else _no_number(text)


def _whole(text: str) -> int:
    return value if len(text) < 21 and abs(value := int(text)) < _MOST_WHOLE else _no_number(text)


def _is_deep(value: Any, levels: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deep(item, levels - 1) for item in items if isinstance(item, (dict, list)))


def misfit(value: Any, shape: Any, where: str = "") -> str | None:
    """What in a value of foreign JSON is not as ``shape`` says, with its place; ``None`` where all is.

    A shape is ``None`` or a type (``float`` takes whole numbers too, ``object`` anything); a tuple of shapes of which one must fit; ``[shape]``, a list of
    such; ``{str: shape}``, a map of such; or a map of the fields that are read, where others may come and one that may be ``None`` may be missing.
    """
    if isinstance(shape, tuple):
        return None if any(misfit(value, one, where) is None for one in shape) else misfit(value, shape[0], where)
    if isinstance(shape, list) and isinstance(value, list):
        found = (misfit(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif isinstance(shape, dict) and isinstance(value, dict):
        fields = dict.fromkeys(value, shape[str]) if str in shape else shape
        found = (misfit(value.get(name), part, f"{where}.{name}".lstrip(".")) for name, part in fields.items())
    elif not isinstance(shape, (list, dict)) and _is_of(value, shape):
        return None
    else:
        expected = "a list" if isinstance(shape, list) else "an object" if isinstance(shape, dict) else _NAMED[shape]
        return f"`{where}` is {str(value)[:40]!r}, expected {expected}"
    return next((fault for fault in found if fault), None)


def _is_of(value: Any, kind: type | None) -> bool:
    if kind is None or kind is object:
        return kind is object or value is None
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


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
        CorruptError: the file is there but is not a manifest of a schema this version reads, or not as a verb writes it.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        content = strict_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"{path} is not JSON: {error}", hint="make the folder anew") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise CorruptError(f"{path}: schema is {str(found)[:40]!r}, expected {SCHEMA!r}", hint="made by another version: make the folder anew")
    if fault := misfit(content, _SHAPE) or _leaving(content.get("files") or {}) or _unexplained(content):
        raise CorruptError(f"{path}: {fault}", hint="not as qlt wrote it: make the folder anew")
    known = {name: content[name] for name in Manifest.__dataclass_fields__ if content.get(name) is not None}
    known.setdefault("command", {})
    return Manifest(**known)


def _leaving(files: Mapping[str, Any]) -> str | None:
    """A sealed file that is not below the folder: reading it would follow a stranger's word to wherever he likes."""
    names = (name for name in files if not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts)
    return next((f"`files` names {name[:80]!r}, expected a path inside the folder" for name in names), None)


def _unexplained(content: Mapping[str, Any]) -> str | None:
    """What an export's command leaves open of its adapters."""
    if content["kind"] != "export":
        return None
    command = content.get("command") or {}
    if fault := misfit(command, _EXPORT, "command"):
        return fault
    for role, said in (command.get("adapters") or {}).items():
        if role not in (content.get("inputs") or {}):
            return f"`command.adapters` names {role[:40]!r}, which `inputs` does not"
        if said["use"] not in _USES:
            return f"`command.adapters.{role}.use` is {said['use'][:40]!r}, expected one of {', '.join(_USES)}"
    return None
