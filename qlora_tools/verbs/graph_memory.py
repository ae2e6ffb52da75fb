"""The memory of ONNX graphs that nobody has drawn yet, from a config: file, cache, and the peak of reading a prompt and writing behind it.

On the CPU the peak is resident memory: a runtime's process, weights as its kernels repack them, tables as far as they are looked up, the cache in
its buffers, logits, and activations as the runtime plans them. On CUDA it is what the runtime's allocator would be asked for, without the context and the
kernels' own workspaces, and has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import onnx_ir as ir

from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.errors import UnsupportedError
from qlora_tools.export.decoder.export import DecoderExport, drawn_graph, plan_export
from qlora_tools.export.footprint import Weights, decoder_feeds, planned_bytes, weights_of
from qlora_tools.export.runtime.cache import SharedCache
from qlora_tools.export.schemes import target_for
from qlora_tools.verbs.measured_memory import GraphConstants, measured_memory

#: What `qlt export` draws for each provider.
SCHEMES = {"cpu": ("fp32", "int8", "w8a8", "int4"), "cuda": ("fp16", "int8", "int4", "nf4")}
MEASURED, UNMEASURED = "measured runs", "not measured"


@dataclass(frozen=True)
class Graph:
    """An ONNX export: its data file, the keys and values of all positions, and the peak. ``weights_bytes``: as they lie in memory once a session is
    loaded, its process included. ``basis``: what the peak rests on; ``peak_bytes`` is None, with the reason there, where it cannot be told."""

    setting: str
    device: str
    file_bytes: int
    cache_bytes: int
    weights_bytes: int | None
    peak_bytes: int | None
    basis: str


@dataclass(frozen=True, eq=False)
class GraphModel:
    """One scheme of one model. ``drawn`` is the whole graph, ``shallow`` one of fewer layers with the same activations."""

    setting: str
    device: str
    export: DecoderExport
    shallow: ir.Model
    weights: Weights
    nodes: int
    kind: ClassVar[str] = "graph"

    @property
    def file_bytes(self) -> int:
        return self.export.file_bytes

    def of(self, batch: int, prompt: int, new: int) -> Graph:
        """Figures of ``new`` tokens behind ``prompt`` ones of each of ``batch`` sequences."""
        decoder = self.export.decoder
        cache = 2 * decoder.layers * decoder.kv_size * batch * (prompt + new) * self.export.target.float_type.itemsize
        told = self.setting, self.device, self.file_bytes, cache
        measured = self.device == "cpu"
        loaded = round(measured_memory().graph.loaded(self.weights, self.nodes)) if measured else self.file_bytes
        try:
            return Graph(*told, loaded, self.peak_bytes(batch, prompt, new), MEASURED if measured else UNMEASURED)
        except UnsupportedError as error:
            return Graph(*told, None, None, str(error))

    def peak_bytes(self, batch: int, prompt: int, new: int) -> int:
        """The highest point of writing text.

        Raises:
            UnsupportedError: a node whose shapes nobody foretells.
        """
        if self.device == "cpu":
            return self.peak(batch, prompt, new, measured_memory().graph)
        # an arena keeps what the first run asked for beside the plan that later runs follow, as on the CPU: a guess until a GPU is measured
        return self.file_bytes + self._held(batch, prompt, new) + 2 * self._planned(batch, prompt, new)

    def peak(self, batch: int, prompt: int, new: int, known: GraphConstants) -> int:
        """Resident bytes on the CPU under given constants.

        Raises:
            UnsupportedError: a node whose shapes nobody foretells.
        """
        running = known.running(self._planned(batch, prompt, new), self.weights)
        looked_up = self.weights.looked_up(batch * (prompt + new))
        return round(known.loaded(self.weights, self.nodes) + running + self._held(batch, prompt, new) + looked_up)

    def _held(self, batch: int, prompt: int, new: int) -> int:
        """What the caller keeps: the cache's buffers as they have grown, and logits."""
        decoder = self.export.decoder
        position = 2 * decoder.layers * decoder.kv_size * batch * self.export.target.float_type.itemsize
        logits = batch * decoder.vocab * self.export.target.logits_type.itemsize
        return int(position * _capacity(prompt, new, decoder.max_positions) + logits)

    def _planned(self, batch: int, prompt: int, new: int) -> int:
        """The larger of the activations of the prompt and of the last token."""
        return max(_planned(self.shallow, batch, prompt, prompt), _planned(self.shallow, batch, 1, prompt + new))


def _capacity(prompt: int, new: int, longest: int | None) -> int:
    """Positions of the buffers that hold ``prompt`` and ``new`` tokens, as the runtime lets them grow."""
    cache = SharedCache((), "cpu", longest)
    cache.start(1, prompt, 2 * prompt)
    while cache.capacity < prompt + new - 1 and cache.make_room(cache.capacity + 1, cache.capacity):
        if cache.capacity == longest:
            break
    return int(cache.capacity)


@lru_cache(maxsize=4096)
def _planned(model: ir.Model, batch: int, new: int, total: int) -> int:
    return planned_bytes(model, decoder_feeds(model, batch=batch, new=new, total=total))


def graph_models(checkpoint: LogicalCheckpoint, shallow: LogicalCheckpoint, provider: str) -> tuple[tuple[GraphModel, ...], str | None]:
    """Every scheme for ``provider``, or none and the reason. ``shallow``: the same model with fewer layers."""
    found = []
    for scheme in SCHEMES[provider]:
        target = target_for(scheme, provider)
        try:
            planned = plan_export(checkpoint, checkpoint.config, scheme, target)
            few = planned if shallow is checkpoint else plan_export(shallow, shallow.config, scheme, target)
        except UnsupportedError as error:
            return (), str(error)
        whole = drawn_graph(planned)
        found.append(GraphModel(scheme, provider, planned, whole if few is planned else drawn_graph(few), weights_of(whole), len(whole.graph)))
    return tuple(found), None
