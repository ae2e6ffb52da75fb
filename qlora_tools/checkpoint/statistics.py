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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.errors import CorruptError, IncompatibleError
from qlora_tools.specs import TensorSpec

FORMAT = "qlt-statistics"
VERSION = "1"
INPUT, HELD_OUT, MEAN, OUTPUT = "input", "held_out", "mean", "output"


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
        if model.stored.headers_sha256() != self.origin.headers_sha256:
            return False
        return all(name in model.specs and model.sha256(name) == digest for name, digest in self.origin.weights.items())


def _origin(path: Path, metadata: Mapping[str, str]) -> Origin:
    if metadata.get("format") != FORMAT:
        raise CorruptError(f"{path} holds no calibration statistics", hint="make them with `qlt calibrate`")
    if metadata.get("version") != VERSION:
        raise CorruptError(f"{path}: statistics of version {metadata.get('version')!r}, expected {VERSION}", hint="run `qlt calibrate` again")
    try:
        found: dict[str, Any] = json.loads(metadata["origin"])
        origin = Origin(**found)
        plain = all(isinstance(value, str) for mapping in (origin.weights, origin.shared) for value in mapping.values())
        plain = plain and all(isinstance(value, str) for value in (origin.model, origin.headers_sha256, origin.text, origin.text_sha256))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{path}: its metadata do not say what it was taken from", hint="run `qlt calibrate` again") from error
    if not plain:
        raise CorruptError(f"{path}: its metadata hold something else than names", hint="run `qlt calibrate` again")
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
