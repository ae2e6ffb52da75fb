"""An exported graph that looks once in ONNX Runtime: an encoder, a classifier of text or images, a denoising network.

Inputs are told from the graph and drawn by :mod:`qlora_tools.models.feeds`; they lie on the device before a pass begins, and outputs stay there until they
are read, in buffers that the next pass of the same feed writes again. Of a model in two halves (T5, Whisper) the one that reads is run; the half that writes
is not: its steps wait for a text that grows, which these graphs have no shared buffer for.

Axes: B sequences or images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qlora_tools.errors import MissingError, UnsupportedError, UsageError
from qlora_tools.export.placement import assigned
from qlora_tools.export.runtime.description import describe, read_beside
from qlora_tools.export.runtime.loading import is_runtime_error, load, named_failure
from qlora_tools.export.runtime.stored import initializer_bytes
from qlora_tools.export.runtime.values import filled, kind_of, narrowed, read, widened
from qlora_tools.models.feeds import KNOWN, draw_feed, reads_text

WHOLE, READING_HALF = "model.onnx", "encoder_model.onnx"


@dataclass(frozen=True, eq=False)
class Feed:
    """Inputs on the device, and where a pass leaves its outputs."""

    binding: Any


class ForwardSession:
    """A loaded graph. ``device``: ``cpu``, ``cuda``, or ``auto``, the graph's own.

    Raises:
        MissingError: no graph in ``folder``. UsageError: the device's provider is not in this onnxruntime. CorruptError: ONNX Runtime refuses the graph.
        UnsupportedError: it reads something that cannot be drawn.
    """

    def __init__(self, folder: Path, *, threads: int, device: str = "cpu", memory: str = "runtime", memory_limit: int | None = None) -> None:
        described = describe(folder)
        self._device = described.device if device == "auto" else device
        self._path, self._threads = graph_of(folder), threads
        self._config, self._processor = read_beside(folder / "config.json"), read_beside(folder / "preprocessor_config.json")
        self._loaded = load(self._path, threads, self._device, described, memory=memory, memory_limit=memory_limit)
        self._session = self._loaded.session
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = {value.name: kind_of(value) for value in self._session.get_outputs()}
        if strangers := [name for name in self._inputs if name not in KNOWN]:
            raise UnsupportedError(f"{self._path} reads `{strangers[0]}`, which cannot be drawn here", hint=f"inputs that can: {', '.join(KNOWN)}")

    def feed(self, case: Mapping[str, Any], seed: int, given: Mapping[str, NDArray[Any]] | None = None) -> Feed:
        """Inputs for ``case`` on the device; see ``bench/forward.py``.

        Raises:
            UnsupportedError: a graph of other sizes than the case has. UsageError: as :func:`~qlora_tools.models.feeds.draw_feed`.
        """
        sizes = {"batch": int(case["batch"]), "length": int(case["prompt_tokens"])}
        drawn = draw_feed(self._inputs, self._config, seed=seed, processor=self._processor, given=given, **sizes)
        binding = self._session.io_binding()
        for name, content in drawn.items():
            self._check_sizes(name, content.shape)
            kind = kind_of(self._inputs[name])
            binding.bind_ortvalue_input(name, filled(kind, narrowed(kind, content), self._device))
        for name in self._outputs:
            binding.bind_output(name, self._device)
        return Feed(binding)

    def forward(self, feed: Feed) -> Feed:
        """One pass, waited for.

        Raises:
            OutOfMemory: it does not fit. CorruptError: ONNX Runtime refuses it.
        """
        try:
            self._session.run_with_iobinding(feed.binding)
            feed.binding.synchronize_outputs()
        except Exception as error:
            if not is_runtime_error(error):
                raise
            raise named_failure(error, self._path) from error
        return feed

    def read(self, outputs: Feed) -> dict[str, NDArray[Any]]:
        """Copies of the outputs by name, on the host."""
        values = zip(self._outputs.items(), outputs.binding.get_outputs(), strict=True)
        return {name: np.array(widened(kind, read(kind, value))) for (name, kind), value in values}

    def info(self) -> Mapping[str, Any]:
        """What a benchmark's record keeps about the engine."""
        nodes = None if self._device == "cpu" else dict(Counter(node.provider for node in assigned(self._session)))
        facts: dict[str, Any] = {
            "work": "forward",
            "runtime": f"onnxruntime {ort.__version__}",
            "device": self._device,
            "provider": self._session.get_providers()[0],
            "weights_bytes": initializer_bytes(self._path),
            "threads": self._threads,
            "memory": self._loaded.memory,
            "nodes": nodes,
            "inputs": {name: [str(axis) for axis in value.shape] for name, value in self._inputs.items()},
            "prompt": None if reads_text(self._inputs) else "ignored",
            "part": "encoder" if self._path.name == READING_HALF else None,
        }
        return {name: value for name, value in facts.items() if value is not None}

    def close(self) -> None:
        """Free the session."""
        self._session, self._loaded = None, replace(self._loaded, session=None)

    def _check_sizes(self, name: str, shape: tuple[int, ...]) -> None:
        wanted = self._inputs[name].shape
        if len(wanted) == len(shape) and all(not isinstance(axis, int) or axis == size for axis, size in zip(wanted, shape, strict=True)):
            return
        hint = "export it with axes that move, or ask for these sizes" if len(wanted) == len(shape) else "check config.json beside the graph"
        raise UnsupportedError(f"{self._path}: `{name}` is {list(wanted)} in the graph, {list(shape)} was to be fed", hint=hint)


def graph_of(folder: Path) -> Path:
    """The graph in ``folder`` that is run: the whole model's, else that of the half which reads, else the only one.

    Raises:
        MissingError: there is none, or several of which none has a name known here.
    """
    for name in (WHOLE, READING_HALF):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.onnx"))
    if len(found) != 1:
        listed = f"; it holds {', '.join(path.name for path in found)}" if found else ""
        raise MissingError(f"{folder} holds neither {WHOLE} nor {READING_HALF}{listed}", hint="make an export with `qlt export`")
    return found[0]


def open_forward(
    folder: str, *, threads: int, device: str = "cpu", adapter: str | None = None, memory: str = "runtime", memory_limit: int | None = None
) -> ForwardSession:
    """The factory that a benchmark names; see :class:`ForwardSession`.

    Raises:
        UsageError: an adapter, which no traced graph keeps.
    """
    if adapter is not None:
        raise UsageError(f"{folder} is a traced graph, which keeps no adapters", hint="merge it: qlt export --adapter DIR --merge")
    return ForwardSession(Path(folder), threads=threads, device=device, memory=memory, memory_limit=memory_limit)
