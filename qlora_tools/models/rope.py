"""Rotary position embeddings: which rotation each position gets, from the config's rope entries.

Frequencies follow the definitions that checkpoints are trained with (RoFormer, arXiv 2104.09864; linear
interpolation, arXiv 2306.15595; the Llama 3.1 release's wavelength-dependent scaling; YaRN, arXiv
2309.00071; LongRoPE, arXiv 2402.13753). ``dynamic``, whose frequencies change with every length, is refused.

LongRoPE has two sets of frequencies, and the whole input takes the second once it is longer than the original
length. A graph gets both as one table: rows ``[0, original)`` for short inputs, the rows from ``original`` on for
long ones, and positions are shifted by ``original`` where the input is long (:attr:`Rope.switch`). Keys that were
cached before an input outgrew the original length keep the rotation they had: a runtime has to run the input again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.models.reading import ConfigReader, positive

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
#: Config entries that one of the kinds above reads, or that say the same twice. Anything else would change the rotation unseen.
_ENTRIES = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "partial_rotary_factor",
        "short_factor",
        "long_factor",
        "short_mscale",
        "long_mscale",
    ]
)


@dataclass(frozen=True)
class Rope:
    """``kind`` is one of :data:`KINDS`; ``size`` is the even number of rotated dimensions, at the beginning of each head.

    ``factors`` are LongRoPE's divisors of the frequencies for short and for long inputs, and ``switch`` the longest input that counts as short
    (``None``: there is but one set).
    """

    kind: str
    theta: float
    size: int
    options: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    switch: int | None = None

    def frequencies(self, *, long: bool = False) -> torch.Tensor:
        """Radians per position, fp32 [size / 2]."""
        exponents = torch.arange(0, self.size, 2, dtype=torch.int64).to(torch.float32) / self.size
        if self.factors is not None:
            return 1.0 / (torch.tensor(self.factors[long], dtype=torch.float32) * self.theta**exponents)
        inverse = 1.0 / self.theta**exponents
        if self.kind == "linear":
            return inverse / self.options["factor"]
        if self.kind == "llama3":
            return _llama3(inverse, self.options)
        if self.kind == "yarn":
            return _yarn(inverse, self.theta, self.size, self.options)
        return inverse

    def rows(self, max_positions: int) -> int:
        """Rows of the table that serves inputs of up to ``max_positions``."""
        return max_positions + (self.switch or 0)

    def caches(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of rows ``[start, stop)`` of the table, each fp32 [rows, size / 2]."""
        rows = torch.arange(start, stop, dtype=torch.float32)[:, None]
        angles = rows * self.frequencies()[None, :]
        if self.switch is not None:
            angles = torch.where(rows < self.switch, angles, (rows - self.switch) * self.frequencies(long=True)[None, :])
        scale = self.options.get("attention_factor", 1.0)
        return angles.cos() * scale, angles.sin() * scale


def rope_entry(values: ConfigReader) -> Mapping[str, Any]:
    """The rope entries in the current layout (``rope_parameters``) or the older one (``rope_scaling``); may be empty, or hold one per kind of layer."""
    current, older = values.get("rope_parameters"), values.get("rope_scaling")
    found = current or older or {}
    if not isinstance(found, Mapping):
        raise IncompatibleError(f"config.json: rope_parameters is {found!r}, expected an object")
    return found


def rope_of(
    entry: Mapping[str, Any],
    theta: Any,
    values: ConfigReader,
    head_size: int,
    max_positions: int,
    *,
    partial: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> Rope:
    """The rotation that ``entry`` asks for; ``theta`` holds where the entry has no base of its own.

    ``partial``: the family knows heads of which only a part is rotated. ``aliases``: the family's own names of kinds.

    Raises:
        UnsupportedError: a kind or an entry that has no graph here, or a part where the family has none.
        IncompatibleError: an entry that the kind needs is missing or does not fit.
    """
    name = str(entry.get("rope_type") or entry.get("type") or "default")
    kind = {"su": "longrope", **(aliases or {})}.get(name, name)
    if kind not in KINDS:
        raise UnsupportedError(f"rope type `{kind}` has no graph here", hint=f"supported: {', '.join(KINDS)}")
    if any(isinstance(value, Mapping) for value in entry.values()):
        raise UnsupportedError("rope parameters that differ between layers have no graph here")
    unknown = sorted(key for key, value in entry.items() if value and key not in _ENTRIES)
    if unknown:
        raise UnsupportedError(f"rope entries {', '.join(unknown)} have no graph here", hint=f"known: {', '.join(sorted(_ENTRIES))}")
    base = positive(entry.get("rope_theta") or theta or 10_000.0, "rope_theta")
    size = _rotated(entry, values, head_size, partial=partial)
    # the entry outside wins where a family has one: it is what the positions were trained with
    outside = values.get("original_max_position_embeddings")
    original = positive(outside or entry.get("original_max_position_embeddings") or max_positions, "original_max_position_embeddings")
    if kind == "linear":
        return Rope(kind, base, size, {"factor": positive(entry.get("factor"), "factor")})
    if kind == "llama3":
        options = {key: positive(entry.get(key), key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return Rope(kind, base, size, options | {"original": original})
    if kind == "yarn":
        return Rope(kind, base, size, _yarn_options(entry, original, max_positions))
    if kind == "longrope":
        return _longrope(entry, base, size, int(original), max_positions)
    return Rope(kind, base, size)


def _rotated(entry: Mapping[str, Any], values: ConfigReader, head_size: int, *, partial: bool) -> int:
    """Rotated dimensions of each head."""
    share = positive(entry.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0, "partial_rotary_factor")
    if share != 1.0 and not partial:
        raise UnsupportedError("partial_rotary_factor other than 1 has no graph in this family")
    size = int(head_size * share)
    if size % 2 or not 0 < size <= head_size:
        what = f"head size {head_size}" if share == 1.0 else f"partial_rotary_factor {share} of head size {head_size}"
        raise IncompatibleError(f"{what} is odd and cannot be rotated in pairs" if size % 2 else f"{what} rotates {size} dimensions")
    return size


def _longrope(entry: Mapping[str, Any], theta: float, size: int, original: int, max_positions: int) -> Rope:
    short, long = (tuple(entry.get(key) or ()) for key in ("short_factor", "long_factor"))
    for key, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != size // 2:
            raise IncompatibleError(f"config.json: rope entry `{key}` has {len(factors)} numbers, expected {size // 2}")
    for key in ("short_mscale", "long_mscale"):
        if entry.get(key) not in (None, 1, 1.0):
            raise UnsupportedError(f"rope entry `{key}` other than 1 has no graph here")
    factor = positive(entry.get("factor") or max_positions / original, "factor")
    scale = entry.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    switch = original if max_positions > original else None
    options = {"attention_factor": positive(scale, "attention_factor"), "original": float(original)}
    return Rope("longrope", theta, size, options, (tuple(positive(x, "short_factor") for x in short), tuple(positive(x, "long_factor") for x in long)), switch)


def _llama3(inverse: torch.Tensor, options: Mapping[str, float]) -> torch.Tensor:
    """Long wavelengths are slowed by ``factor``, short ones kept, those between blended."""
    low, high, original = options["low_freq_factor"], options["high_freq_factor"], options["original"]
    turns = original * inverse / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * inverse / options["factor"] + blend * inverse


def _yarn_options(entry: Mapping[str, Any], original: float, max_positions: int) -> dict[str, float]:
    factor = float(entry.get("factor") or max_positions / original)
    scale, scale_all = entry.get("mscale"), entry.get("mscale_all_dim")
    attention = entry.get("attention_factor")
    if attention is None:
        attention = _yarn_scale(factor, scale) / _yarn_scale(factor, scale_all) if scale and scale_all else _yarn_scale(factor, 1.0)
    return {
        "factor": factor,
        "original": original,
        "attention_factor": float(attention),
        "beta_fast": float(entry.get("beta_fast") or 32.0),
        "beta_slow": float(entry.get("beta_slow") or 1.0),
        "truncate": float(entry.get("truncate", True)),
    }


def _yarn_scale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _yarn(inverse: torch.Tensor, theta: float, size: int, options: Mapping[str, float]) -> torch.Tensor:
    """Dimensions that turn less than ``beta_slow`` times over the original length are interpolated, those above ``beta_fast`` kept."""

    def dimension(turns: float) -> float:
        return size * math.log(options["original"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(options["beta_fast"]), dimension(options["beta_slow"])
    if options["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return inverse / options["factor"] * ramp + inverse * (1 - ramp)
