"""The file of a model's calibration statistics: second moments of what its linears read, and of what flows back to them.

One safetensors file, so it is a :class:`~qlora_tools.engine.plan.Source` and units read from it like from any other. Tensors, all F32,
``W`` being the name of a weight in the checkpoint that was calibrated:

=================  ==========  ========================================================================
``input.W``        [I, I]      E[x x'] over the tokens that teach; stored once for weights that share their input
``held_out.W``     [I, I]      the same over the windows that judge
``mean.W``         [I]         E[x] over the tokens that teach
``output.W``       [O, O]      E[g g'] of the gradients of log-likelihood at the layer's output (Fisher), if asked for
=================  ==========  ========================================================================

I counts the weight's inputs in [out, in] orientation (a convolution's kernels flattened into it), O its outputs. The metadata say which weights
share an input, what text it was and which model. Left out: collecting (``calibrate/``) and using (``quant/``, ``lowrank/``).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.folder import explained_disk_errors
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.checkpoint.writer import write_all
from qlora_tools.errors import CorruptError, IncompatibleError
from qlora_tools.specs import TensorSpec, byte_view

FORMAT = "qlt-statistics"
VERSION = "1"
INPUT, HELD_OUT, MEAN, OUTPUT = "input", "held_out", "mean", "output"
#: How many weights ``check`` compares: the smallest ones, and the first and last.
_CHECKED = 3
_HEADER_BYTES, _HEADER_BYTES_PER_WEIGHT = 65536, 1024


@dataclass(frozen=True)
class Origin:
    """What statistics were taken from. ``headers_sha256`` and ``weights`` (name -> sha256 of the stored bytes) tell the model; ``shared``: weight ->
    the weight under whose name its input's moments are stored; ``tokens``: how many taught."""

    model: str
    headers_sha256: str
    weights: Mapping[str, str]
    shared: Mapping[str, str]
    text: str
    text_sha256: str
    tokens: int
    held_out_tokens: int

    def metadata(self) -> dict[str, str]:
        """As safetensors keeps it: strings."""
        return {"format": FORMAT, "version": VERSION, "origin": json.dumps(asdict(self), sort_keys=True)}


class Statistics:
    """An open file of statistics, a source of its tensors. Reading is thread-safe.

    Raises (on construction):
        CorruptError: not such a file, or its tensors contradict its metadata. And what :class:`SafetensorsFile` raises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = SafetensorsFile(path)
        self.origin = _origin(path, self._file.metadata)
        self.specs: Mapping[str, TensorSpec] = self._file.specs
        _check_tensors(path, self.specs, self.origin)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A tensor of the file, F32."""
        return self._file.read(name, rows)

    def name_of(self, kind: str, weight: str) -> str | None:
        """The tensor of ``kind`` (``input``, ``held_out``, ``mean``, ``output``) that belongs to ``weight``; ``None`` where it was not taken."""
        owner = weight if kind == OUTPUT else self.origin.shared.get(weight, weight)
        name = f"{kind}.{owner}"
        return name if name in self.specs else None

    @property
    def has_gradients(self) -> bool:
        """Whether output gradients were asked for when the statistics were taken."""
        return any(name.startswith(f"{OUTPUT}.") for name in self.specs)

    def check(self, *models: LogicalCheckpoint) -> None:
        """Make sure that the statistics are of one of ``models``: config, names and shapes, and the bytes of a few of its weights.

        Raises:
            IncompatibleError: they are of another model.
        """
        if not any(self._is_of(model) for model in models):
            raise IncompatibleError(
                f"{self.path} was taken from {self.origin.model}, whose weights are not those of {' or '.join(str(model.folder) for model in models)}",
                hint="run `qlt calibrate` on this model",
            )

    def _is_of(self, model: LogicalCheckpoint) -> bool:
        weights = self.origin.weights
        if model.stored.headers_sha256() != self.origin.headers_sha256 or not weights.keys() <= model.specs.keys():
            return False
        ordered = sorted(weights, key=lambda name: (model.specs[name].nbytes, name))
        return all(model.sha256(name) == weights[name] for name in {*ordered[:_CHECKED], min(weights, default=""), max(weights, default="")} - {""})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Statistics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StatisticsWriter:
    """Writes a file of statistics as they come: what it will hold is known only once the model has run, so the header goes last, into space that
    was kept for it. The file appears under its name when all is written (:meth:`close`), or not at all (:meth:`abort`).

    ``weights``: how many weights the model has, which bounds the header.
    """

    def __init__(self, path: Path, weights: int) -> None:
        self.path = path
        self._data_start = header_bytes(weights)
        self._position = self._data_start
        self._entries: dict[str, dict[str, Any]] = {}
        self._partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
        with explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensors so far."""
        return self._position - self._data_start

    def add(self, name: str, tiles: Iterable[torch.Tensor]) -> None:
        """A tensor as row tiles (or one vector), F32."""
        start, rows = self._position, 0
        trailing: tuple[int, ...] = ()
        for tile in tiles:
            assert tile.dtype == torch.float32, name
            with explained_disk_errors(self.path):
                data = byte_view(tile)
                write_all(self._descriptor, data, self._position)
            self._position += len(data)
            rows, trailing = rows + len(tile), tuple(tile.shape[1:])
        offsets = [start - self._data_start, self._position - self._data_start]
        self._entries[name] = {"dtype": "F32", "shape": [rows, *trailing], "data_offsets": offsets}

    def close(self, origin: Origin) -> None:
        """Write the header and give the file its name."""
        header = {"__metadata__": origin.metadata(), **self._entries}
        text = json.dumps(header, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()
        length = self._data_start - 8
        assert len(text) <= length, "the header outgrew its space"
        with explained_disk_errors(self.path):
            write_all(self._descriptor, memoryview(length.to_bytes(8, "little") + text + b" " * (length - len(text))), 0)
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._partial.replace(self.path)

    def abort(self) -> None:
        """Leave nothing behind, unless :meth:`close` was reached."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._partial.unlink(missing_ok=True)


def header_bytes(weights: int) -> int:
    """Where the tensors begin in a file of statistics of a model of so many weights."""
    return _HEADER_BYTES + _HEADER_BYTES_PER_WEIGHT * weights


def _origin(path: Path, metadata: Mapping[str, str]) -> Origin:
    if metadata.get("format") != FORMAT:
        raise CorruptError(f"{path} holds no calibration statistics", hint="make them with `qlt calibrate`")
    if metadata.get("version") != VERSION:
        raise CorruptError(f"{path}: statistics of version {metadata.get('version')!r}, expected {VERSION}", hint="run `qlt calibrate` again")
    try:
        found: dict[str, Any] = json.loads(metadata["origin"])
        origin = Origin(**found)
        plain = all(isinstance(value, str) for mapping in (origin.weights, origin.shared) for value in mapping.values())
        plain = plain and all(type(value) is int and value >= 0 for value in (origin.tokens, origin.held_out_tokens))
        plain = plain and all(isinstance(value, str) for value in (origin.model, origin.headers_sha256, origin.text, origin.text_sha256))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{path}: its metadata do not say what it was taken from", hint="run `qlt calibrate` again") from error
    if not plain:
        raise CorruptError(f"{path}: its metadata hold something else than names and counts", hint="run `qlt calibrate` again")
    return origin


def _check_tensors(path: Path, specs: Mapping[str, TensorSpec], origin: Origin) -> None:
    for spec in specs.values():
        kind, _, weight = spec.name.partition(".")
        square = len(spec.shape) == 2 and spec.shape[0] == spec.shape[1]
        fits = (kind in (INPUT, HELD_OUT, OUTPUT) and square) or (kind == MEAN and len(spec.shape) == 1)
        if spec.dtype != "F32" or not fits or not weight:
            raise CorruptError(f"{path}: {spec} is not a tensor of statistics", hint="run `qlt calibrate` again")
    for weight, owner in origin.shared.items():
        if f"{INPUT}.{owner}" not in specs:
            raise CorruptError(f"{path}: the input of `{weight}` is said to be stored with `{owner}`, which is not there")
