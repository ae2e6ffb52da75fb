"""Adapters of LyCORIS: LoCon with a middle kernel, LoHa and LoKr, rewritten as plain factors without loss.

Names and alpha are those of ``kohya.py``, whose leaves may stand in the same file. What a group of leaves adds to a weight::

    LoCon   lora_down [R, I, 1, 1], lora_mid [R, R, k...], lora_up [O, R, 1, 1]      up (mid down)
    LoHa    hada_w1_a [O, R], hada_w1_b [R, I], hada_w2_a, hada_w2_b                 (w1_a w1_b) * (w2_a w2_b), elementwise
            hada_t1, hada_t2 [R, R, k...] with w_a [R, O], w_b [R, I]                each half a Tucker product
    LoKr    lokr_w1 [P, Q] or w1_a w1_b, lokr_w2 [S, T, k...] or w2_a w2_b           kron(w1, w2)
            lokr_t2 [R, R, k...] with w2_a [R, S], w2_b [R, T]                       w2 a Tucker product
    any     scalar, one number                                                       times this

all times alpha / R, where a LoKr of two whole matrices has no R and no scale. The elementwise product of two matrices of rank R
is one of rank R^2 whose factors are the row-wise Kronecker products of theirs; kron(L1 R1, L2 R2) = kron(L1, L2) kron(R1, R2).
So both are exact as plain factors, of a larger rank. Other kinds of LyCORIS (full differences, norms, (IA)^3, OFT, BOFT, GLoRA,
T-LoRA, sparse) are not low-rank updates of one weight or are too large for one, and are refused by name.

Axes: O outputs, I inputs, R rank, k kernel axes, P Q S T the sides of Kronecker factors.
Source: KohakuBlueleaf/LyCORIS ``lycoris/modules`` and ``lycoris/functional``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from qlora_tools.adapters.formats import grouped, kohya, pairs
from qlora_tools.adapters.formats.grouped import Built, Group
from qlora_tools.adapters.formats.names import Modules
from qlora_tools.adapters.portable import Portable
from qlora_tools.errors import CorruptError, IncompatibleError, UnsupportedError
from qlora_tools.names import shortened

MID, SCALAR = "lora_mid.weight", "scalar"
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOHA_TUCKER = ("hada_t1", "hada_t2")
LOKR = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_w1", "lokr_w2", "lokr_t2")
#: Leaf -> what it belongs to, refused.
REFUSED = {
    "diff": "a full difference",
    "diff_b": "a full difference of a bias",
    "w_norm": "a full difference of a norm",
    "b_norm": "a full difference of a norm",
    "on_input": "(IA)^3",
    "oft_blocks": "OFT or BOFT",
    "rescale": "OFT or BOFT",
    "oft_diag": "OFT",
    "a1.weight": "GLoRA",
    "a2.weight": "GLoRA",
    "b1.weight": "GLoRA",
    "b2.weight": "GLoRA",
    "bm.weight": "GLoRA",
    "q_layer.weight": "T-LoRA",
    "p_layer.weight": "T-LoRA",
    "lambda_layer": "T-LoRA",
    "bias_indices": "a sparse bias",
    "bias_values": "a sparse bias",
    "bias_size": "a sparse bias",
    "lokr_t1": "a LoKr with a kernel in its first factor",
}
_OWN = (MID, SCALAR, *LOHA, *LOHA_TUCKER, *LOKR)
_LEAVES = (*kohya.LEAVES, *_OWN, *REFUSED)
_DIFFUSERS_CONFIG = "lora_adapter_metadata"
#: An expanded layer larger than this (1 GiB in fp32) is a mistake or an attack.
_MAX_NUMBERS = 1 << 28


def recognise(keys: Collection[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file has a leaf that only LyCORIS writes. PEFT's own LoHa and LoKr keep alpha elsewhere and are not of this format."""
    own = {*_OWN, *REFUSED} - {"rescale", SCALAR}
    return any(grouped.split_leaf(key, own) and not key.startswith("base_model.") for key in keys)


def read(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    modules: Modules | Mapping[str, Modules] | None = None,
    *,
    component: str | None = None,
    max_rank: int | None = None,
) -> dict[str, Portable]:
    """Component of the pipeline -> adapter for it, as :func:`kohya.read`. Expanded layers are fp32.

    ``max_rank``: refuse modules whose plain factors need more.

    Raises:
        UnsupportedError: kinds of LyCORIS that are no low-rank update, by name; a rank above ``max_rank``. See
        :func:`kohya.read` for the rest.
    """
    _refuse_kinds(tensors)
    if _DIFFUSERS_CONFIG in metadata:
        raise UnsupportedError(
            f"the scale of this LyCORIS adapter is in the metadata `{_DIFFUSERS_CONFIG}`, which is PEFT's own kind", hint="merge it with diffusers"
        )

    def build(group: Group) -> Built:
        built = _build(group)
        if max_rank is not None and built.layer.rank > max_rank:
            raise UnsupportedError(f"`{group.name}` needs rank {built.layer.rank}, at most {max_rank} was allowed", hint="allow more, then resize the adapter")
        return built

    built, notes = grouped.read(tensors, _LEAVES, build, modules, component)
    return grouped.portables(built, metadata, notes)


def _refuse_kinds(keys: Collection[str]) -> None:
    found = {key: REFUSED[split[1]] for key in keys if (split := grouped.split_leaf(key, REFUSED))}
    if found:
        kinds = ", ".join(sorted(set(found.values())))
        raise UnsupportedError(
            f"the adapter holds {kinds}, which no pair of factors can say: {shortened(found, 20)}",
            hint="merge it into its base with the tool that trained it, then `qlt extract` the difference",
        )


def _build(group: Group) -> Built:
    kinds: list[tuple[tuple[str, ...], Callable[[Group], Built]]] = [((*LOHA, *LOHA_TUCKER), _loha), (LOKR, _lokr), ((MID,), _locon)]
    present = [(leaves, make) for leaves, make in kinds if not group.tensors.keys().isdisjoint(leaves)]
    plain = not group.tensors.keys().isdisjoint((kohya.DOWN, kohya.UP))
    if len(present) > 1 or (plain and present and present[0][1] is not _locon):
        raise CorruptError(f"`{group.name}` mixes kinds of adapters: {shortened(group.tensors, 12)}", hint="save the adapter again")
    built = present[0][1](group) if present else kohya.build(group)
    if SCALAR not in group.tensors:
        return built
    factor = pairs.scalar(group.key(SCALAR), group.tensors[SCALAR])
    layer = built.layer
    return Built(type(layer)(layer.a, layer.b, layer.scale * factor, layer.kind, layer.bias, layer.magnitude), built.stored_rank)


def _locon(group: Group) -> Built:
    """LoCon with a middle kernel: contracted into the down factor."""
    down, mid, up = (_matrix_or_kernel(group, leaf) for leaf in (kohya.DOWN, MID, kohya.UP))
    down_RI, up_OR = _flat_kernel(group, kohya.DOWN, down), _flat_kernel(group, kohya.UP, up)
    a = _tucker(group, mid, down_RI)
    return _expanded(group, a, up_OR, down_RI.shape[0], down_RI.shape[0], kernel=tuple(mid.shape[2:]))


def _loha(group: Group) -> Built:
    w1_a, w1_b, w2_a, w2_b = (_matrix_or_kernel(group, leaf) for leaf in LOHA)
    rank = w1_b.shape[0]
    kernel: tuple[int, ...] | None = tuple(w1_b.shape[2:]) or None
    if not group.tensors.keys().isdisjoint(LOHA_TUCKER):
        t1, t2 = (_matrix_or_kernel(group, leaf) for leaf in LOHA_TUCKER)
        kernel = tuple(t1.shape[2:])
        a1, a2 = _tucker(group, t1, w1_b), _tucker(group, t2, w2_b)
        b1, b2 = w1_a.flatten(1).T, w2_a.flatten(1).T
    else:
        a1, a2, b1, b2 = w1_b, w2_b, w1_a.flatten(1), w2_a.flatten(1)
    a1, a2 = a1.flatten(1), a2.flatten(1)
    if b1.shape[1] != a1.shape[0] or b2.shape[1] != a2.shape[0] or a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
        raise CorruptError(f"`{group.name}`: its LoHa factors do not multiply: {_sizes(group)}", hint="save the adapter again")
    _limit(group, a1.shape[0] * a2.shape[0], a1.shape[1], b1.shape[0])
    a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, a1.shape[1])
    b = (b1[:, :, None] * b2[:, None, :]).reshape(b1.shape[0], -1)
    return _expanded(group, a, b, rank, rank, kernel)


def _lokr(group: Group) -> Built:
    left1, right1 = (side.flatten(1) for side in _whole_or_factors(group, "lokr_w1"))
    left2, right2 = (side.flatten(1) for side in _whole_or_factors(group, "lokr_w2"))
    core = group.tensors.get("lokr_w2", group.tensors.get("lokr_t2"))
    kernel = tuple(core.shape[2:]) or None if core is not None else None
    _limit(group, right1.shape[0] * right2.shape[0], right1.shape[1] * right2.shape[1], left1.shape[0] * left2.shape[0])
    rank = next((group.tensors[leaf].shape[0] for leaf in ("lokr_w2_b", "lokr_w1_b") if leaf in group.tensors), None)
    return _expanded(group, _kronecker(right1, right2), _kronecker(left1, left2), rank, rank or 0, kernel)


def _kronecker(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """``torch.kron`` of two matrices, which refuses some strides of transposed ones."""
    rows, columns = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return (first[:, None, :, None] * second[None, :, None, :]).reshape(rows, columns)


def _whole_or_factors(group: Group, leaf: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, R) with ``L R`` one side of a LoKr; R may carry kernel axes. A whole matrix is split with an identity on its shorter side."""
    if leaf in group.tensors:
        whole = _matrix_or_kernel(group, leaf)
        extra = [other for other in (f"{leaf}_a", f"{leaf}_b") if other in group.tensors]
        if extra:
            raise CorruptError(f"`{group.name}` has `{leaf}` and {shortened(extra)}", hint="save the adapter again")
        matrix = whole.flatten(1)
        rows, columns = matrix.shape
        return (torch.eye(rows, dtype=whole.dtype), whole) if rows <= columns else (matrix, torch.eye(columns, dtype=whole.dtype))
    a, b = _matrix_or_kernel(group, f"{leaf}_a"), _matrix_or_kernel(group, f"{leaf}_b")
    if leaf == "lokr_w2" and "lokr_t2" in group.tensors:
        a, b = a.flatten(1).T, _tucker(group, _matrix_or_kernel(group, "lokr_t2"), b)
    if a.flatten(1).shape[1] != b.shape[0]:
        raise CorruptError(f"`{group.name}`: its LoKr factors do not multiply: {_sizes(group)}", hint="save the adapter again")
    return a, b


def _tucker(group: Group, core: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """``sum_j core[i, j, k...] inner[j, n]``: [R, N, k...]."""
    if core.ndim < 3 or inner.ndim != 2 or core.shape[1] != inner.shape[0]:
        raise CorruptError(f"`{group.name}`: its kernel does not fit its factors: {_sizes(group)}", hint="save the adapter again")
    _limit(group, core.shape[0], inner.shape[1] * core[0, 0].numel(), 1)
    return torch.einsum("ij...,jn->in...", core, inner)


def _expanded(group: Group, a: torch.Tensor, b: torch.Tensor, scale_rank: int | None, stored_rank: int, kernel: tuple[int, ...] | None) -> Built:
    """A checked layer of ``a`` [R, N] (or with kernel axes) and ``b`` [O, R], never of more rank than its weight can have.

    ``scale_rank``: what alpha is divided by, ``None`` for no scale. ``kernel``: kernel axes as the file has them.
    """
    columns = a.flatten(1)
    shape = _weight_shape(group, columns.shape[1], b.shape[0], kernel)
    if a.shape[0] > min(columns.shape[1], b.shape[0]):
        if columns.shape[0] != b.shape[1]:
            raise CorruptError(f"`{group.name}`: its factors do not multiply: {_sizes(group)}", hint="save the adapter again")
        whole = b @ columns
        eye = torch.eye(min(whole.shape), dtype=whole.dtype)
        columns, b = (whole, eye) if whole.shape[0] <= whole.shape[1] else (eye, whole)
    scale = 1.0 if scale_rank is None else kohya.alpha_scale(group, scale_rank)
    layer = pairs.layer(group.name, columns.reshape(-1, *shape[1:]).float(), b.float(), scale, group.shape, kohya.magnitude(group))
    return Built(layer, stored_rank)


def _weight_shape(group: Group, columns: int, outputs: int, kernel: tuple[int, ...] | None) -> tuple[int, ...]:
    """[O, I, k...] of the weight that is changed: the base's if known, else what the file tells.

    Raises:
        UnsupportedError: a convolution, by its name, whose kernel the file flattened away and no base tells.
        IncompatibleError: the base's weight has other sizes.
    """
    if group.shape is not None:
        if (group.shape[0], torch.Size(group.shape[1:]).numel()) != (outputs, columns):
            raise IncompatibleError(
                f"`{group.name}` changes a weight of {outputs} x {columns} numbers, the base has {list(group.shape)}", hint="give the base it was trained on"
            )
        return group.shape
    if kernel is None and "conv" in group.target.pieces[0].module.rpartition(".")[2]:
        raise UnsupportedError(f"`{group.name}`: the file does not tell the kernel of this convolution", hint="give the base model with --base")
    area = torch.Size(kernel or ()).numel()
    return (outputs, columns // area, *(kernel or ()))


def _limit(group: Group, rank: int, columns: int, rows: int) -> None:
    if rank * max(columns, rows) > _MAX_NUMBERS:
        raise UnsupportedError(f"`{group.name}` would need factors of rank {rank} for {rows} x {columns} numbers: {_sizes(group)}", hint="the file is damaged")


def _matrix_or_kernel(group: Group, leaf: str) -> torch.Tensor:
    """A leaf in fp64, with two axes or more."""
    if leaf not in group.tensors:
        raise CorruptError(f"`{group.key(leaf)}` is missing beside {shortened(group.tensors, 12)}", hint="the file is incomplete: download it again")
    return pairs.factor(group.key(leaf), group.tensors[leaf]).double()


def _flat_kernel(group: Group, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor[0, 0].numel() != 1:
        raise CorruptError(f"`{group.key(leaf)}` is {list(tensor.shape)}, expected a 1x1 kernel beside `{MID}`", hint="save the adapter again")
    return tensor.flatten(1)


def _sizes(group: Group) -> str:
    return ", ".join(f"{leaf} {list(tensor.shape)}" for leaf, tensor in group.tensors.items())
