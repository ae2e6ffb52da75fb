"""Convolutions of a traced graph in the scheme's int8 form, with the batch normalization behind them folded in.

A normalization with fixed statistics multiplies each output channel by a number and adds another. Neither changes which of a row's
256 levels a weight is nearest to, so the weight is encoded as it is, and the numbers go into the scales and the bias that are
stored. What stays in floats stays as it was traced: the runtime folds the normalization there by itself.

Left in floats: grouped and depthwise convolutions, transposed ones, those with a handful of channels on either side (the first and the
last of most models, where rounding also costs most), and all of them where activations are not 8-bit: on CUDA and in plain floats. So do
convolutions of one position beside a grouped one: the layouts of the two do not meet, and both transpositions would be paid (MobileNet
v2 at half the speed of fp32).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qlora_tools.engine.plan import Outcome, Read, Unit, Write
from qlora_tools.errors import NonFiniteError
from qlora_tools.export.formats.convolution import Patches, Window
from qlora_tools.export.nodes import Nodes
from qlora_tools.export.schemes import Scheme
from qlora_tools.export.traced.layout import Weight
from qlora_tools.finite import is_finite, refuse_non_finite
from qlora_tools.specs import TensorSpec

#: Fewer channels than this, in or out, are not worth gathering into rows.
_FEWEST_CHANNELS = 16
#: With more products than this a sum of them might not fit 32 bits.
_MOST_PRODUCTS = (1 << 31) // 255**2
_FORM = Patches()
#: What is done number by number, in whatever layout.
_ELEMENTWISE = frozenset({"Add", "BatchNormalization", "Clip", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid", "Swish"})


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization: y = gain (x - mean) / sqrt(variance + epsilon) + shift, each by its name in the checkpoint."""

    gain: str
    shift: str
    mean: str
    variance: str
    epsilon: float

    @property
    def names(self) -> tuple[str, str, str, str]:
        return self.gain, self.shift, self.mean, self.variance


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution whose weight is carried in int8. ``weight`` and ``bias`` are names in the checkpoint; ``live``: all names of the model that it takes in.

    ``nodes``: the Conv, and the BatchNormalization if there is one.
    """

    nodes: tuple[ir.Node, ...]
    weight: str
    shape: tuple[int, ...]
    window: Window
    live: tuple[str, ...]
    bias: str | None = None
    norm: Norm | None = None

    @property
    def bias_name(self) -> str | None:
        """The stored bias: the convolution's own, or what the normalization makes of it."""
        return f"{self.weight}.bias" if self.bias or self.norm else None

    def specs(self) -> tuple[TensorSpec, ...]:
        """What is stored."""
        parts = _FORM.parts(self.weight, self.shape)
        return parts if self.bias_name is None else (*parts, TensorSpec(self.bias_name, "F32", (self.shape[0],)))

    def unit(self, source: str) -> Unit:
        """The unit that stores it."""
        names = (self.weight, *((self.bias,) if self.bias else ()), *(self.norm.names if self.norm else ()))
        return Unit(self.weight, tuple(Read(source, name) for name in names), tuple(Write(spec.name) for spec in self.specs()), self._encode)

    def _encode(self, w_OCS: torch.Tensor, *vectors: torch.Tensor) -> Outcome:
        parts = _FORM.encode(self.weight, w_OCS)
        bias_O = vectors[0].double() if self.bias else torch.zeros(len(w_OCS), dtype=torch.float64)
        if self.norm is not None:
            factor_O, bias_O = fold(bias_O, *vectors[-4:], epsilon=self.norm.epsilon)
            parts[f"{self.weight}.scale"] = (parts[f"{self.weight}.scale"].double() * factor_O).float()
        if self.bias_name is not None:
            parts[self.bias_name] = bias_O.float()
        if not all(is_finite(part) for part in parts.values() if part.is_floating_point()):
            for read, tensor in zip(self.unit("").reads, (w_OCS, *vectors), strict=True):
                refuse_non_finite(read.name, tensor)
            raise NonFiniteError(f"`{self.weight}` overflows in the form this scheme stores", hint="export it with --fp32")
        return Outcome(parts)

    def carried(self, w_OCS: torch.Tensor) -> torch.Tensor:
        """The convolution's own weight as the graph carries it, before any normalization; fp32."""
        return _FORM.decode("w", _FORM.encode("w", w_OCS), tuple(w_OCS.shape))


def fold(
    bias_O: torch.Tensor, gain_O: torch.Tensor, shift_O: torch.Tensor, mean_O: torch.Tensor, variance_O: torch.Tensor, *, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor of each output channel, bias) fp64, with which a convolution gives what it and the normalization behind it gave."""
    factor_O = gain_O.double() / (variance_O.double() + epsilon).sqrt()
    return factor_O, (bias_O - mean_O.double()) * factor_O + shift_O.double()


def convolutions_of(graph: ir.Graph, empty: Mapping[str, ir.Value], weights: Mapping[str, Weight], scheme: Scheme) -> tuple[Convolution, ...]:
    """Those of the ``graph``'s convolutions that ``scheme`` carries in int8, in order. ``empty`` and ``weights`` by live name."""
    if scheme.dense or scheme.target.provider != "cpu":
        return ()
    names = {value: live for live, value in empty.items()}
    found = (_convolution(node, names, weights) for node in graph if node.op_type == "Conv" and node.domain == "")
    return tuple(one for one in found if one is not None)


def put_convolutions(graph: ir.Graph, nodes: Nodes, convolutions: Sequence[Convolution], empty: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """The form's nodes in the place of Conv and BatchNormalization; what is left of ``empty`` without the weights of these."""
    for one in convolutions:
        first, x, old = len(nodes.nodes), one.nodes[0].inputs[0], one.nodes[-1].outputs[0]
        assert x is not None
        with nodes.scope(one.weight.removesuffix(".weight")):
            new = _FORM.convolve(nodes, x, one.weight, one.window, None if one.bias_name is None else nodes.stored(one.bias_name))
        graph.insert_before(one.nodes[0], nodes.nodes[first:])
        new.shape, new.type = old.shape, old.type
        if old.is_graph_output():
            old.name, new.name = f"{old.name}/replaced", old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(list(reversed(one.nodes)), safe=True)
    taken = {live for one in convolutions for live in one.live}
    for live in taken:
        graph.initializers.pop(str(empty[live].name))
    return {live: value for live, value in empty.items() if live not in taken}


def _convolution(node: ir.Node, names: Mapping[ir.Value, str], weights: Mapping[str, Weight]) -> Convolution | None:
    owned = _owned(node, names, weights)
    if owned is None or node.inputs[1] not in names:
        return None
    weight = weights[names[node.inputs[1]]]
    window = _window(node, weight.shape)
    if window is None or (len(window.offsets) == 1 and _beside_grouped(node)):
        return None
    bias = owned[1] if len(owned) > 1 else None
    norm_node, normed = _norm(node, names, weights)
    nodes, live = [node], list(owned)
    norm = None
    if norm_node is not None:
        gain, shift, mean, variance = (weights[name].name for name in normed)
        norm = Norm(gain, shift, mean, variance, norm_node.attributes["epsilon"].as_float() if "epsilon" in norm_node.attributes else 1e-5)
        nodes, live = [node, norm_node], [*live, *normed]
    return Convolution(tuple(nodes), weight.name, weight.shape, window, tuple(live), None if bias is None else weights[bias].name, norm)


def _beside_grouped(node: ir.Node) -> bool:
    """Whether a grouped convolution comes next or came before, with nothing in between but what is done number by number."""

    def meets(step: Callable[[ir.Node], Iterable[ir.Node | None]]) -> bool:
        waiting, seen = list(step(node)), {node}
        while waiting:
            one = waiting.pop()
            if one is None or one in seen:
                continue
            seen.add(one)
            if one.op_type == "Conv" and "group" in one.attributes and one.attributes["group"].as_int() > 1:
                return True
            waiting += step(one) if one.op_type in _ELEMENTWISE else ()
        return False

    return meets(lambda one: one.successors()) or meets(lambda one: one.predecessors())


def _owned(node: ir.Node, names: Mapping[ir.Value, str], weights: Mapping[str, Weight]) -> list[str] | None:
    """Live names of a node's inputs after the first, if all are weights of the checkpoint that nothing else uses."""
    found = []
    for value in node.inputs[1:]:
        if value not in names or value is None or len(list(value.uses())) != 1 or weights[names[value]].live != (names[value],):
            return None
        found.append(names[value])
    return found


def _norm(node: ir.Node, names: Mapping[ir.Value, str], weights: Mapping[str, Weight]) -> tuple[ir.Node | None, list[str]]:
    """The BatchNormalization that alone reads what ``node`` gives, and the live names of its four vectors."""
    users = list(node.outputs[0].uses())
    if len(users) != 1 or node.outputs[0].is_graph_output() or users[0][0].op_type != "BatchNormalization" or users[0][0].graph is not node.graph:
        return None, []
    found = users[0][0]
    owned = _owned(found, names, weights)
    training = found.attributes["training_mode"].as_int() if "training_mode" in found.attributes else 0
    return (None, []) if owned is None or training or len(found.outputs) != 1 else (found, owned)


def _window(node: ir.Node, shape: tuple[int, ...]) -> Window | None:
    """How the kernel of ``shape`` [O, C, *kernel] moves; ``None`` where it stays in floats."""
    out, channels, *kernel = shape
    rank = len(kernel)
    attributes = node.attributes
    groups = attributes["group"].as_int() if "group" in attributes else 1
    padding = attributes["auto_pad"].as_string() if "auto_pad" in attributes else "NOTSET"
    if not rank or groups != 1 or padding not in ("NOTSET", "VALID") or min(out, channels) < _FEWEST_CHANNELS or channels * math.prod(kernel) > _MOST_PRODUCTS:
        return None

    def numbers(name: str, default: int, count: int) -> tuple[int, ...]:
        return tuple(attributes[name].as_ints()) if name in attributes else (default,) * count

    pads = numbers("pads", 0, 2 * rank) if padding == "NOTSET" else (0,) * (2 * rank)
    return Window(tuple(kernel), numbers("strides", 1, rank), pads[:rank], pads[rank:], numbers("dilations", 1, rank))
