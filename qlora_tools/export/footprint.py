"""What a drawn graph takes while it runs, from its nodes alone: how its weights lie in memory, and how much room ONNX Runtime plans for activations.

The nodes are walked once with the sizes of one run: shapes are computed, small integers (lengths, slices, new shapes) are computed with, and
everything else has a shape and no content. ONNX Runtime remembers the activations of a run by the shapes of its inputs and, when these come again,
takes one block in which every activation has its place: the smallest gap that is free while it lives. The same is done here.

Left out: what a kernel allocates inside itself, and fusions, which only ever take nodes away. What these come to was measured
(``verbs/measured_memory.json``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qlora_tools.errors import UnsupportedError

#: Bytes that the runtime's allocator rounds to.
_ALIGNMENT = 256
#: What a page fault may map of a file that is cached, in the page cache's largest piece: random tokens then touch most of a table (measured on Linux 6.18).
_FAULT_BYTES = 1 << 21
_LOOKED_UP = ("Gather", "GatherBlockQuantized")


@dataclass(frozen=True)
class Weights:
    """Bytes of a graph's stored tensors by what becomes of them when a session is loaded on the CPU.

    ``packed``: codes and floats that a kernel copies into an order of its own; ``integers``: those of them that QGemm packs, out of a transposed copy
    of which the ``largest`` stays with the allocator; ``scales``: of blocks, copied twice and kept as well; ``mapped``: read whole out of the file's mapping;
    ``tables``: bytes of each that is only looked up, row by row.
    """

    packed: int = 0
    integers: int = 0
    largest: int = 0
    scales: int = 0
    mapped: int = 0
    tables: tuple[int, ...] = ()

    def looked_up(self, tokens: int) -> int:
        """Bytes of the tables that ``tokens`` rows, spread evenly, bring into memory; at most all."""
        return sum(int(size * -math.expm1(-tokens * _FAULT_BYTES / size)) for size in self.tables if size)


def weights_of(model: ir.Model) -> Weights:
    """Sort the tensors of ``model``'s data file by the nodes that read them. Names for the same bytes count once."""
    uses: dict[int, set[tuple[str, int]]] = {}
    sizes: dict[int, int] = {}
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            tensor = value.const_value
            place = int(tensor.offset or 0)
            sizes[place] = int(tensor.length or 0)
            uses.setdefault(place, set()).update((node.op_type, index) for node, index in value.uses())
    total: Counter[str] = Counter()
    tables = []
    for place, size in sizes.items():
        kinds = uses[place]
        factors = {name for name, index in kinds if (name, index) in _FACTORS}
        read = {name for name, _ in kinds} - set(_LOOKED_UP) - factors
        if factors:
            total["packed"] += size
            if "QGemm" in factors:
                total["integers"] += size
                total["largest"] = max(total["largest"], size)
        if ("MatMulNBits", 2) in kinds:
            total["scales"] += size
        if read or (factors and len({name for name, _ in kinds}) > 1):
            total["mapped"] += size
        if not factors and not read:
            tables.append(size)
    return Weights(**total, tables=tuple(tables))


#: (operator, number of the input) of factors that a kernel packs.
_FACTORS = {("Gemm", 1), ("MatMul", 1), ("QGemm", 3), ("MatMulNBits", 1)}


@dataclass
class Seen:
    """A value of the walk: its shape, the bytes of an element, and its content where that is small and known."""

    shape: tuple[int, ...]
    itemsize: int
    content: NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def decoder_feeds(model: ir.Model, *, batch: int, new: int, total: int) -> dict[str, Seen]:
    """The inputs of an exported decoder for ``new`` positions of ``batch`` sequences, ``total`` with those before them; logits of the last one only."""
    feeds: dict[str, Seen] = {}
    for value in model.graph.inputs:
        assert value.name is not None
        if value.name == "num_logits_to_keep":
            feeds[value.name] = Seen((1,), 8, np.array([1]))
        elif value.name == "input_ids":
            feeds[value.name] = Seen((batch, new), 8)
        elif value.name == "attention_mask":
            feeds[value.name] = Seen((batch, total), 8)
        else:
            assert value.shape is not None and value.dtype is not None
            free = {"batch_size": batch, "past_sequence_length": total - new}
            sizes = tuple(size if isinstance(size, int) else free.get(str(size), 1) for size in (getattr(dim, "value", dim) for dim in value.shape))
            feeds[value.name] = Seen(sizes, int(value.dtype.itemsize))
    return feeds


def values_of(model: ir.Model, feeds: Mapping[str, Seen]) -> dict[str, Seen]:
    """Every value of a run by name.

    Raises:
        UnsupportedError: a node whose shapes are not known here.
    """
    seen: dict[str, Seen] = {**feeds}
    for value in model.graph.initializers.values():
        if value.name not in seen:
            seen[str(value.name)] = _initial(value)
    for node in model.graph:
        found = _shapes(node, [None if value is None else seen[str(value.name)] for value in node.inputs])
        seen |= {str(value.name): part for value, part in zip(node.outputs, found, strict=True) if value.name and part is not None}
    return seen


def planned_bytes(model: ir.Model, feeds: Mapping[str, Seen]) -> int:
    """Bytes of the one block that holds the activations of a run; what the caller gives or gets is not in it.

    Raises:
        UnsupportedError: a node whose shapes are not known here.
    """
    seen = values_of(model, feeds)
    given = {value.name for value in (*model.graph.inputs, *model.graph.outputs)} | set(model.graph.initializers)
    left = Counter(str(value.name) for node in model.graph for value in node.inputs if value is not None)
    sharing: Counter[str] = Counter()  # values that lie in a buffer
    plan = _Plan()
    holder: dict[str, str] = {}
    for node in model.graph:
        for value in reversed(node.outputs):  # norms make the sum before what is normed
            if not value.name or value.name in given or seen[value.name].content is not None:
                continue
            before = holder.get(str(node.inputs[0].name)) if node.op_type in _VIEWS and node.inputs[0] is not None else None
            holder[value.name] = before or value.name
            if before is None:
                plan.take(value.name, seen[value.name].nbytes)
            sharing[holder[value.name]] += 1
        left.subtract(str(value.name) for value in node.inputs if value is not None)
        for name in {str(value.name) for value in (*node.inputs, *node.outputs) if value is not None and value.name}:
            if not left[name] and name in holder:
                owner = holder.pop(name)
                sharing[owner] -= 1
                if not sharing[owner]:
                    plan.give_back(owner)
    return plan.size


#: Operators that give their input another shape where it lies. Others could write over an input, but the runtime lets them only where it knows
#: from the graph that the sizes are equal, and here they hang on lengths that it learns when it runs.
_VIEWS = ("Reshape", "Unsqueeze", "Squeeze")


@dataclass
class _Plan:
    """Places in one block. A new one goes into the smallest gap that is free at the time."""

    size: int = 0
    _places: dict[str, tuple[int, int]] = field(default_factory=dict)

    def take(self, name: str, nbytes: int) -> None:
        need = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        best, end = None, 0
        for start, stop in sorted(self._places.values()):
            if start - end >= need and (best is None or start - end < best[0]):
                best = start - end, end
            end = max(end, stop)
        if self.size - end >= need and (best is None or self.size - end < best[0]):
            best = self.size - end, end
        place = end if best is None else best[1]
        self._places[name] = place, place + need
        self.size = max(self.size, place + need)

    def give_back(self, name: str) -> None:
        del self._places[name]


# ---- shapes ----


def _initial(value: ir.Value) -> Seen:
    assert value.shape is not None and value.dtype is not None
    shape = tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
    tensor = value.const_value
    small = tensor is not None and not isinstance(tensor, ir.ExternalTensor) and value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
    return Seen(shape, max(1, int(value.dtype.itemsize)), tensor.numpy() if small and tensor is not None else None)


def _shapes(node: ir.Node, inputs: Sequence[Seen | None]) -> list[Seen | None]:
    folded = _folded(node, inputs)
    if folded is not None:
        return [Seen(folded.shape, folded.itemsize, folded)]
    if node.op_type in _SAME:
        found: list[Seen | None] = [_first(inputs)]
    elif node.op_type in _BROADCAST:
        present = [part for part in inputs if part is not None]
        found = [Seen(tuple(np.broadcast_shapes(*(part.shape for part in present))), present[-1].itemsize)]
    elif node.op_type in _RULES:
        found = _RULES[node.op_type](node, [part if part is not None else Seen((), 0) for part in inputs])
    else:
        raise UnsupportedError(f"the memory of `{node.op_type}` is not foretold", hint="measure it with `qlt bench`")
    return [None if part is None else Seen(part.shape, part.itemsize, part.content if node.op_type == "Range" else None) for part in found]


def _first(inputs: Sequence[Seen | None]) -> Seen:
    assert inputs[0] is not None
    return inputs[0]


_SAME = {"Abs", "Neg", "Tanh", "QuickGelu", "Gelu", "FastGelu", "Relu", "Sigmoid", "Softmax", "SimplifiedLayerNormalization", "LayerNormalization"}
_BROADCAST = {"Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Mod", "Where"}


def _folded(node: ir.Node, inputs: Sequence[Seen | None]) -> NDArray[Any] | None:
    """The content of an integer result that follows from known ones."""
    if node.op_type == "Shape":
        return np.array(_first(inputs).shape, np.int64)
    contents = [part.content for part in inputs if part is not None]
    if not contents or any(content is None for content in contents) or node.op_type not in _FOLD:
        return None
    return np.asarray(_FOLD[node.op_type](node, *contents))


def _axis(node: ir.Node, otherwise: int = 0) -> int:
    return int(node.attributes.get_int("axis", otherwise))


def _known(node: ir.Node, part: Seen) -> NDArray[Any]:
    """The content that the shape of a result hangs on.

    Raises:
        UnsupportedError: it is not known before the run.
    """
    if part.content is None:
        raise UnsupportedError(f"`{node.name}` gives a shape that depends on what runs through the graph", hint="measure it with `qlt bench`")
    return part.content


def _sliced(_: ir.Node, x: Any, starts: Any, ends: Any, axes: Any = None) -> Any:
    index = [slice(None)] * x.ndim
    for start, end, axis in zip(starts, ends, range(len(starts)) if axes is None else axes, strict=True):
        index[int(axis)] = slice(int(start), int(end))
    return x[tuple(index)]


_FOLD: dict[str, Callable[..., Any]] = {
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": lambda _, a, b: a // b,
    "Mod": lambda _, a, b: a % b,
    "Neg": lambda _, a: -a,
    "Min": lambda _, *parts: np.minimum.reduce(parts),
    "Max": lambda _, *parts: np.maximum.reduce(parts),
    "Concat": lambda node, *parts: np.concatenate(parts, _axis(node)),
    "Gather": lambda node, x, index: np.take(x, index, _axis(node)),
    "Slice": _sliced,
    "Unsqueeze": lambda _, x, axes: np.expand_dims(x, tuple(axes)),
    "Reshape": lambda _, x, shape: x.reshape(shape),
    "Cast": lambda node, x: x.astype(ir.DataType(node.attributes.get_int("to")).numpy()),
}


def _empty(part: Seen) -> NDArray[np.bool_]:
    """An array of the same shape that takes no memory."""
    return np.broadcast_to(np.False_, part.shape)


def _reshaped(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    x, shape = inputs[0], _known(node, inputs[1])
    sizes = [x.shape[place] if size == 0 else int(size) for place, size in enumerate(shape)]
    if -1 in sizes:
        sizes[sizes.index(-1)] = math.prod(x.shape) // max(1, -math.prod(sizes))
    return [Seen(tuple(sizes), x.itemsize)]


def _split(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    x, axis = inputs[0], _axis(node) % len(inputs[0].shape)
    count = len(node.outputs)
    parts = inputs[1].content if len(inputs) > 1 and inputs[1].content is not None else [x.shape[axis] // count] * count
    return [Seen((*x.shape[:axis], int(size), *x.shape[axis + 1 :]), x.itemsize) for size in parts]


def _slice(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    sliced = _sliced(node, _empty(inputs[0]), *(_known(node, part) for part in inputs[1:]))
    return [Seen(sliced.shape, inputs[0].itemsize)]


def _concat(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    axis = _axis(node) % len(inputs[0].shape)
    whole = sum(part.shape[axis] for part in inputs)
    return [Seen((*inputs[0].shape[:axis], whole, *inputs[0].shape[axis + 1 :]), inputs[0].itemsize)]


def _reduced(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    x = inputs[0]
    axes = inputs[1].content if len(inputs) > 1 else node.attributes.get_ints("axes", range(len(x.shape)))
    gone = {int(axis) % max(1, len(x.shape)) for axis in (range(len(x.shape)) if axes is None else axes)}
    keep = node.attributes.get_int("keepdims", 1)
    return [Seen(tuple(1 if axis in gone else size for axis, size in enumerate(x.shape) if keep or axis not in gone), x.itemsize)]


def _product(rows: Callable[[ir.Node, list[Seen]], int]) -> Callable[[ir.Node, list[Seen]], list[Seen | None]]:
    """[..., I] times a factor of ``rows`` outputs; integers give fp32."""
    return lambda node, inputs: [Seen((*inputs[0].shape[:-1], rows(node, inputs)), max(inputs[0].itemsize, 4 if inputs[0].itemsize == 1 else 0))]


def _last(factor: int) -> Callable[[ir.Node, list[Seen]], int]:
    return lambda node, inputs: inputs[factor].shape[0 if node.attributes.get_int("transB", 0) else -1]


def _attended(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    query, heads, pairs = inputs[0], node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    packed = not inputs[1].itemsize
    width = query.shape[-1] * heads // (heads + 2 * pairs) if packed else query.shape[-1]
    past = inputs[3]
    grown = Seen((*past.shape[:2], past.shape[2] + query.shape[1], past.shape[3]), past.itemsize)
    return [Seen((*query.shape[:-1], width), query.itemsize), grown, grown]


def _gathered(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    table, index = inputs[:2]
    axis = _axis(node)
    return [Seen((*table.shape[:axis], *index.shape, *table.shape[axis + 1 :]), table.itemsize)]


def _gathered_blocks(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    table, index, scale = inputs[:3]
    return [Seen((*index.shape, table.shape[1], node.attributes.get_int("block_size")), scale.itemsize)]


def _ranged(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    found = np.arange(*(int(_known(node, part)) for part in inputs))
    return [Seen(found.shape, inputs[0].itemsize, found)]


def _filled(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    value = node.attributes.get_tensor("value", None)
    return [Seen(tuple(map(int, _known(node, inputs[0]))), 4 if value is None else int(value.dtype.itemsize))]


def _widened(node: ir.Node, inputs: list[Seen]) -> list[Seen | None]:
    return [Seen(np.expand_dims(_empty(inputs[0]), tuple(_known(node, inputs[1]))).shape, inputs[0].itemsize)]


_RULES: dict[str, Callable[[ir.Node, list[Seen]], list[Seen | None]]] = {
    "Reshape": _reshaped,
    "Split": _split,
    "Slice": _slice,
    "Concat": _concat,
    "ReduceMax": _reduced,
    "ReduceMin": _reduced,
    "ReduceSum": _reduced,
    "Gemm": _product(_last(1)),
    "MatMul": lambda node, inputs: [Seen((*inputs[1].shape[:-2], *inputs[0].shape[:-1], inputs[1].shape[-1]), inputs[1].itemsize)],
    "QGemm": _product(_last(3)),
    "MatMulNBits": _product(lambda node, _: node.attributes.get_int("N")),
    "MatMulBnb4": _product(lambda node, _: node.attributes.get_int("N")),
    "Gather": _gathered,
    "GatherBlockQuantized": _gathered_blocks,
    "Unsqueeze": _widened,
    "Range": _ranged,
    "ConstantOfShape": _filled,
    "Cast": lambda node, inputs: [Seen(inputs[0].shape, int(ir.DataType(node.attributes.get_int("to")).itemsize))],
    "QuantizeLinear": lambda node, inputs: [Seen(inputs[0].shape, 1)],
    "DequantizeLinear": lambda node, inputs: [Seen(inputs[0].shape, inputs[1].itemsize)],
    "GroupQueryAttention": _attended,
    "SkipSimplifiedLayerNormalization": lambda node, inputs: [inputs[0], None, None, inputs[0]][: len(node.outputs)],
    "SkipLayerNormalization": lambda node, inputs: [inputs[0], None, None, inputs[0]][: len(node.outputs)],
}
