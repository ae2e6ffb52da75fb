"""A codec turns one dense tensor into stored parts and back; ``detect`` finds, among stored tensors, the parts somebody else made.

Both are pure: specs and tensors in, specs and tensors out. Detection needs the bytes of a few small parts (a JSON of ~160 bytes per 4-bit
tensor), which it asks of ``read_small``; everything else it learns from names, dtypes and shapes. Stored names are bitsandbytes' own.

To add a format: a frozen dataclass with the five members of :class:`Codec`, and a rule in :func:`detect` if checkpoints of it exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qlora_tools.errors import CorruptError, UnsupportedError
from qlora_tools.names import shortened, split_tensor
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4, STATE_SUFFIX
from qlora_tools.quant.quant_state import MAX_STATE_BYTES, QuantState, read_state
from qlora_tools.specs import TensorSpec

#: Weights smaller than this stay dense, whatever their role: quantizing them saves nothing.
MIN_ELEMENTS = 1024


class Codec(Protocol):
    """One storage format. ``encode`` and ``decode`` leave their inputs untouched; any thread may call them."""

    @property
    def name(self) -> str:
        """``"nf4"``, ``"int8"``."""

    def part_specs(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The stored tensors, full names and shapes, known from the dense spec alone."""

    def encode(self, spec: TensorSpec, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """Exactly the tensors of ``part_specs``. ``dense`` may be wider than ``spec``'s dtype."""

    def decode(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Rows ``rows`` (half-open, along axis 0; ``None``: all) in ``spec``'s dtype: fp32 arithmetic, rounded once."""

    def describe(self) -> dict[str, Any]:
        """``quantization_config`` of config.json for a model stored so."""


@dataclass(frozen=True)
class Stored:
    """How one dense tensor lies in a checkpoint: ``spec`` is what it decodes to, ``parts`` the stored names to hand to ``codec.decode``."""

    codec: Codec
    spec: TensorSpec
    parts: tuple[str, ...]


_NF4_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATE = ".quant_state.bitsandbytes__"
_ONLY = "only bitsandbytes nf4 and int8 are read; dequantize the model with the library that made it first"
_AGAIN = "a shard may be missing; download the checkpoint again"
_FOREIGN = {  # endings of stored names that give away a format this version does not decode
    "qweight": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "block fp8",
    "weight_scale": "fp8 or another scaled format",
    "_scales": "MXFP4",
}


def detect(stored: Mapping[str, TensorSpec], read_small: Callable[[str], torch.Tensor], *, default_dtype: str = "BF16", where: str = "") -> dict[str, Stored]:
    """Dense name -> how it is stored, for every tensor that is not simply dense.

    ``stored`` are a checkpoint's tensors; ``read_small(name)`` returns one of them whole and is called for parts of at most 4 KiB;
    ``default_dtype`` is the dtype int8 weights decode to, which only the model's config knows; ``where`` begins error messages.

    Raises:
        CorruptError: a part is missing, or sizes contradict each other.
        UnsupportedError: another quantized format (FP4, GPTQ, AWQ, fp8, ...).
    """
    try:
        return _detect(stored, read_small, default_dtype)
    except (CorruptError, UnsupportedError) as error:
        if not where:
            raise
        raise type(error)(f"{where}: {error}", hint=error.hint) from None


def _detect(stored: Mapping[str, TensorSpec], read_small: Callable[[str], torch.Tensor], default_dtype: str) -> dict[str, Stored]:
    found = {}
    for name in stored:
        base, marker, kind = name.partition(_STATE)
        if marker:
            if kind != "nf4":
                raise UnsupportedError(f"{base}: bitsandbytes {kind[:20]} is not supported", hint=_ONLY)
            found[base] = _nf4(base, stored, read_small)
        elif split_tensor(name)[1] == "SCB":
            entry = _int8(name, stored, read_small, default_dtype)
            found[entry.spec.name] = entry
    _refuse_foreign(stored, found)
    return found


def _nf4(base: str, stored: Mapping[str, TensorSpec], read_small: Callable[[str], torch.Tensor]) -> Stored:
    blob = stored[base + STATE_SUFFIX]
    if blob.dtype != "U8" or blob.nbytes > MAX_STATE_BYTES:  # before any byte of it is read
        raise CorruptError(f"{blob}: a quant_state is uint8 of at most {MAX_STATE_BYTES} bytes")
    state = read_state(base, read_small(blob.name))
    names = [base, base + ".absmax", base + ".quant_map", *((base + part for part in _NF4_PARTS[2:]) if state.offset is not None else ())]
    _require(base, names, stored)
    _check_sizes(base, state, stored)
    codec = NF4(state.blocksize, state.offset is not None)
    return Stored(codec, TensorSpec(base, state.dtype, state.shape), (*names, blob.name))


def _check_sizes(base: str, state: QuantState, stored: Mapping[str, TensorSpec]) -> None:
    """Sizes against the quant_state. The packed bytes may lie under another dtype's name (``bnb_4bit_quant_storage``)."""
    absmax = stored[base + ".absmax"]
    nested = state.offset is not None
    expected = {
        "packed bytes": (stored[base].nbytes, state.packed_bytes),
        "absmax": (absmax.numel, state.blocks),
        "quant_map": (stored[base + ".quant_map"].numel, 16),
        "nested_absmax": (stored[base + ".nested_absmax"].numel, state.nested_blocks) if nested else (0, 0),
        "nested_quant_map": (stored[base + ".nested_quant_map"].numel, 256) if nested else (0, 0),
    }
    wrong = [f"{part} {found} (expected {wanted})" for part, (found, wanted) in expected.items() if found != wanted]
    if (absmax.dtype == "U8") is not nested:
        wrong.append(f"absmax {absmax.dtype} {'with' if nested else 'without'} double quantization")
    if wrong:
        raise CorruptError(f"{base}: the quant_state says {list(state.shape)} in blocks of {state.blocksize}, but stored are {', '.join(wrong)}")


def _int8(name: str, stored: Mapping[str, TensorSpec], read_small: Callable[[str], torch.Tensor], dtype: str) -> Stored:
    module = split_tensor(name)[0]
    weight, layout = f"{module}.weight", f"{module}.weight_format"
    _require(weight, [weight], stored)
    codes, scales = stored[weight], stored[name]
    if codes.dtype != "I8" or len(codes.shape) != 2 or scales.shape != codes.shape[:1] or scales.dtype not in ("F32", "F16", "BF16"):
        raise CorruptError(f"{codes} with {scales}: LLM.int8() stores an int8 matrix and one float per row")
    if layout in stored:
        if stored[layout].dtype != "U8" or stored[layout].numel != 1:
            raise CorruptError(f"{stored[layout]}: expected one uint8")
        if number := int(read_small(layout)):
            raise UnsupportedError(f"{weight}: int8 layout number {number}, only 0 (rows) is read", hint="save the model again with bitsandbytes 0.45 or newer")
    return Stored(Int8(), TensorSpec(weight, dtype, codes.shape), tuple(part for part in (weight, name, layout) if part in stored))


def _require(base: str, names: list[str], stored: Mapping[str, TensorSpec]) -> None:
    if missing := [name for name in names if name not in stored]:
        raise CorruptError(f"{base}: quantized, but without {shortened(missing)}", hint=_AGAIN)


def _refuse_foreign(stored: Mapping[str, TensorSpec], found: Mapping[str, Stored]) -> None:
    known = {part for entry in found.values() for part in entry.parts}
    for name, spec in stored.items():
        if name in known:
            continue
        if kind := next((kind for ending, kind in _FOREIGN.items() if name.endswith(ending)), None):
            raise UnsupportedError(f"{name}: looks like {kind}, which is not supported", hint=_ONLY)
        if name.endswith(_NF4_PARTS[:1]) or (spec.dtype == "I8" and name.endswith(".weight")):
            raise CorruptError(f"{spec}: part of a bitsandbytes tensor whose other parts are missing", hint=_AGAIN)
