"""What an adapter does to a model, tensor by tensor: a record of lazily read parts, checked against the base's headers.

Owns the record :class:`Adapter`, the meaning of PEFT's stored key names, and the checks that every key is used and every
shape fits. Leaves out files (``peft_files.py``) and arithmetic on weights (``merged.py``).

Stored keys, after the prefix ``base_model.model.``::

    X.lora_A.weight [R, I]            X.lora_B.weight [O, R]          weight += scale B A   (transposed where X stores [I, O])
    X.lora_A.weight [R, I, k...]      X.lora_B.weight [O, R, 1...]    convolution, the same on flattened kernels
    X.lora_embedding_A [R, V]         X.lora_embedding_B [D, R]       weight += scale (B A)^T
    X.lora_B.bias [O]                                                 bias += scale * this
    X.lora_magnitude_vector [O]                                       DoRA: rows of weight + D rescaled to these lengths
    X.weight, X.bias, X.base_layer.weight ...                         replaces the base's tensor
    X.token_adapter.trainable_tokens_delta [n, D]                     replaces n rows of an embedding

Axes: O outputs, I inputs, R rank, V vocabulary, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from qlora_tools.adapters.peft_config import PeftConfig
from qlora_tools.adapters.peft_keys import parse_key
from qlora_tools.errors import IncompatibleError
from qlora_tools.models.family import GENERIC, Family
from qlora_tools.names import nearest, shortened, split_tensor
from qlora_tools.specs import TensorSpec


@dataclass(frozen=True, eq=False)
class Part:
    """One stored tensor of an adapter. ``key`` is its name in the file; ``read()`` gives it, ``read(rows)`` the rows [start, stop)."""

    key: str
    spec: TensorSpec
    read: Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class Delta:
    """A low-rank update of one base tensor: ``scale * B A``, transposed when the base tensor stores inputs first."""

    a: Part
    b: Part
    scale: float
    transposed: bool = False
    magnitude: Part | None = None

    @property
    def rank(self) -> int:
        return self.a.spec.shape[0]


@dataclass(frozen=True, eq=False)
class BiasDelta:
    """``scale *`` this is added to a bias."""

    part: Part
    scale: float


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Row i of ``part`` replaces row ``rows[i]`` of the base tensor."""

    part: Part
    rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything one adapter does, by the name of the base tensor. Replacements come first, then rows, then deltas.

    ``base_tensors``: sha256 of the stored base tensors it was made for, where known.
    """

    name: str
    config: PeftConfig
    deltas: Mapping[str, Delta] = field(default_factory=dict)
    biases: Mapping[str, BiasDelta] = field(default_factory=dict)
    replacements: Mapping[str, Part] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    base_tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors it touches."""
        return frozenset(self.deltas) | frozenset(self.biases) | frozenset(self.replacements) | frozenset(self.token_rows)


def bind(
    name: str,
    config: PeftConfig,
    parts: Iterable[Part],
    base_specs: Mapping[str, TensorSpec],
    family: Family,
    *,
    ties: Mapping[str, str] | None = None,
    base_tensors: Mapping[str, str] | None = None,
) -> Adapter:
    """Match stored parts to the tensors of a base model, from headers alone.

    ``ties``: tensors that the base does not store because they share another's values -> that other.

    Raises:
        IncompatibleError: keys that match nothing in the base or are not targeted by the configuration, or shapes that do
        not fit; every one is listed.
    """
    binder = _Binder(name, config, dict(base_specs), family, dict(ties or {}))
    for part in parts:
        binder.sort(part)
    return binder.finish(dict(base_tensors or {}))


class _Binder:
    """Collects the parts of one adapter, then checks them all, so that one error tells everything that is wrong."""

    def __init__(self, name: str, config: PeftConfig, base_specs: dict[str, TensorSpec], family: Family, ties: dict[str, str]) -> None:
        self._name, self._config, self._family, self._ties = name, config, family, ties
        self._base = base_specs | {
            tied: TensorSpec(tied, base_specs[owner].dtype, base_specs[owner].shape) for tied, owner in ties.items() if owner in base_specs
        }
        self._lora: dict[str, dict[str, Part]] = {}
        self._rows: dict[str, Part] = {}
        self._whole: dict[str, Part] = {}
        self._unmatched: list[str] = []
        self._wrong: list[str] = []

    def sort(self, part: Part) -> None:
        """File a part under the module path that its key names."""
        key = parse_key(part.key)
        if key.kind == "lora":
            self._lora.setdefault(key.path, {})[key.slot] = part
        elif key.kind == "tokens":
            self._rows[key.path] = part
        elif key.kind == "whole":
            self._whole[key.path] = part
        else:
            self._unmatched.append(part.key)

    def finish(self, base_tensors: dict[str, str]) -> Adapter:
        rename = self._prefix_rule()
        deltas: dict[str, Delta] = {}
        biases: dict[str, BiasDelta] = {}
        for module, slots in self._lora.items():
            self._bind_lora(module, rename(module), slots, deltas, biases)
        replacements = {target: part for path, part in self._whole.items() if (target := self._bind_whole(rename(path), part))}
        token_rows = {f"{rename(module)}.weight": rows for module, part in self._rows.items() if (rows := self._bind_rows(module, rename(module), part))}
        self._report()
        return Adapter(self._name, self._config, deltas, biases, replacements, token_rows, base_tensors)

    def _prefix_rule(self) -> Callable[[str], str]:
        """Module paths of a model class and names in its checkpoint may differ by one leading part (``transformer.``)."""
        paths = [f"{module}.weight" for module in (*self._lora, *self._rows)] + list(self._whole)
        firsts = sorted({name.split(".", 1)[0] + "." for name in self._base} | {path.split(".", 1)[0] + "." for path in paths})
        rules: list[Callable[[str], str]] = [lambda path: path]
        rules += [lambda path, first=first: path.removeprefix(first) for first in firsts]  # type: ignore[misc]
        rules += [lambda path, first=first: first + path for first in firsts]  # type: ignore[misc]
        return max(rules, key=lambda rule: sum(rule(path) in self._base for path in paths))

    def _bind_lora(self, module: str, renamed: str, slots: dict[str, Part], deltas: dict[str, Delta], biases: dict[str, BiasDelta]) -> None:
        target = next((name for name in (f"{renamed}.weight", f"{renamed}.in_proj_weight") if name in self._base), None)
        if target is None or not (self._config.targets(module) or self._targets_tied(target)):
            self._unmatched.extend(part.key for part in slots.values())
            return
        kind = "embedding_" if "embedding_A" in slots or "embedding_B" in slots else ""
        a, b = slots.pop(f"{kind}A", None), slots.pop(f"{kind}B", None)
        magnitude, bias = slots.pop("magnitude_vector", None), slots.pop("B.bias", None)
        self._unmatched.extend(part.key for part in slots.values())
        if a is None or b is None:
            self._wrong.append(f"`{module}` has {'A' if a else 'B'} but not {'B' if a else 'A'}")
            return
        rank, spec = self._config.rank_of(module), self._base[target]
        transposed = self._transposed(renamed, spec.shape, a, b, bool(kind))
        wanted_a, wanted_b = _factor_shapes(spec.shape, rank, transposed)
        fits = self._fits(a, wanted_a) & self._fits(b, wanted_b)
        if magnitude is not None or self._config.use_dora:
            if magnitude is None:
                self._wrong.append(f"`{module}`: use_dora is set but lora_magnitude_vector is missing")
            elif math.prod(magnitude.spec.shape) != wanted_b[0] or max(magnitude.spec.shape, default=0) != wanted_b[0]:
                fits = self._fits(magnitude, (wanted_b[0],))
        if fits:
            deltas[target] = Delta(a, b, self._config.scale_of(module), transposed, magnitude)
        if bias is not None:
            self._bind_bias(renamed, bias, wanted_b[0], self._config.scale_of(module), biases)

    def _targets_tied(self, target: str) -> bool:
        """PEFT's ``ensure_weight_tying`` adapts a tied tensor along with its owner."""
        owner = self._ties.get(target)
        return owner is not None and self._config.ensure_weight_tying and self._config.targets(split_tensor(owner)[0])

    def _transposed(self, module: str, shape: tuple[int, ...], a: Part, b: Part, embedding: bool) -> bool:
        """Whether the base stores [I, O]. Shape decides where it can; for a square weight the family, or the config where the family is unknown."""
        if embedding or len(shape) != 2:
            return embedding
        if shape[0] != shape[1]:
            return (b.spec.shape[:1], a.spec.shape[1:2]) == ((shape[1],), (shape[0],))
        return self._family.is_transposed(module) if self._family.model_type != GENERIC else self._config.fan_in_fan_out

    def _bind_bias(self, module: str, bias: Part, width: int, scale: float, biases: dict[str, BiasDelta]) -> None:
        target = f"{module}.bias" if f"{module}.bias" in self._base else f"{module}.in_proj_bias"
        if target in self._base and self._fits(bias, (width,)):
            biases[target] = BiasDelta(bias, scale)
        elif target not in self._base and (self._fits(bias, (width,)) and bool(bias.read().count_nonzero())):  # zeros change nothing, wherever they stand
            self._wrong.append(f"`{bias.key}` adds to a bias that the base layer does not have")

    def _bind_whole(self, target: str, part: Part) -> str | None:
        spec = self._base.get(target)
        if spec is None:
            self._unmatched.append(part.key)
            return None
        grown = (
            len(spec.shape) == len(part.spec.shape) == 2
            and spec.shape[1] == part.spec.shape[1]
            and self._family.role(split_tensor(target)[0]) in ("embedding", "head")
        )
        return target if grown or self._fits(part, spec.shape) else None

    def _bind_rows(self, module: str, renamed: str, part: Part) -> TokenRows | None:
        spec, rows = self._base.get(f"{renamed}.weight"), self._config.tokens_of(module)
        if spec is None or rows is None:
            self._unmatched.append(part.key)
            return None
        if rows and max(rows) >= spec.shape[0]:
            self._wrong.append(f"`{part.key}`: token index {max(rows)} of an embedding with {spec.shape[0]} rows")
            return None
        return TokenRows(part, rows) if self._fits(part, (len(rows), *spec.shape[1:])) else None

    def _fits(self, part: Part, expected: tuple[int, ...]) -> bool:
        if part.spec.shape == expected:
            return True
        self._wrong.append(f"`{part.key}` is {list(part.spec.shape)}, expected {list(expected)}")
        return False

    def _report(self) -> None:
        if self._wrong:
            raise IncompatibleError(
                f"adapter {self._name} does not fit the base: {'; '.join(self._wrong)}", hint="give the base model that the adapter was trained on"
            )
        if self._unmatched:
            modules = [split_tensor(name)[0] for name in self._base]
            close = nearest(parse_key(self._unmatched[0]).path, modules, 1)
            hint = f"the nearest module of the base is {close[0]}" if close else f"modules of the base are {shortened(modules, 3)}"
            raise IncompatibleError(f"adapter {self._name}: {len(self._unmatched)} keys match nothing in the base: {', '.join(self._unmatched)}", hint=hint)
        if not (self._lora or self._whole or self._rows):
            raise IncompatibleError(f"adapter {self._name} holds no tensors", hint="save the adapter again")


def _factor_shapes(shape: tuple[int, ...], rank: int, transposed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes that A and B must have for a base weight of ``shape``."""
    if transposed:
        return (rank, shape[0]), (shape[1], rank)
    return (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))
