"""A graph under construction: nodes in order, constants stored once, names that say where a node comes from.

Thin over onnx-ir. Tensors of the plan come in as external initializers whose bytes may not exist yet; small
constants are written into the graph itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from qlora_tools.export.target import CPU, Target
from qlora_tools.specs import TensorSpec, dtype

CONTRIB = "com.microsoft"


class Nodes:
    """Collects nodes and initializers. ``location`` and ``offsets`` say where a planned tensor's bytes will lie; ``target`` what the graph is for."""

    def __init__(self, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], location: str, target: Target = CPU) -> None:
        self._specs, self._offsets, self._location = specs, offsets, location
        self.target = target
        self._scope: list[str] = []
        self._constants: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}
        self._stored: dict[str, ir.Value] = {}
        self._memo: dict[tuple[str, ir.Value], tuple[ir.Value, ...]] = {}
        self.nodes: list[ir.Node] = []

    @property
    def initializers(self) -> list[ir.Value]:
        return [*self._stored.values(), *self._constants.values()]

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Node names made inside start with ``name/``."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", outputs: int | Sequence[str] = 1, **attributes: Any) -> Any:
        """Append a node; its output value, or a tuple where there are several. An empty name in ``outputs`` is an output left out."""
        base = "/".join([*self._scope, f"{kind}_{len(self.nodes)}"])
        names = [f"{base}:{index}" for index in range(outputs)] if isinstance(outputs, int) else list(outputs)
        values = [ir.Value(name=name) for name in names]
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        self.nodes.append(ir.node(kind, trimmed, attributes, domain=domain, outputs=values, name=base))
        return values[0] if len(values) == 1 else tuple(values)

    def contrib(self, kind: str, *inputs: ir.Value | None, outputs: int | Sequence[str] = 1, **attributes: Any) -> Any:
        """:meth:`op` in ONNX Runtime's own domain."""
        return self.op(kind, *inputs, domain=CONTRIB, outputs=outputs, **attributes)

    def stored(self, name: str, shape: Sequence[int] | None = None, kind: ir.DataType | None = None, use: str = "") -> ir.Value:
        """The planned tensor ``name`` as an initializer in the external file. With ``shape``, or for another ``use``: a second name for the same bytes.

        ``kind`` is what the bytes are where no dtype of checkpoints says so (4-bit integers).
        """
        label = " ".join(part for part in (name, "" if shape is None else f"as {'x'.join(map(str, shape))}", use) if part)
        if label not in self._stored:
            spec = self._specs[name]
            if kind is None:
                code = dtype(spec.dtype).onnx
                assert code is not None, f"{spec} has no ONNX dtype"
                kind = ir.DataType(code)
            dims = ir.Shape(spec.shape if shape is None else shape)
            tensor = ir.ExternalTensor(self._location, self._offsets[name], spec.nbytes, kind, shape=dims, name=label)
            self._stored[label] = ir.Value(name=label, shape=dims, type=ir.TensorType(kind), const_value=tensor)
        return self._stored[label]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the planned tensor ``name``."""
        return self._specs[name].shape

    def holds(self, name: str) -> bool:
        """True where the plan has a tensor of this name."""
        return name in self._specs

    def constant(self, value: Any, kind: Any = np.int64) -> ir.Value:
        """A small constant; equal ones are stored once."""
        array = np.asarray(value, dtype=kind)
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), const_value=ir.tensor(array, name=name)
            )
        return self._constants[key]

    def number(self, value: float) -> ir.Value:
        """A scalar constant in the dtype the graph computes in."""
        return self.constant(value, self.target.float_type.numpy())

    def once(self, what: str, value: ir.Value, make: Any) -> tuple[ir.Value, ...]:
        """``make()`` the first time, the same values afterwards: work on ``value`` that several consumers share."""
        if (what, value) not in self._memo:
            self._memo[what, value] = make()
        return self._memo[what, value]
