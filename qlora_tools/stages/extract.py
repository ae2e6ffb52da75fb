"""Turn the difference of two checkpoints into a LoRA adapter.

Extraction is two plans. The first (:class:`Extraction`) reads base and tuned once and has no outputs: what an adapter
holds depends on values (which tensors changed, how steep their spectra are). :func:`finish`, in ``extract_result.py``,
turns its reports into the second plan, which writes the adapter: factors that are already in memory, and whole tensors
copied from the tuned checkpoint.

Everything that changed ends in the adapter, or in ``ExtractReport.dropped`` with the reason that the caller gave, or is
an error:

=================================  =============================================================================
linears and convolutions targeted  factors (a zero delta: nothing, listed as frozen)
their biases                       ``lora_B.bias`` when every targeted linear has a bias, else the whole bias
linears not targeted               dropped, as asked for
embeddings, head                   whole (``full``), factors (``lora``) or dropped (``drop``)
added vocabulary rows              the whole tensor
norms, other 1-D weights           whole
expert tensors, bare parameters    refused by name, or dropped where ``drop`` names them
=================================  =============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from qlora_tools.engine.plan import Plan, Read, Source, Unit, row_tiles, tile_label
from qlora_tools.errors import IncompatibleError, MissingError, UsageError
from qlora_tools.models.family import Family
from qlora_tools.names import shortened, split_tensor
from qlora_tools.quant.codec import MIN_ELEMENTS, Codec
from qlora_tools.specs import TensorSpec, dtype
from qlora_tools.stages.extract_objective import FORMATS, OBJECTIVES, WEIGHTS, Task, factor_for
from qlora_tools.stages.extract_units import compare, factor, inspect_new

EMBEDDINGS = ("full", "lora", "drop")
FACTORS = ("weighted", "plain")
#: A spread rank may become so many times as large in one tensor.
_SPREAD_UP_TO = 4


@dataclass(frozen=True)
class ExtractConfig:
    """How to extract. At most one of ``rank`` (a number), ``rank="auto"``, ``energy`` and ``max_bytes`` decides the ranks.

    ``rank``: the same for every tensor, or ``"auto"``: singular values above the rounding noise, unless ``max_bytes`` says
    better. ``spread``: ``rank`` is the mean, and the numbers it would take go where they remove most error; ``None``: so where errors are
    weighed and the objective is the change alone. ``energy``: share of
    ||delta||^2 to keep, per tensor. ``max_bytes``: size of the adapter's tensors. ``max_rank``: cap of the adaptive
    modes. ``targets``: preset or regular expression. ``embeddings``: ``full``, ``lora`` or ``drop``. ``dtype``:
    safetensors name of the factors' dtype, ``None``: that of the tuned tensor. ``drop``: regular expressions of tensor
    names that may be left out although they changed.

    ``weight``: what an error costs: ``none`` (all alike), ``input`` (by the layers' inputs) or ``fisher`` (and by what their
    outputs are worth); ``factors``: ``weighted`` ones, or ``plain`` ones whose ranks alone follow the weights; ``None``: plain where
    weights choose ranks, weighted where ranks are given, as held-out text has it (``benchmarks/LOG.md``). ``base_format``: what the
    adapter's base will be stored in (``nf4``, ``int8``, ``int4``; ``None``: as it is), with ``objective`` and ``rest_rank`` as in
    ``extract_objective.py``; ``rest_rank`` ``None`` is a quarter of the rank. ``objective="auto"`` is for verbs, which measure.
    """

    rank: int | str | None = None
    energy: float | None = None
    max_bytes: int | None = None
    max_rank: int = 128
    targets: str = "all"
    embeddings: str = "full"
    dtype: str | None = None
    drop: tuple[str, ...] = ()
    spread: bool | None = None
    weight: str = "none"
    factors: str | None = None
    base_format: str | None = None
    objective: str = "delta"
    rest_rank: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "max_bytes") if getattr(self, name) is not None]
        if len(given) > 1 and not (self.rank == "auto" and self.energy is None):
            raise UsageError(f"{' and '.join(given)} each decide the ranks", hint="give one of them")
        if isinstance(self.rank, str) and self.rank != "auto":
            raise UsageError(f"rank {self.rank!r} is neither a number nor auto")
        if isinstance(self.rank, int) and self.rank < 1:
            raise UsageError(f"rank {self.rank} keeps nothing", hint="give a rank of at least 1")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise UsageError(f"energy {self.energy} is not a share", hint="give a number above 0 and up to 1, such as 0.9")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UsageError(f"max_bytes {self.max_bytes} leaves no room")
        if self.max_rank < 1:
            raise UsageError(f"max_rank {self.max_rank} keeps nothing")
        if self.embeddings not in EMBEDDINGS:
            raise UsageError(f"embeddings {self.embeddings!r} is unknown", hint=f"choose one of {', '.join(EMBEDDINGS)}")
        if self.dtype is not None and not (dtype(self.dtype).is_float and dtype(self.dtype).bits >= 16):
            raise UsageError(f"factors cannot be stored as {self.dtype}", hint="use BF16, F16 or F32")
        for pattern in self.drop:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"drop {pattern!r} is not a regular expression: {error}") from error
        self._check_objective()

    def _check_objective(self) -> None:
        for name, value, known in (
            ("weight", self.weight, WEIGHTS),
            ("factors", self.factors, (None, *FACTORS)),
            ("objective", self.objective, OBJECTIVES),
            ("base_format", self.base_format, (None, *FORMATS)),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!r} is unknown", hint=f"choose one of {', '.join(filter(None, known))}")
        if self.factors is not None and self.weight == "none":
            raise UsageError("factors are weighted or plain where errors are weighed", hint="give --weight input or --weight fisher")
        if self.plain_factors and self.fixed_rank is not None:
            raise UsageError("plain factors of one rank are the same whatever the weights", hint="leave the ranks to the weights with --spread or --max-bytes")
        if self.spread and self.mean_rank is None:
            raise UsageError("spread needs one rank to spread", hint="give --rank N, or --max-bytes without --spread")
        if self.objective != "delta" and self.base_format is None:
            raise UsageError(f"objective {self.objective} is about a quantized base", hint="say which with --for nf4, int8 or int4")
        if self.objective in ("split", "auto") and self.fixed_rank is None:
            raise UsageError(f"objective {self.objective} needs one rank for all tensors", hint="give --rank N")
        if self.rest_rank is not None and not (self.objective in ("split", "auto") and 1 <= self.rest_rank < (self.fixed_rank or 0)):
            raise UsageError(f"rest_rank {self.rest_rank} is a part of the rank of a split", hint="give --objective split and less than --rank")
        if self.objective == "split" and self.rest < 1:
            raise UsageError(f"rank {self.fixed_rank} is too small to split", hint="use --rank 2 or more")

    @property
    def mean_rank(self) -> int | None:
        """The rank of every tensor, or the one that is spread over them; ``None`` where something else decides."""
        if self.energy is not None or self.max_bytes is not None or self.rank == "auto":
            return None
        return 16 if self.rank is None else int(self.rank)

    @property
    def fixed_rank(self) -> int | None:
        """The one rank of every tensor; ``None`` in the adaptive modes."""
        return None if self.spreads else self.mean_rank

    @property
    def spreads(self) -> bool:
        """Whether the rank is a mean."""
        weighed = self.weight != "none" and self.objective == "delta" and self.mean_rank is not None
        return weighed if self.spread is None else self.spread

    @property
    def plain_factors(self) -> bool:
        """Whether weights choose ranks alone."""
        if self.factors is None:
            return self.weight != "none" and self.fixed_rank is None
        return self.factors == "plain"

    @property
    def largest_rank(self) -> int:
        """Up to which rank a tensor is decomposed."""
        return self.fixed_rank or min(self.max_rank, _SPREAD_UP_TO * (self.mean_rank or self.max_rank))

    @property
    def rest(self) -> int:
        """The part of a split's rank that goes to the remainder."""
        rank = self.fixed_rank or 0
        return self.rest_rank or min(max(1, rank // 4), rank - 1)


@dataclass(frozen=True)
class Piece:
    """One tensor of the pair. ``role``: factor, bias, whole, grown, unwanted or refused. ``base_name`` and ``tuned_name``
    differ from ``name`` where one side ties it. ``transposed``: stored [in, out]."""

    name: str
    role: str
    spec: TensorSpec
    base_name: str
    tuned_name: str
    transposed: bool = False
    embedding: bool = False
    reason: str = ""

    @property
    def module(self) -> str:
        return split_tensor(self.name)[0]


@dataclass(frozen=True)
class Extraction:
    """The first plan (sources ``base`` and ``tuned``, no outputs) and what :func:`extract_result.finish` needs to go on."""

    config: ExtractConfig
    pieces: Mapping[str, Piece]
    plan: Plan
    family: Family
    base_specs: Mapping[str, TensorSpec]
    tied: Mapping[str, str] = field(default_factory=dict)


def plan_extract(
    base: Source,
    tuned: Source,
    family: Family,
    config: ExtractConfig,
    *,
    base_ties: Mapping[str, str] | None = None,
    tuned_ties: Mapping[str, str] | None = None,
    known_hashes: Mapping[str, str | None] | None = None,
    moments: Moments | None = None,
    codec: Codec | None = None,
) -> Extraction:
    """Plan the comparison of ``base`` and ``tuned`` from their headers.

    ``moments``: the statistics that ``config.weight`` weighs with, read from the source ``stats``. ``codec``: of ``config.base_format``.

    ``*_ties``: names that a side does not store because they share another tensor's values -> that other.
    ``known_hashes``: base tensors whose stored bytes are not what is read (a quantized base) -> sha256 of the original,
    or ``None`` where it is not known; every other targeted tensor is hashed as it is read.

    Raises:
        IncompatibleError, MissingError: shapes or names that differ, all in one message. UsageError: a rank above a
        tensor's smaller side, or targets that match nothing.
    """
    base_ties, tuned_ties = dict(base_ties or {}), dict(tuned_ties or {})
    pieces = _sort(_Pair(base.specs, tuned.specs, base_ties, tuned_ties), family, config)
    _check_rank(pieces, config)
    context = _Context(tuned.specs, family, config, known_hashes or {}, moments, codec)
    units = [unit for piece in sorted(pieces, key=lambda piece: piece.role != "refused") for unit in _units(piece, context)]
    tied = {name: owner for name, owner in base_ties.items() if tuned_ties.get(name) == owner}
    return Extraction(config, {piece.name: piece for piece in pieces}, Plan((), tuple(units)), family, base.specs, tied)


@dataclass(frozen=True)
class _Pair:
    base: Mapping[str, TensorSpec]
    tuned: Mapping[str, TensorSpec]
    base_ties: Mapping[str, str]
    tuned_ties: Mapping[str, str]

    def names(self) -> list[tuple[str, str, str]]:
        """(name, its name in base, its name in tuned), in order; a side that ties the name gives its owner."""
        every = sorted(self.base.keys() | self.tuned.keys())
        found = [
            (name, name if name in self.base else self.base_ties.get(name, ""), name if name in self.tuned else self.tuned_ties.get(name, "")) for name in every
        ]
        lost = [name for name, base, tuned in found if not tuned]
        added = [name for name, base, tuned in found if not base]
        if lost:
            raise MissingError(
                f"the tuned model lacks {len(lost)} tensors of the base: {shortened(lost)}",
                hint="are the two of the same architecture, and is the tuned checkpoint complete?",
            )
        if added:
            raise IncompatibleError(
                f"the tuned model has {len(added)} tensors that the base lacks: {shortened(added)}", hint="give the base that the tuned model was trained from"
            )
        return found


def _sort(pair: _Pair, family: Family, config: ExtractConfig) -> list[Piece]:
    """Every tensor of the pair with its role; shapes that differ are gathered into one error."""
    names = pair.names()
    linears = {split_tensor(name)[0]: name for name, base, _ in names if _is_factorable(name, pair.base[base], family)}
    chosen = set(family.targets(config.targets, list(linears)))
    pieces, wrong = [], []
    for name, base_name, tuned_name in names:
        spec, other = pair.base[base_name], pair.tuned[tuned_name]
        if spec.shape != other.shape and not (
            _role(name, family) in ("embedding", "head") and len(spec.shape) == len(other.shape) and spec.shape[1:] == other.shape[1:]
        ):
            wrong.append(f"`{name}` is {list(other.shape)}, base has {list(spec.shape)}")
            continue
        role, reason = _treatment(name, spec, other, family, config, linears, chosen)
        transposed = role == "factor" and len(spec.shape) == 2 and family.is_transposed(split_tensor(name)[0])
        embedding = role == "factor" and _role(name, family) == "embedding"
        pieces.append(Piece(name, role, spec, base_name, tuned_name, transposed, embedding, reason))
    if wrong:
        raise IncompatibleError(
            f"{len(wrong)} tensors of the tuned model have other shapes: {'; '.join(wrong)}", hint="give the base that the tuned model was trained from"
        )
    return pieces


def _treatment(
    name: str, spec: TensorSpec, other: TensorSpec, family: Family, config: ExtractConfig, linears: Mapping[str, str], chosen: set[str]
) -> tuple[str, str]:
    """(role, reason) of a tensor; the reason is what a report or error says about a tensor that is left out."""
    module, leaf = split_tensor(name)
    if any(re.search(pattern, name) for pattern in config.drop):
        return "unwanted", "named by --drop"
    if linears.get(module) == name:
        return ("factor", "") if module in chosen else ("unwanted", f"not among --targets {config.targets}")
    if leaf == "bias" and module in linears:
        return ("bias", "") if module in chosen else ("unwanted", f"not among --targets {config.targets}")
    role = _role(name, family)
    if not spec.torch_dtype.is_floating_point:
        return "refused", "it is not made of floating-point numbers"
    if role in ("embedding", "head"):
        if config.embeddings == "drop":
            return "unwanted", "--embeddings drop"
        if spec.shape != other.shape:
            return "grown", ""
        return ("factor" if config.embeddings == "lora" and leaf == "weight" and len(spec.shape) == 2 else "whole"), ""
    if role == "expert" or (len(spec.shape) == 3 and leaf != "weight"):
        return "refused", "expert tensors cannot become a LoRA that PEFT loads"
    if leaf in ("weight", "bias") or role == "norm":
        return "whole", ""
    return "refused", "a parameter of this kind has no place in a LoRA adapter"


def _role(name: str, family: Family) -> str:
    return family.role(split_tensor(name)[0])


def _is_factorable(name: str, spec: TensorSpec, family: Family) -> bool:
    """Linears, and convolutions that read more than one channel (with one, they are small and most often depthwise)."""
    if not spec.torch_dtype.is_floating_point or not spec.numel:
        return False
    convolution = 3 <= len(spec.shape) <= 5 and split_tensor(name)[1] == "weight" and spec.shape[1] > 1 and _role(name, family) in ("attn", "mlp", "other")
    return convolution or family.is_linear(name, spec.shape)


def sides(spec: TensorSpec) -> tuple[int, int]:
    """Rows and columns of a tensor's delta as a matrix: kernels of a convolution are flattened into its columns."""
    return spec.shape[0], spec.numel // spec.shape[0]


def _check_rank(pieces: Iterable[Piece], config: ExtractConfig) -> None:
    rank = config.fixed_rank
    if rank is None:
        return
    narrow = [(min(sides(piece.spec)), piece) for piece in pieces if piece.role == "factor" and min(sides(piece.spec)) < rank]
    if narrow:
        named = shortened(f"`{piece.name}` {list(piece.spec.shape)}" for _, piece in narrow)
        raise UsageError(
            f"rank {rank} is above the smaller side of {len(narrow)} tensors: {named}",
            hint=f"use --rank {min(side for side, _ in narrow)} or less, or --rank auto",
        )


class Moments(Protocol):
    """Names of statistics, as :class:`~qlora_tools.checkpoint.statistics.Statistics` has them."""

    def name_of(self, kind: str, weight: str) -> str | None: ...


@dataclass(frozen=True)
class _Context:
    """What all units of a plan need to know."""

    tuned: Mapping[str, TensorSpec]
    family: Family
    config: ExtractConfig
    known_hashes: Mapping[str, str | None]
    moments: Moments | None
    codec: Codec | None

    def statistics_of(self, piece: Piece) -> dict[str, str]:
        """kind -> name in the source ``stats``; nothing for embeddings, which no product reads."""
        if self.moments is None or self.config.weight == "none" or piece.embedding:
            return {}
        kinds = ("input", "output") if self.config.weight == "fisher" else ("input",)
        return {kind: name for kind in kinds if (name := self.moments.name_of(kind, piece.name))}

    def codec_of(self, piece: Piece) -> Codec | None:
        """What stores the piece in the adapter's base: linears of some size, as ``stages/quantize.py`` takes them."""
        takes = self.codec is not None and self.family.is_storable(piece.name, piece.spec.shape) and piece.spec.numel >= MIN_ELEMENTS
        return self.codec if takes else None


def _units(piece: Piece, context: _Context) -> list[Unit]:
    if piece.role == "factor":
        return [_factor_unit(piece, context)]
    spec = context.tuned[piece.tuned_name]
    if piece.spec.shape != spec.shape:
        grown = TensorSpec(piece.name, spec.dtype, spec.shape)
        return [
            Unit(f"read {tile_label(piece.name, rows)}", (Read("tuned", piece.tuned_name, rows),), (), inspect_new(piece.name)) for rows in row_tiles(grown)
        ]
    check = compare(piece.name, keep_change=piece.role == "bias", refuse_change=piece.reason if piece.role == "refused" else None)
    return [
        Unit(f"compare {tile_label(piece.name, rows)}", (Read("base", piece.base_name, rows), Read("tuned", piece.tuned_name, rows)), (), check)
        for rows in row_tiles(piece.spec)
    ]


def _factor_unit(piece: Piece, context: _Context) -> Unit:
    config, tuned = context.config, context.tuned[piece.tuned_name]
    rank, adaptive = min(config.largest_rank, *sides(piece.spec)), config.fixed_rank is None
    stored = dtype(config.dtype).torch if config.dtype else tuned.torch_dtype
    known, sha256 = piece.base_name in context.known_hashes, context.known_hashes.get(piece.base_name)
    statistics, codec = context.statistics_of(piece), context.codec_of(piece)
    if statistics or (codec is not None and config.objective != "delta"):
        settings = (piece.transposed, tuple(statistics), config.plain_factors, config.objective, config.rest, codec)
        apply = factor_for(Task(piece.spec, rank, stored, adaptive, sha256, not known, *settings))
    else:
        apply = factor(piece.name, rank, stored, adaptive=adaptive, base_sha256=sha256, hash_base=not known)
    reads = (Read("base", piece.base_name), Read("tuned", piece.tuned_name), *(Read("stats", name) for name in statistics.values()))
    return Unit(f"extract {piece.name}", reads, (), apply)
