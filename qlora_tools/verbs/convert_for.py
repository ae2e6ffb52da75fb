"""``qlt convert --to onnx_adapter --for EXPORT``: an adapter for a graph that was exported before, in that graph's own names and packing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qlora_tools.adapters.adapter import Adapter
from qlora_tools.adapters.copies import bound_without_copies
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import IncompatibleError, UsageError
from qlora_tools.export.decoder.branches import Beside, Factors, bind_branches, kept_names
from qlora_tools.export.decoder.export import MODEL_FILE
from qlora_tools.export.decoder.layout import layout_of
from qlora_tools.export.schemes import scheme_of
from qlora_tools.models.decoder import decoder_of
from qlora_tools.names import shortened
from qlora_tools.verbs.inspect import read_graph
from qlora_tools.verbs.verify import manifest_of, request_of

_ADAPTER = "adapter"


def factors_for(export: Path, adapter: Adapter, base: LogicalCheckpoint) -> Mapping[str, Factors]:
    """The factors of ``adapter``, bound to ``base``, that the graph in ``export`` takes.

    Raises:
        MissingError, UsageError: no export there, or one that keeps no adapters. IncompatibleError: the adapter changes matrices for which the graph
        has no inputs. UnsupportedError: it holds more than low-rank changes of linears. CorruptError: the graph or its config.json cannot be read.
    """
    asked = request_of(manifest_of(export))
    inputs = _inputs(export / MODEL_FILE)
    if not any(".lora_" in name for name in inputs):
        raise UsageError(f"the graph in {export} has no inputs for adapters", hint="export it with --adapters")
    decoder = decoder_of(read_json(export / "config.json"))
    table = base.specs[f"{decoder.module('embedding')}.weight"].dtype
    layout = layout_of(decoder, scheme_of(asked.scheme, asked.target), table, asked.target)
    beside = Beside({_ADAPTER: (bound_without_copies(adapter, base, base.ties), 1.0)})
    found = bind_branches(beside, layout, decoder, asked.target).kept[_ADAPTER]
    unknown = [name for name in found if not inputs.issuperset(kept_names(name))]
    if unknown:
        raise IncompatibleError(f"the graph in {export} takes no adapter on {shortened(unknown)}", hint="export it anew, with this one among --adapters")
    return found


def _inputs(graph: Path) -> frozenset[str]:
    return frozenset(value.name for value in read_graph(graph).graph.input)
