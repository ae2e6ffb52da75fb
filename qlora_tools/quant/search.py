"""NF4 scales chosen by search instead of by each block's largest magnitude. Same bytes, read by every stock reader; a seventh less squared error.

Axes: B blocks of S flat values, N values, I inputs of the layer (columns of its weight).

The largest magnitude spends the outermost levels on one value. Here several scales around it are tried, each judged by the squared error that its
codes leave under their least-squares scale; then code choice and least squares alternate. Two forms:

``positive``  every block keeps a value on an outermost level, so quantizing the decoded values anew finds the same codes: they may travel as an
              ordinary bf16, fp16 or fp32 checkpoint into any loader that quantizes to NF4 itself.
``signed``    scales may be negative. NF4 has eight levels above zero and seven below, and a negative scale turns that round where it fits better.
              For files that are stored quantized; on Gaussian weights the squared error falls by 18 % instead of 14 %.

Codes are chosen again after double quantization, under the scales that a reader will see. ``diag_I`` weights each input's error, by its mean square
over calibration text as a rule. On the CPU numba kernels do the work; the plain torch twins here are what tests hold them to, and run on GPUs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from qlora_tools.errors import UsageError
from qlora_tools.quant.floats import bit_patterns, in_threads, tiles
from qlora_tools.quant.kernels import NF4_LEVELS, NF4_MIDPOINTS, TINY
from qlora_tools.quant.kernels_search import CLEARLY_MORE, SMALLEST_INVERSE, assign_nf4, search_nf4

POSITIVE, SIGNED = "positive", "signed"
FORMS = (POSITIVE, SIGNED)
_TRIED = np.linspace(0.64, 1.12, 10)  # scales, in units of the largest magnitude; a grid three times as fine gains 0.1 % more
_REFITS = 3
_STEP_BLOCKS = 1024
_TILE_BLOCKS = 1 << 14


def check_form(form: str | None) -> None:
    """Raises UsageError where ``form`` is not one of ``FORMS`` or ``None``."""
    if form is not None and form not in FORMS:
        raise UsageError(f"no scale search `{form}`", hint=f"choose {' or '.join(FORMS)}")


@cache
def _inverses(form: str) -> tuple[np.ndarray, np.float32]:
    """(reciprocal scales to try, the smallest that may come of refitting), both times the block's largest magnitude."""
    upright = (1 / _TRIED).astype(np.float32)
    if form == POSITIVE:
        return upright, SMALLEST_INVERSE
    return np.concatenate([upright, -upright]), np.float32(-np.inf)


def _weights(dense: torch.Tensor, diag_I: torch.Tensor | None) -> torch.Tensor:
    """fp32 [I] of mean 1, or [0] for "all alike"."""
    if diag_I is None:
        return torch.zeros(0)
    assert diag_I.numel() == dense.shape[-1] and dense.dim() > 1, f"{diag_I.numel()} input weights for {list(dense.shape)}"
    weights = diag_I.detach().float().reshape(-1)
    return weights / weights.mean().clamp(min=float(TINY))


# --- scales ------------------------------------------------------------------------------------------------------------------


def search_scales(dense: torch.Tensor, block_size: int, form: str, diag_I: torch.Tensor | None = None, threads: int = 1) -> torch.Tensor:
    """fp32 [B]: the scale of each block of ``dense``, on its device; not finite where a block holds NaN or infinity, 0 for a block of zeros."""
    if dense.is_cuda:
        return search_scales_plain(dense, block_size, form, diag_I)
    bits, kind = bit_patterns(dense)
    bits = bits.reshape(-1)
    diag = _weights(dense, diag_I).cpu().contiguous().numpy()
    scales = torch.empty(-(-len(bits) // block_size))
    inverses, smallest = _inverses(form)
    into = scales.numpy()
    in_threads(lambda a, b: search_nf4(bits, kind, block_size, diag, inverses, _REFITS, smallest, into, a, b), len(scales), _STEP_BLOCKS, threads)
    return scales


def search_scales_plain(dense: torch.Tensor, block_size: int, form: str, diag_I: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain torch, on any device; sums are added in another order, so where two scales are as good the other may be taken."""
    flat = dense.detach().reshape(-1)
    diag = _weights(dense, diag_I).to(flat.device)
    inverses, smallest = _inverses(form)
    found = []
    for start, stop in tiles(0, len(flat), _TILE_BLOCKS * block_size):
        values = _blocks(flat[start:stop].float(), block_size)
        weights = _blocks(diag[torch.arange(start, stop, device=flat.device) % len(diag)], block_size) if len(diag) else torch.ones_like(values)
        largest = values.abs().amax(1, keepdim=True)
        sound = (largest >= float(TINY)) & torch.isfinite(largest)
        units = torch.where(sound, values * (1 / largest), 0)
        scale, most = torch.ones_like(largest), torch.full_like(largest, -1.0)
        for attempt in range(len(inverses) + _REFITS):
            inverse = torch.full_like(scale, float(inverses[attempt])) if attempt < len(inverses) else 1 / scale
            levels = _nearest_levels(units * inverse)
            dot, square = (weights * units * levels).sum(1, keepdim=True), (weights * levels * levels).sum(1, keepdim=True)
            explained = dot * (dot / square)
            better = (square > 0) & (explained > most * float(CLEARLY_MORE)) & (inverse >= float(smallest))
            most, scale = torch.where(better, explained, most), torch.where(better, dot / square, scale)
        scale = torch.where(sound, scale * largest, torch.where(largest < float(TINY), 0.0, torch.inf))
        found.append(scale.view(-1))
    return torch.cat(found)


def largest_magnitudes(dense: torch.Tensor, block_size: int) -> torch.Tensor:
    """fp32 [B] on the device of ``dense``: the plain scales, not finite where a block holds NaN or infinity."""
    return _blocks(dense.detach().reshape(-1).float(), block_size).abs().amax(1)


# --- codes -------------------------------------------------------------------------------------------------------------------


def assign_codes(dense: torch.Tensor, scales_B: torch.Tensor, block_size: int, form: str, threads: int = 1) -> torch.Tensor:
    """uint8 [ceil(N/2)]: packed codes of ``dense`` nearest under ``scales_B``, the fp32 a reader will see. ``positive`` keeps an end in every block."""
    if dense.is_cuda:
        return assign_codes_plain(dense, scales_B, block_size, form)
    bits, kind = bit_patterns(dense)
    bits = bits.reshape(-1)
    packed = torch.empty((len(bits) + 1) // 2, dtype=torch.uint8)
    scales, into = scales_B.cpu().contiguous().numpy(), packed.numpy()
    keep_end = form == POSITIVE
    in_threads(lambda low, high: assign_nf4(bits, kind, block_size, scales, keep_end, into, low, high), len(scales), _STEP_BLOCKS, threads)
    return packed


def assign_codes_plain(dense: torch.Tensor, scales_B: torch.Tensor, block_size: int, form: str) -> torch.Tensor:
    """The same in plain torch, bit for bit, on any device."""
    flat = dense.detach().reshape(-1)
    bounds = torch.from_numpy(NF4_MIDPOINTS).to(flat.device)
    scales = scales_B.to(flat.device).view(-1, 1)
    usable = (scales.abs() >= float(TINY)) & ((scales > 0) | (form != POSITIVE))
    found = []
    for start, stop in tiles(0, len(flat), _TILE_BLOCKS * block_size):
        values = _blocks(flat[start:stop].float(), block_size)
        rows = slice(start // block_size, start // block_size + len(values))
        unit = values * torch.where(usable[rows], 1 / scales[rows], 0)
        codes = torch.bucketize(unit, bounds, out_int32=True).to(torch.uint8)
        if form == POSITIVE:
            _keep_end(codes, values, unit)
        found.append(codes.view(-1))
    codes = torch.cat(found)[: len(flat) + len(flat) % 2]
    return (codes[::2] << 4) | codes[1::2]


def _keep_end(codes_BS: torch.Tensor, values_BS: torch.Tensor, unit_BS: torch.Tensor) -> None:
    """In place: every block gets a code 0 or 15 at its extreme value, or zeros only (see ``kernels_search.assign_nf4``)."""
    inner = ((codes_BS > 0) & (codes_BS < 15)).all(1)
    at = values_BS.abs().argmax(1, keepdim=True)
    reached = unit_BS.gather(1, at)
    ended = codes_BS.scatter(1, at, torch.where(reached > 0, 15, 0).to(torch.uint8))
    codes_BS.copy_(torch.where(inner.unsqueeze(1), torch.where(reached.abs() < 0.5, 7, ended).to(torch.uint8), codes_BS))


def _blocks(flat_N: torch.Tensor, block_size: int) -> torch.Tensor:
    """[B, S], the last block filled with zeros."""
    return torch.nn.functional.pad(flat_N, (0, -len(flat_N) % block_size)).view(-1, block_size)


def _nearest_levels(unit: torch.Tensor) -> torch.Tensor:
    codes = torch.bucketize(unit, torch.from_numpy(NF4_MIDPOINTS).to(unit.device), out_int32=True)
    return torch.from_numpy(NF4_LEVELS).to(unit.device)[codes]
