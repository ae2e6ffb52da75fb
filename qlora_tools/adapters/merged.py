"""A base model seen through its adapters: a source whose tensors come out merged, in fp32, never rounded.

``W + sum_j w_j (f_j(W) - W)`` over adapters j with weights w_j, where f_j replaces, adds ``scale B A`` or rescales rows
(DoRA) as PEFT does. For plain LoRA that is ``W + sum w_j scale_j B_j A_j``. Products are fp32 whatever the factors are
stored in; the one rounding is left to whoever stores the result. An adapter that does nothing to a tensor leaves its
bytes alone.

Owns this arithmetic and the check that the base is the one an adapter was made for. Leaves out where base and adapters
come from. Callers keep TF32 off.

Axes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from qlora_tools.adapters.adapter import Adapter, Delta, Part
from qlora_tools.adapters.values import checked
from qlora_tools.checkpoint.logical import LogicalCheckpoint
from qlora_tools.checkpoint.renamed import as_stored, stored_name
from qlora_tools.engine.plan import Source, row_tiles
from qlora_tools.errors import IncompatibleError
from qlora_tools.manifest import read_manifest
from qlora_tools.specs import TensorSpec

Rows = tuple[int, int] | None


def base_fingerprint(base: LogicalCheckpoint) -> Callable[[str], str | None]:
    """How to find the sha256 of the bytes that a base tensor was stored as before any quantization; ``None`` where that is not known."""
    manifest, opened = read_manifest(base.folder), as_stored(base)
    recorded = manifest.source_tensors if manifest else {}

    def sha256(name: str) -> str | None:
        stored = stored_name(base, name)
        if stored is None:
            return None
        if stored in recorded:
            return recorded[stored]
        return opened.stored.sha256(stored) if stored in opened.stored.specs and stored not in opened.quantized else None

    return sha256


class MergedSource:
    """A :class:`~qlora_tools.engine.plan.Source`: ``base`` with ``adapters`` (and their weights) merged in.

    ``ties``: the base's tied names -> owners. Where an adapter changes one of a pair and not the other, both appear in
    ``specs`` and ``untied`` lists the name; the merged config must then say ``tie_word_embeddings: false``.
    ``fingerprint``: see :func:`base_fingerprint`; without it the base is taken on trust. ``added``: tensors of the merged model
    that the base lacks and one adapter brings (a new head), by name.

    Raises (on construction):
        IncompatibleError: the base's first targeted tensor is not the one an adapter was made for, two adapters change
        a tensor in ways that cannot be added, or what is added or resized is weighted.
    """

    def __init__(
        self,
        base: Source,
        adapters: Sequence[tuple[Adapter, float]],
        *,
        ties: Mapping[str, str] | None = None,
        fingerprint: Callable[[str], str | None] | None = None,
        added: Mapping[str, TensorSpec] | None = None,
    ) -> None:
        self._base, self._fingerprint = base, fingerprint
        self._added = dict(added or {})
        assert not self._added.keys() & base.specs.keys(), "what is added is not in the base"
        self._adapters = [(adapter, weight) for adapter, weight in adapters if weight != 0.0]
        self._owner = {tied: owner for tied, owner in (ties or {}).items() if self._comes_apart(tied, owner)}
        self.untied = tuple(sorted(self._owner))
        self.specs: Mapping[str, TensorSpec] = dict(sorted((name, self._spec(name)) for name in (*base.specs, *self._owner, *self._added)))
        self.changed = frozenset(name for adapter, _ in self._adapters for name in adapter.changed if name in self.specs)
        self._verified: set[str] = set()
        self._lock = threading.Lock()
        for adapter, _ in self._adapters:
            first = next((name for name in sorted(adapter.base_tensors) if name in adapter.deltas), None)
            if first is not None:
                self._verify(first)

    def _comes_apart(self, tied: str, owner: str) -> bool:
        """True when some adapter changes only one of a tied pair, or each in its own way."""
        return tied not in self._base.specs and owner in self._base.specs and not all(_changes_alike(adapter, tied, owner) for adapter, _ in self._adapters)

    def _spec(self, name: str) -> TensorSpec:
        base = self._added[name] if name in self._added else self._base.specs[self._owner.get(name, name)]
        shapes = {adapter.replacements[name].spec.shape for adapter, _ in self._adapters if name in adapter.replacements}
        if shapes - {base.shape} or name in self._added:
            involved = [weight for adapter, weight in self._adapters if name in adapter.changed]
            if involved != [1.0]:
                raise IncompatibleError(
                    f"`{name}` is replaced by one of {sorted(shapes)} where the base has {'none' if name in self._added else base.shape}: "
                    "it cannot be weighted or added",
                    hint="merge this adapter alone with weight 1, then the others onto the result",
                )
        return TensorSpec(name, base.dtype, shapes.pop() if len(shapes) == 1 else base.shape)

    def read(self, name: str, rows: Rows = None) -> torch.Tensor:
        """The merged tensor in fp32 (fp64 for fp64 bases), or its rows; in the stored dtype where nothing is added.

        Raises:
            IncompatibleError: the base tensor is not the one an adapter was made for. NonFiniteError: NaN or infinity in an
            adapter's factors.
        """
        stored = self._owner.get(name, name)
        involved = [(adapter, weight) for adapter, weight in self._adapters if name in adapter.changed]
        if not involved:
            return self._base.read(stored, rows)
        self._verify(name)
        alone = involved[0][0] if len(involved) == 1 and involved[0][1] == 1.0 else None
        span = None if _needs_all_rows(name, involved) else rows
        base = alone.replacements[name].read(span) if alone and name in alone.replacements else self._base.read(stored, span)
        merged = _adapted(alone, name, base, span) if alone else _combined(involved, name, base, span)
        return merged if span == rows or rows is None else merged[rows[0] : rows[1]]

    def _verify(self, name: str) -> None:
        """Compare the base tensor's fingerprint with what the adapters were made for, once per tensor."""
        wanted = {adapter.name: adapter.base_tensors[name] for adapter, _ in self._adapters if name in adapter.base_tensors}
        with self._lock:
            due = bool(wanted) and self._fingerprint is not None and name not in self._verified
            self._verified.add(name)
        if not due:
            return
        assert self._fingerprint is not None
        found = self._fingerprint(name)
        for adapter, expected in wanted.items():
            if found is not None and found != expected:
                raise wrong_base(adapter, name, found, expected)


def wrong_base(adapter: str, name: str, found: str, expected: str) -> IncompatibleError:
    """The error for a base whose tensor ``name`` has another sha256 than the adapter was made for."""
    return IncompatibleError(
        f"adapter {adapter} was made for another base: `{name}` has sha256 {found[:12]}, expected {expected[:12]}",
        hint="give the base it was extracted from or trained on",
    )


def _changes_alike(adapter: Adapter, tied: str, owner: str) -> bool:
    """Whether the adapter leaves ``tied`` sharing its owner's values, as PEFT's live model has it."""
    if tied not in adapter.changed and owner not in adapter.changed - adapter.token_rows.keys():
        return True  # PEFT ties replaced token rows by itself
    if adapter.config.ensure_weight_tying:
        return True
    first, second = adapter.replacements.get(tied), adapter.replacements.get(owner)
    others = (adapter.deltas.keys() | adapter.biases.keys() | adapter.token_rows.keys()) & {tied, owner}
    return first is not None and second is not None and not others and _equal(first, second)


def _equal(first: Part, second: Part) -> bool:
    """Whether two stored tensors hold the same values, compared in row tiles: they may be whole vocabularies."""
    if first.spec.shape != second.spec.shape:
        return False
    return all(torch.equal(first.read(rows), second.read(rows)) for rows in row_tiles(first.spec))


def _needs_all_rows(name: str, involved: Sequence[tuple[Adapter, float]]) -> bool:
    """DoRA on a tensor that stores inputs first rescales columns, whose lengths take every row."""
    deltas = [adapter.deltas[name] for adapter, _ in involved if name in adapter.deltas]
    return any(delta.magnitude is not None and delta.transposed for delta in deltas)


def _combined(involved: Sequence[tuple[Adapter, float]], name: str, base: torch.Tensor, span: Rows) -> torch.Tensor:
    """``W + sum w_j (f_j(W) - W)`` for rows ``span``."""
    start = _widened(base)
    result = start.clone()
    for adapter, weight in involved:
        delta = adapter.deltas.get(name)
        if delta is not None and delta.magnitude is None and name not in adapter.replacements and name not in adapter.token_rows:
            _add_product(result, delta, delta.scale * weight, span)
        else:
            result += weight * (_widened(_adapted(adapter, name, base, span, whole_is_base=True)) - start)
    return result


def _adapted(adapter: Adapter, name: str, base: torch.Tensor, span: Rows, *, whole_is_base: bool = False) -> torch.Tensor:
    """f(W) of one adapter for rows ``span``. ``base`` is already its replacement unless ``whole_is_base``."""
    result = base
    if whole_is_base and name in adapter.replacements:
        result = adapter.replacements[name].read(span)
    if name in adapter.token_rows:
        result = _with_token_rows(result, adapter, name, span)
    if name in adapter.biases:
        bias = adapter.biases[name]
        result = _widened(result) + bias.scale * _rows(checked(bias.part.key, bias.part.read()), span).to(_wide(result))
    delta = adapter.deltas.get(name)
    if delta is None:
        return result
    if delta.magnitude is None:
        changed = _widened(result).clone()
        return changed if _add_product(changed, delta, delta.scale, span) else result
    return _rescaled(_widened(result).clone(), delta, span)


def _rescaled(result: torch.Tensor, delta: Delta, span: Rows) -> torch.Tensor:
    """DoRA: ``m (W + D) / ||W + D||``, lengths taken per output."""
    assert delta.magnitude is not None
    _add_product(result, delta, delta.scale, span)
    magnitude_O = checked(delta.magnitude.key, delta.magnitude.read()).reshape(-1).to(result.dtype)
    if delta.transposed:
        return result.mul_(magnitude_O / torch.linalg.vector_norm(result, dim=0))
    lengths_O = torch.linalg.vector_norm(result.flatten(1), dim=1)
    return result.mul_((_rows(magnitude_O, span) / lengths_O).view(-1, *(1 for _ in result.shape[1:])))


def _add_product(result: torch.Tensor, delta: Delta, scale: float, span: Rows) -> bool:
    """Add ``scale B A`` to rows ``span`` of the weight, in place. False when a factor is zero and nothing was touched."""
    wide = result.dtype
    a_RI = checked(delta.a.key, delta.a.read()).to(device=result.device, dtype=wide).reshape(delta.rank, -1)
    b_OR = checked(delta.b.key, delta.b.read()).to(device=result.device, dtype=wide).reshape(-1, delta.rank)
    if not bool(a_RI.any()) or not bool(b_OR.any()):
        return False
    left, right = (_rows(a_RI.T, span), b_OR.T) if delta.transposed else (_rows(b_OR, span), a_RI)
    result.view(left.shape[0], -1).addmm_(left, right, alpha=scale)
    return True


def _with_token_rows(base: torch.Tensor, adapter: Adapter, name: str, span: Rows) -> torch.Tensor:
    tokens = adapter.token_rows[name]
    start, stop = span or (0, base.shape[0])
    pairs = [(row - start, position) for position, row in enumerate(tokens.rows) if start <= row < stop]
    result = base.clone()
    if pairs:
        result[[row for row, _ in pairs]] = checked(tokens.part.key, tokens.part.read())[[position for _, position in pairs]].to(base.dtype)
    return result


def _rows(tensor: torch.Tensor, span: Rows) -> torch.Tensor:
    return tensor if span is None else tensor[span[0] : span[1]]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(_wide(tensor))
