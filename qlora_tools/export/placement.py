"""Where a session runs each node. On CUDA a node that falls to the CPU costs two copies and a wait on every step, and one copy node forbids CUDA graphs.

Two sources, both kept because neither tells all: the runtime's record of its assignment, known as soon as a session is loaded (:func:`assigned`), and a
profile of a run, which also has the copies that the runtime puts in (:func:`profiled`). Shape arithmetic belongs on the CPU:
:func:`host_nodes` finds it in the graph.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_tools.errors import CorruptError

if TYPE_CHECKING:  # measuring processes come here, and need neither
    import onnx_ir as ir
    import onnxruntime as ort

#: Session entry without which :func:`assigned` has nothing to tell.
RECORD = ("session.record_ep_graph_assignment_info", "1")
#: Operators by which the runtime moves tensors between devices.
COPIES = ("MemcpyToHost", "MemcpyFromHost")
#: Inputs that a host sets and only shape arithmetic reads.
HOST_INPUTS = ("num_logits_to_keep",)
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SHAPES = ("Shape", "Size")
#: Inputs by position that CUDA's kernels read on the host.
_HOST_SLOTS = {
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Unsqueeze": (1,),
    "Squeeze": (1,),
    "Expand": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "ReduceSum": (1,),
    "CumSum": (1,),
    "GroupQueryAttention": (6,),
}


@dataclass(frozen=True, order=True)
class Placed:
    """One node: the ``provider`` (ONNX Runtime's name) that runs it, its name and its operator."""

    provider: str
    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} `{self.name}` on {self.provider}"


def assigned(session: ort.InferenceSession) -> tuple[Placed, ...]:
    """The nodes of a session that was opened with the entry :data:`RECORD`, without the runtime's own copies; empty where this onnxruntime keeps no record."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return ()
    found = [Placed(part.ep_name, node.name, node.op_type) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    return tuple(sorted(found))


def profiled(path: Path) -> tuple[Placed, ...]:
    """The nodes that ran under a profile (``SessionOptions.enable_profiling``), each once.

    Raises:
        CorruptError: not a profile of ONNX Runtime.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        ran = [(event["args"], event["name"]) for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is no profile of onnxruntime", hint="take one with SessionOptions.enable_profiling") from error
    return tuple(sorted({Placed(args["provider"], name.removesuffix("_kernel_time"), args["op_name"]) for args, name in ran if args.get("op_name")}))


def host_nodes(model: ir.Model, host_inputs: Collection[str] = HOST_INPUTS) -> frozenset[str]:
    """Names of nodes that compute on shapes (and constants) only, whose place is the CPU whatever the provider."""
    graph = model.graph
    on_host, constants = {value for value in graph.inputs if value.name in host_inputs}, set(graph.initializers.values())
    names = set()
    for node in graph:
        moving = {value for value in node.inputs if value is not None} - (constants - on_host)
        if node.op_type in _SHAPES or (moving and moving <= on_host and node.op_type != "Range"):  # Range reads on the host and writes on the device
            on_host.update(node.outputs)
            names.add(node.name)
    return frozenset(name for name in names if name)


def crossings(model: ir.Model, host_inputs: Collection[str] = HOST_INPUTS) -> tuple[str, ...]:
    """Where a graph's values would have to be copied between host and device on CUDA, foretold from the graph: ``consumer reads producer`` each."""
    host = host_nodes(model, host_inputs)
    found = []
    for node in model.graph:
        slots = () if node.name in host else _HOST_SLOTS.get(node.op_type, ())
        for place, value in enumerate(node.inputs):
            producer = None if value is None else value.producer()
            if producer is None:
                continue
            wants_host = node.name in host or place in slots
            if node.op_type not in _SHAPES and wants_host != (producer.name in host):
                found.append(f"{node.name} reads {producer.name}")
    return tuple(found)


def strays(nodes: Iterable[Placed], device: str, host: Collection[str] = ()) -> tuple[Placed, ...]:
    """Nodes that are not on ``device`` though they should be, and copies between devices."""
    wanted = _PROVIDERS[device]
    return tuple(node for node in nodes if node.kind in COPIES or (node.provider != wanted and node.name not in host))
