"""Rotary position embeddings: which rotation each position gets, from the config's rope entries.

Frequencies follow the definitions that checkpoints are trained with (RoFormer, arXiv 2104.09864; linear
interpolation, arXiv 2306.15595; the Llama 3.1 release's wavelength-dependent scaling; YaRN, arXiv
2309.00071). Types whose frequencies depend on the length of the input (``dynamic``, ``longrope``) need
another graph and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.errors import IncompatibleError, UnsupportedError


@dataclass(frozen=True)
class Rope:
    """``kind`` is ``default``, ``linear``, ``llama3`` or ``yarn``; ``size`` is the even number of rotated dimensions per head."""

    kind: str
    theta: float
    size: int
    options: Mapping[str, float] = field(default_factory=dict)

    def frequencies(self) -> torch.Tensor:
        """Radians per position, fp32 [size / 2]."""
        exponents = torch.arange(0, self.size, 2, dtype=torch.int64).to(torch.float32) / self.size
        inverse = 1.0 / self.theta**exponents
        if self.kind == "linear":
            return inverse / self.options["factor"]
        if self.kind == "llama3":
            return _llama3(inverse, self.options)
        if self.kind == "yarn":
            return _yarn(inverse, self.theta, self.size, self.options)
        return inverse

    def caches(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of positions ``[start, stop)``, each fp32 [positions, size / 2]."""
        angles = torch.arange(start, stop, dtype=torch.float32)[:, None] * self.frequencies()[None, :]
        scale = self.options.get("attention_factor", 1.0)
        return angles.cos() * scale, angles.sin() * scale


def rope_of(values: Mapping[str, Any], head_size: int, max_positions: int) -> Rope:
    """The rotation a config asks for, in the current layout (``rope_parameters``) or the older (``rope_theta``, ``rope_scaling``).

    Raises:
        UnsupportedError: a rope type not listed above, or rotation of only a part of each head.
        IncompatibleError: an entry that the type needs is missing, or the head size is odd.
    """
    entry = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kind = str(entry.get("rope_type") or entry.get("type") or "default")
    if any(isinstance(value, Mapping) for value in entry.values()):
        raise UnsupportedError("rope parameters that differ between layers have no graph here")
    if float(entry.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedError("partial_rotary_factor other than 1 has no graph here")
    if head_size % 2:
        raise IncompatibleError(f"head size {head_size} is odd and cannot be rotated in pairs")
    theta = float(entry.get("rope_theta") or values.get("rope_theta") or 10_000.0)
    original = entry.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or max_positions
    if kind == "default":
        return Rope(kind, theta, head_size)
    if kind == "linear":
        return Rope(kind, theta, head_size, {"factor": _number(entry, "factor")})
    if kind == "llama3":
        return Rope(
            kind, theta, head_size, {key: _number(entry, key) for key in ("factor", "low_freq_factor", "high_freq_factor")} | {"original": float(original)}
        )
    if kind == "yarn":
        return Rope(kind, theta, head_size, _yarn_options(entry, float(original), max_positions))
    raise UnsupportedError(f"rope type `{kind}` has no graph here", hint="supported: default, linear, llama3, yarn")


def _number(entry: Mapping[str, Any], key: str) -> float:
    value = entry.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise IncompatibleError(f"config.json: rope entry `{key}` is {value!r}, expected a positive number")
    return float(value)


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
