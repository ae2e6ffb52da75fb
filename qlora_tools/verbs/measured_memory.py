"""What resident memory adds to the bytes that are foretold: constants that were measured, and the arithmetic that they enter.

``measured_memory.json`` is written by ``python benchmarks/estimate.py --calibrate`` and says on what it was measured. Every constant has a meaning of
its own, so that a figure can be told part by part; none depends on the model. On CUDA nothing has been measured yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qlora_tools.export.footprint import Weights

FILE = Path(__file__).with_name("measured_memory.json")


@dataclass(frozen=True)
class GraphConstants:
    """ONNX Runtime on the CPU. ``process_bytes``: an engine without a model. ``node_bytes``: of the session, for each node. ``integer_share``: room that
    QGemm's packing leaves with the allocator, of what it packs. ``scale_copies``: copies of blocks' scales. ``plan_copies``: how often the planned
    activations lie in the allocator, once as they came and once as planned."""

    process_bytes: float
    node_bytes: float
    integer_share: float
    scale_copies: float
    plan_copies: float

    def loaded(self, weights: Weights, nodes: int) -> float:
        """Bytes of a session before it runs."""
        packed = weights.packed + weights.largest + self.integer_share * weights.integers + self.scale_copies * weights.scales
        return self.process_bytes + self.node_bytes * nodes + packed + weights.mapped

    def running(self, planned_bytes: int, weights: Weights) -> float:
        """What activations add: they go into the room that packing left first."""
        return max(0.0, self.plan_copies * planned_bytes - weights.largest - self.integer_share * weights.integers)


@dataclass(frozen=True)
class BaseConstants:
    """transformers on the CPU in one format: the process, how often a weight lies in memory, and live bytes that come and go in resident ones."""

    process_bytes: float
    weight_copies: float
    live_share: float


@dataclass(frozen=True)
class Measured:
    """The constants, and ``told``: on what and with which command they were measured."""

    graph: GraphConstants
    bases: Mapping[str, BaseConstants]
    told: Mapping[str, object]

    def transformers(self, setting: str, weights_bytes: int, live_bytes: int) -> int:
        """The peak of a process that writes text with a base in ``setting``; ``live_bytes``: traced, beside the weights."""
        known = self.bases[setting]
        return round(known.process_bytes + known.weight_copies * weights_bytes + known.live_share * live_bytes)


@cache
def measured_memory() -> Measured:
    """The constants that come with the package."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    bases = {name: BaseConstants(**row) for name, row in content["transformers"].items()}
    return Measured(GraphConstants(**content["graph"]), bases, content["measured"])
