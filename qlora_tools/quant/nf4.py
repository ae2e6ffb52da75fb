"""NF4 with or without double quantization, in bitsandbytes' bytes.

Format (QLoRA, Dettmers et al. 2023; bitsandbytes 0.50). The tensor is flattened and cut into blocks of 64 values, whatever the rows.
``absmax`` is each block's largest magnitude; a value is stored as the index of the nearest of 16 levels to ``value / absmax``; two
indices share a byte, the even element in the high nibble. Double quantization stores ``absmax - mean(absmax)`` in 8 bits of a
dynamic map, in blocks of 256 with an fp32 scale each: 4.127 bits per weight instead of 4.5.

On the CPU the bytes are those of bitsandbytes' CPU library, on a GPU its own kernels run. Two consequences are kept on purpose:

* 8-bit codes go through a table over 65536 bins, so a code may differ by one step from the nearest one (and from a GPU's).
* A last block that is not full is divided by its absmax, full ones are multiplied by the reciprocal.

The mean is torch's, and its last bit depends on torch's thread count once there are more than 32768 blocks; with one thread per
tensor, as the engine runs, the bytes are a function of the input alone. On the CPU decoding is our own: bitsandbytes' AVX-512 kernel picks
wrong scales where blocks straddle rows. Left out: FP4, and levels other than NF4's, which no bitsandbytes kernel would honour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import ClassVar

import torch

from qlora_tools.errors import CorruptError, UnsupportedError, UsageError
from qlora_tools.finite import refuse_non_finite
from qlora_tools.quant.floats import TILE_ELEMENTS, bit_patterns, in_threads
from qlora_tools.quant.kernels import NF4_LEVELS, NF4_MIDPOINTS, TINY, dequantize_nf4, quantize_nf4
from qlora_tools.quant.quant_state import BLOCKSIZES, NESTED_BLOCKSIZE, QuantState, read_state, stored_length, write_state
from qlora_tools.quant.search import assign_codes, check_form, largest_magnitudes, search_scales
from qlora_tools.specs import TensorSpec

ZERO_CODE = 7  # of the level 0.0
STATE_SUFFIX = ".quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Scales:
    """The scales of a tensor's blocks as they are stored: ``parts`` by suffix (``absmax``, ``nested_absmax``, ...) and what the JSON says."""

    state: QuantState
    parts: Mapping[str, torch.Tensor]

    @cached_property
    def decoded(self) -> torch.Tensor:
        """fp32 [blocks]: what a reader multiplies the levels with."""
        if self.state.offset is None:
            return self.parts["absmax"]
        return restore_absmax(self.parts["absmax"], self.parts["nested_absmax"], self.parts["nested_quant_map"], self.state, 0, self.state.blocks)


@dataclass(frozen=True)
class NF4:
    """The codec. ``block_size`` values share a scale; ``threads`` may work on one tensor (the engine already spreads tensors).

    ``search`` chooses scales for the least squared error, in the form ``positive`` or ``signed`` (see ``search``); ``None`` is bitsandbytes' own choice.
    """

    block_size: int = 64
    double_quant: bool = True
    search: str | None = None
    threads: int = field(default=1, compare=False)
    name: ClassVar[str] = "nf4"

    def __post_init__(self) -> None:
        if self.block_size not in BLOCKSIZES:
            raise UsageError(f"NF4 block size {self.block_size} is not one of {', '.join(map(str, BLOCKSIZES))}", hint="64 is what QLoRA uses")
        check_form(self.search)

    def _state(self, spec: TensorSpec, offset: float = 0.0) -> QuantState:
        if not spec.numel or not spec.shape:
            raise UnsupportedError(f"{spec}: NF4 needs at least one axis and one value")
        return QuantState(self.block_size, spec.dtype, spec.shape, offset if self.double_quant else None)

    def part_specs(self, spec: TensorSpec) -> tuple[TensorSpec, ...]:
        """The stored tensors of ``spec``, all known before the data."""
        state = self._state(spec)
        parts = [
            TensorSpec(spec.name, "U8", (state.packed_bytes, 1)),
            TensorSpec(f"{spec.name}.absmax", "U8" if self.double_quant else "F32", (state.blocks,)),
            TensorSpec(f"{spec.name}.quant_map", "F32", (len(NF4_LEVELS),)),
        ]
        if self.double_quant:
            parts += [TensorSpec(f"{spec.name}.nested_absmax", "F32", (state.nested_blocks,)), TensorSpec(f"{spec.name}.nested_quant_map", "F32", (256,))]
        return (*parts, TensorSpec(f"{spec.name}{STATE_SUFFIX}", "U8", (stored_length(state),)))

    def encode(self, spec: TensorSpec, dense: torch.Tensor, diag_I: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Quantize ``dense`` (shape of ``spec``; bf16, fp16 or fp32, also wider than ``spec``'s dtype, which is what the parts record).

        ``diag_I`` weights the error of each input (last axis) in a search; without one it has no meaning.

        Raises:
            NonFiniteError: NaN or infinity in ``dense``.
        """
        assert tuple(dense.shape) == spec.shape, f"{spec} was given {list(dense.shape)}"
        self._state(spec)  # refuses what has no NF4 form
        if self.search is not None:
            scales = self.fit(spec, dense, diag_I)
            packed = assign_codes(dense, scales.decoded, self.block_size, self.search, self.threads)
            return _with_scales(spec, packed.cpu(), scales)
        if dense.is_cuda:
            return self._encode_cuda(spec, dense)
        packed, absmax = quantize_blocks(dense, self.block_size, self.threads)
        if not bool(torch.isfinite(absmax).all()):
            refuse_non_finite(spec.name, dense)
        return _with_scales(spec, packed, self.scales(spec, absmax))

    def scales(self, spec: TensorSpec, absmax_B: torch.Tensor) -> Scales:
        """The fp32 [blocks] ``absmax_B``, of either sign, as this codec stores them: double quantization done."""
        level_map = torch.from_numpy(NF4_LEVELS.copy())
        absmax_B = absmax_B.cpu()  # few values, and tables that live there
        if not self.double_quant:
            return Scales(self._state(spec), {"absmax": absmax_B, "quant_map": level_map})
        mean = absmax_B.mean()
        codes, nested = quantize_dynamic(absmax_B - mean)
        parts = {"absmax": codes, "quant_map": level_map, "nested_absmax": nested, "nested_quant_map": dynamic_map().clone()}
        return Scales(self._state(spec, float(mean)), parts)

    def fit(self, spec: TensorSpec, dense: torch.Tensor, diag_I: torch.Tensor | None = None) -> Scales:
        """The scales that :meth:`encode` would give ``dense``, searched if so asked, for codes that are chosen elsewhere.

        Raises:
            NonFiniteError: NaN or infinity in ``dense``.
        """
        if self.search is None:
            found = largest_magnitudes(dense, self.block_size)
        else:
            found = search_scales(dense, self.block_size, self.search, diag_I, self.threads)
        if not bool(torch.isfinite(found).all()):
            refuse_non_finite(spec.name, dense)
        return self.scales(spec, found)

    def pack(self, spec: TensorSpec, codes: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
        """The stored tensors of codes 0..15 (uint8, shape of ``spec``) chosen elsewhere, under ``scales``."""
        assert tuple(codes.shape) == spec.shape and codes.dtype == torch.uint8, f"{spec} was given {codes.dtype} {list(codes.shape)}"
        return _with_scales(spec, pack_codes(codes.reshape(-1).cpu()), scales)

    def _encode_cuda(self, spec: TensorSpec, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        from bitsandbytes.functional import quantize_4bit  # slow to import, and needed on a GPU only

        if not bool(torch.isfinite(dense).all()):
            refuse_non_finite(spec.name, dense)
        packed, state = quantize_4bit(dense.contiguous(), blocksize=self.block_size, compress_statistics=self.double_quant, quant_type="nf4")
        parts = {spec.name: packed, f"{spec.name}.absmax": state.absmax, f"{spec.name}.quant_map": state.code}
        if self.double_quant:
            parts |= {f"{spec.name}.nested_absmax": state.state2.absmax, f"{spec.name}.nested_quant_map": state.state2.code}
        blob = write_state(self._state(spec, float(state.offset) if self.double_quant else 0.0))
        return parts | {f"{spec.name}{STATE_SUFFIX}": blob}

    def decode(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor], rows: tuple[int, int] | None = None) -> torch.Tensor:
        """The dense rows ``rows`` (half-open, along axis 0; ``None``: all) in ``spec``'s dtype: level * absmax in fp32, rounded once.

        Only the blocks that touch ``rows`` are decoded. The block size is the one stored in ``parts``.

        Raises:
            CorruptError: the parts do not fit each other.
        """
        state = read_state(spec.name, parts[f"{spec.name}{STATE_SUFFIX}"])
        packed, absmax, nested = _fitting_parts(spec, state, parts)
        low, high = rows if rows is not None else (0, spec.shape[0])
        assert 0 <= low <= high <= spec.shape[0], f"rows {rows} of {spec}"
        row = spec.numel // spec.shape[0]
        start, stop = low * row, high * row
        out = torch.empty((high - low, *spec.shape[1:]), dtype=spec.torch_dtype, device=packed.device)
        if start == stop:
            return out
        first, last = start // state.blocksize, -(-stop // state.blocksize)
        scales = absmax[first:last].float()
        if nested is not None:
            scales = restore_absmax(absmax, nested, parts[f"{spec.name}.nested_quant_map"], state, first, last)
        if packed.is_cuda:
            out.copy_(_dequantize_cuda(packed, scales, state.blocksize, start, stop, out.dtype).view_as(out))
        else:
            dequantize_blocks(packed, scales, state.blocksize, start, stop, out.view(-1), self.threads)
        return out

    def blocks(self, spec: TensorSpec, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(packed bytes uint8[ceil(n / 2)] as they are stored, fp32 scales [blocks] they are read with): for formats that keep the codes.

        Raises:
            CorruptError: the parts do not fit each other.
        """
        state = read_state(spec.name, parts[f"{spec.name}{STATE_SUFFIX}"])
        packed, absmax, nested = _fitting_parts(spec, state, parts)
        if nested is None:
            return packed, absmax.float()
        return packed, restore_absmax(absmax, nested, parts[f"{spec.name}.nested_quant_map"], state, 0, state.blocks)

    def describe(self, compute_dtype: str = "bfloat16") -> dict[str, object]:
        """``quantization_config`` of config.json, so that transformers loads the parts. It has no key for a block size; the parts carry it."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
        }


def _with_scales(spec: TensorSpec, packed: torch.Tensor, scales: Scales) -> dict[str, torch.Tensor]:
    stored = {f"{spec.name}.{suffix}": tensor for suffix, tensor in scales.parts.items()}
    return {spec.name: packed.unsqueeze(1)} | stored | {f"{spec.name}{STATE_SUFFIX}": write_state(scales.state)}


def _fitting_parts(spec: TensorSpec, state: QuantState, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(packed bytes flat, absmax, nested absmax or None), sizes checked: the kernels index without looking."""
    packed = parts[spec.name].contiguous().view(-1).view(torch.uint8)
    absmax = parts[f"{spec.name}.absmax"].contiguous().view(-1)
    nested = parts[f"{spec.name}.nested_absmax"].contiguous().view(-1) if state.offset is not None else None
    level_map = parts.get(f"{spec.name}.quant_map")
    found = (state.shape, packed.numel(), absmax.numel(), 0 if nested is None else nested.numel(), absmax.dtype == torch.uint8)
    expected = (spec.shape, state.packed_bytes, state.blocks, 0 if nested is None else state.nested_blocks, nested is not None)
    if found != expected:
        raise CorruptError(f"{spec.name}: shape, packed bytes, absmax, nested absmax, 8-bit absmax are {found}, the quant_state asks for {expected}")
    if level_map is not None and not torch.allclose(level_map.float().cpu(), torch.from_numpy(NF4_LEVELS), atol=1e-3):
        raise UnsupportedError(
            f"{spec.name}: its quant_map does not hold NF4's levels", hint="bitsandbytes itself would ignore this map and decode wrong values"
        )
    return packed, absmax, nested


# --- 4-bit codes -------------------------------------------------------------------------------------------------------------


def quantize_blocks(dense: torch.Tensor, blocksize: int, threads: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed uint8[ceil(n/2)], absmax fp32[ceil(n/blocksize)]) of a CPU tensor; absmax is not finite where the input is not."""
    bits, kind = bit_patterns(dense)
    bits = bits.reshape(-1)
    full = len(bits) // blocksize
    packed = torch.empty((len(bits) + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-len(bits) // blocksize), dtype=torch.float32)
    into = (packed.numpy(), absmax.numpy())
    in_threads(lambda low, high: quantize_nf4(bits, kind, blocksize, *into, low, high), full, 1024, threads)
    done = full * blocksize
    if done < len(bits):
        packed[done // 2 :], absmax[full:] = quantize_blocks_plain(dense.contiguous().view(-1)[done:], blocksize)
    return packed, absmax


def quantize_blocks_plain(values_N: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch, of a flat tensor: what tests hold the kernel to, and what codes the last block when it is not full."""
    values = values_N.float()
    done = len(values) // blocksize * blocksize
    blocks, rest = values[:done].view(-1, blocksize), values[done:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=float(TINY))).unsqueeze(1)).view(-1)
    if len(rest):
        last = rest.abs().max().clamp(min=float(TINY))
        absmax, scaled = torch.cat([absmax, last.view(1)]), torch.cat([scaled, rest / last])
    return pack_codes(torch.bucketize(scaled, torch.from_numpy(NF4_MIDPOINTS), out_int32=True).to(torch.uint8)), absmax


def pack_codes(codes_N: torch.Tensor) -> torch.Tensor:
    """uint8[ceil(n/2)] of flat codes 0..15: the even element in the high nibble."""
    if len(codes_N) % 2:
        codes_N = torch.cat([codes_N, codes_N.new_tensor([ZERO_CODE])])
    return (codes_N[::2] << 4) | codes_N[1::2]


def dequantize_blocks(packed: torch.Tensor, absmax_B: torch.Tensor, blocksize: int, start: int, stop: int, out: torch.Tensor, threads: int = 1) -> None:
    """Decode flat elements ``start:stop`` of a CPU tensor into ``out`` [stop - start]; ``absmax_B`` begins at the block of ``start``."""
    target, kind = bit_patterns(out)
    source, scales = packed.numpy(), absmax_B.numpy()
    base = start // blocksize

    def decode(low: int, high: int) -> None:
        a, b = max(low, start), min(high, stop)
        dequantize_nf4(source, scales[a // blocksize - base :], blocksize, kind, a, b, target[a - start : b - start])

    in_threads(decode, stop, TILE_ELEMENTS, threads, start)


def _dequantize_cuda(packed: torch.Tensor, absmax_B: torch.Tensor, blocksize: int, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """The same by bitsandbytes' kernel, which takes whole blocks: decodes those that touch ``start:stop`` and cuts."""
    from bitsandbytes.functional import QuantState as Statistics
    from bitsandbytes.functional import dequantize_4bit

    begin = start // blocksize * blocksize
    end = min(-(-stop // blocksize) * blocksize, 2 * len(packed))
    statistics = Statistics(absmax_B, torch.Size((end - begin,)), blocksize=blocksize, quant_type="nf4", dtype=dtype)
    whole: torch.Tensor = dequantize_4bit(packed[begin // 2 : end // 2].unsqueeze(1), statistics)
    return whole.view(-1)[start - begin : stop - begin]


def dequantize_blocks_plain(packed: torch.Tensor, absmax_B: torch.Tensor, blocksize: int, start: int, stop: int) -> torch.Tensor:
    """The same in plain torch, fp32, not yet rounded: what tests hold the kernel to."""
    pairs = packed[start // 2 : (stop + 1) // 2]
    codes = torch.stack([pairs >> 4, pairs & 15], 1).view(-1)[start % 2 : start % 2 + stop - start]
    block = torch.arange(start, stop, device=packed.device) // blocksize - start // blocksize
    return torch.from_numpy(NF4_LEVELS).to(packed.device)[codes.long()] * absmax_B[block]


# --- 8-bit scales ------------------------------------------------------------------------------------------------------------


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 values of the signed 8-bit dynamic map (Dettmers, 8-bit approximations for parallelism, 2015), ascending, fp32.

    Seven decades up to 1; the k-th from below holds 2**k values of each sign, the middles of equal parts of 0.1..1; then 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0 * 10 ** (decade - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _dynamic_bins() -> torch.Tensor:
    """uint8[65536]: the nearest map entry of each point of a regular grid over -1..1, which is how bitsandbytes' CPU library rounds."""
    levels = dynamic_map()
    points = -1 + (2 * torch.arange(65536, dtype=torch.float32)) / 65535
    return torch.bucketize(points, 0.5 * (levels[:-1] + levels[1:])).to(torch.uint8)


def quantize_dynamic(values_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8[n], absmax fp32[ceil(n/256)]) of fp32 values in the dynamic map, in blocks of 256."""
    count = len(values_B)
    blocks = torch.nn.functional.pad(values_B, (0, -count % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax = blocks.abs().amax(1)
    unit = (blocks * (1 / absmax).unsqueeze(1)).clamp(-1, 1).nan_to_num(0.0)  # 0 * (1 / 0) in a block of zeros
    bins = ((unit + 1) * 0.5 * 65535 + 0.5).to(torch.int32)
    codes = torch.where((absmax > 0).unsqueeze(1), _dynamic_bins()[bins], 0)
    return codes.view(-1)[:count].contiguous(), absmax


def restore_absmax(codes: torch.Tensor, nested: torch.Tensor, level_map: torch.Tensor, state: QuantState, first: int, last: int) -> torch.Tensor:
    """absmax fp32 of the blocks ``first:last``: map[code] * nested + offset."""
    if level_map.numel() != 256 or state.offset is None:
        raise CorruptError(f"nested_quant_map holds {level_map.numel()} values, expected 256")
    block = torch.arange(first, last, device=codes.device) // state.nested_blocksize
    return level_map.float()[codes[first:last].long()] * nested.float()[block] + torch.tensor(state.offset, dtype=torch.float32, device=codes.device)
