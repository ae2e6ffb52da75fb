"""A model without weights as a graph: ``torch.export`` on fake tensors, then torch's ONNX translation, then the library's clean-up.

Parameters, and buffers that the checkpoint stores, have a shape and no values, so the whole of it costs the memory of the graph. In the result
they are initializers without a value, named as in the live model; every other buffer keeps its value.

Opset 18 is what torch translates to by default and every runtime of the last years reads; a model with attention takes 23, whose one operator for
it replaces a dozen nodes a layer (and the guards against rows without a key), and one with an exact GELU at least 20.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from qlora_tools import __version__
from qlora_tools.errors import QltError, UnsupportedError
from qlora_tools.export.traced.inputs import Subject, results
from qlora_tools.live.foreign import REFUSALS

#: Operators of torch whose presence asks for a later opset.
_OPSETS = {"scaled_dot_product_attention": 23, "gelu": 20}
_OPSET = 18
_PREFIX = "model."
_LOUD = ("torch", "onnx_ir", "onnxscript")


@dataclass(frozen=True)
class Traced:
    """``empty``: live name -> the initializer that stands for it, without a value."""

    model: ir.Model
    empty: Mapping[str, ir.Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def copy(self) -> Traced:
        """The same graph once more, to put other weights into."""
        model = self.model.clone()
        return Traced(model, {live: model.graph.initializers[str(value.name)] for live, value in self.empty.items()}, self.inputs, self.outputs)


class _Flat(nn.Module):
    """Inputs by position, results as a tuple, floats of both in fp32 whatever the model computes in. ``found`` is told the results' names."""

    def __init__(self, model: Any, subject: Subject, names: tuple[str, ...], found: list[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._subject, self._names, self._found, self._dtype = subject, names, found, dtype

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in zip(self._names, values, strict=True)}
        found = results(self.model(**given, **self._subject.options), self._subject.outputs)
        self._found[:] = list(found)
        return tuple(value.float() if value.is_floating_point() else value for value in found.values())


def build(subject: Subject, dtype: torch.dtype = torch.float32) -> Any:
    """The subject's model in eval mode, parameters on ``meta``, buffers real.

    Raises:
        UnsupportedError: its class refuses its config.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            return subject.build(dtype).eval().requires_grad_(False)
    except QltError:  # a subject that knows better why
        raise
    except REFUSALS as error:
        raise UnsupportedError(f"transformers builds no model from this config.json: {str(error)[:300]}", hint="check it, or give --task") from error


def trace(subject: Subject, model: Any, stored: Collection[str], dtype: torch.dtype = torch.float32) -> Traced:
    """The graph of ``model``, which :func:`build` made. ``stored``: names of its buffers whose values are the checkpoint's.

    Raises:
        UnsupportedError: torch cannot follow the model, or knows no ONNX for one of its operators.
    """
    sample, found = subject.draw(0), list[str]()
    names = tuple(sample)
    empty = _make_fake(model, stored)
    flat = _Flat(model, subject, names, found, dtype)
    axes = tuple(dict.fromkeys(subject.axes.get(name, {}), torch.export.Dim.AUTO) for name in names)
    with _quiet():
        try:
            with torch.no_grad():
                program = torch.export.export(flat, tuple(sample.values()), dynamic_shapes=(axes,), strict=False)
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=_opset(program), optimize=False, verbose=False, input_names=list(names), output_names=found
            )
        except Exception as error:  # torch raises dozens of classes here, each is the same news: this model has no graph
            raise UnsupportedError(f"torch cannot trace {type(model).__name__}: {_reason(error)}", hint="report it with the model's config.json") from error
        assert exported is not None
        graph = exported.model
        initializers = _without_values(graph.graph, empty, type(model).__name__)
        _clean(graph)
    _name_axes(graph.graph, subject.axes)
    left = {name: value for name, value in initializers.items() if value.name in graph.graph.initializers}
    return Traced(graph, left, names, tuple(found))


def _make_fake(model: Any, stored: Collection[str]) -> set[str]:
    """Give every parameter and stored buffer of ``model`` a fake tensor on the CPU; their names."""
    from torch._subclasses import FakeTensorMode

    made = set()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for path, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                    made.add(f"{path}.{leaf}" if path else leaf)
            for leaf, buffer in module._buffers.items():
                name = f"{path}.{leaf}" if path else leaf
                if buffer is not None and name in stored:
                    module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)
                    made.add(name)
    return made


def _opset(program: Any) -> int:
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return max([_OPSET, *(opset for kind, opset in _OPSETS.items() if any(kind in name for name in names))])


def _without_values(graph: ir.Graph, empty: Collection[str], owner: str) -> dict[str, ir.Value]:
    """Take the fake values away, so that no pass asks for them; live name -> initializer."""
    found = {}
    for value in list(graph.initializers.values()):
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and isinstance(raw, torch._subclasses.FakeTensor):
            name = str(value.name).removeprefix(_PREFIX)
            if name not in empty:
                raise UnsupportedError(f"{owner} computes `{name}` from weights while it is built or traced", hint="report it with the model's config.json")
            value.const_value = None
            found[name] = value
    return found


def _clean(model: ir.Model) -> None:
    """Constants folded, equal nodes joined, what nobody reads removed; by onnxscript's passes."""
    from onnxscript import optimizer

    optimizer.optimize(model, num_iterations=2)
    ClearMetadataAndDocStringPass()(model)  # where in whose files each node came from
    model.producer_name, model.producer_version = "qlora-tools", __version__


def _name_axes(graph: ir.Graph, axes: Mapping[str, Mapping[int, str]]) -> None:
    """torch's symbols become the names of the input axes they came from."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in axes.get(str(value.name), {}).items():
            symbol = value.shape[axis] if value.shape is not None else None
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                names.setdefault(str(symbol.value), name)
    for node_or_value in [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]:
        shape = node_or_value.shape
        if shape is not None:
            renamed = [names.get(str(dim.value), dim) if isinstance(dim, ir.SymbolicDim) else dim for dim in shape]
            node_or_value.shape = ir.Shape(renamed)


def _reason(error: BaseException) -> str:
    """The innermost cause, in a line: where an operator is missing, its name is in there."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """torch and the passes say a great deal in passing."""
    loggers = [logging.getLogger(name) for name in (*_LOUD, *(known for known in logging.root.manager.loggerDict if known.startswith(_LOUD)))]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
