"""Weights stored with calibration: several ways to the same bytes, and the one whose outputs come out best.

Every candidate is a form of the codec that stock bitsandbytes reads. What they differ in is which scales and which codes it holds:

======================  ===============================================================================================
``plain``               the codec's own: bitsandbytes' bytes
``search``              NF4 only: scales searched under the inputs' mean squares, nearest codes
``gptq``                int8: plain scales, codes by error feedback, then coordinate descent (:mod:`qlora_tools.quant.gptq`)
``search+gptq``         NF4: searched scales, unweighted, codes as before
``search+gptq refit``   NF4: these scales fitted once more under the inputs' moments, and another descent
======================  ===============================================================================================

They are judged by the error of the layer's output under moments of *other* text than they were made from. Error feedback can be wrong (text of
another domain, too few tokens), and then ``plain`` stays: a layer is never stored worse than without calibration, as far as the judging text shows.

Left out: reading moments and files (:mod:`qlora_tools.stages.quantize`), and what the whole model loses (the verb measures).

Axes: O outputs, I inputs, B blocks of S columns in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from qlora_tools.errors import UnsupportedError
from qlora_tools.quant.codec import Codec
from qlora_tools.quant.gptq import Grid, TableGrid, descend, output_error, sweep
from qlora_tools.quant.grids import int8_grid, nf4_grid, signed
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.kernels import NF4_LEVELS, TINY
from qlora_tools.quant.nf4 import NF4, Scales
from qlora_tools.specs import TensorSpec

PLAIN = "plain"
#: The form of the scale search where none is asked for: results are stored quantized, so scales may be negative.
DEFAULT_SEARCH = "signed"
DAMP = 0.01
#: Rounds of coordinate descent after error feedback: the third gains a third of what the first does.
DESCENTS = 2
_TILE_ROWS = 512


@dataclass(frozen=True, eq=False)
class Choice:
    """The stored tensors ``parts`` of the candidate ``name``. ``errors``: every candidate's output error over the output's own power, judged text."""

    name: str
    parts: Mapping[str, torch.Tensor]
    errors: Mapping[str, float]


def encode_calibrated(codec: Codec, spec: TensorSpec, dense: torch.Tensor, moments_II: torch.Tensor, judge_II: torch.Tensor | None = None) -> Choice:
    """``dense`` [O, I, ...] stored by ``codec`` in the way that disturbs outputs least.

    ``moments_II``: second moments of the inputs that the candidates are made from, fp32; ``judge_II``: those they are judged by (``None``: the same).
    Axes of ``dense`` after the first are one: the inputs of a convolution's patch.

    Raises:
        UnsupportedError: no such candidates for ``codec``. NonFiniteError: NaN or infinity in the weight or the moments.
    """
    w_OI = dense.reshape(len(dense), -1)
    judge_II = moments_II if judge_II is None else judge_II
    power = output_error(w_OI, judge_II)
    decoded = replace(spec, dtype="F32")
    best: tuple[str, Mapping[str, torch.Tensor]] | None = None
    errors: dict[str, float] = {}
    for name, parts in _candidates(codec, spec, dense, moments_II):
        lost_OI = w_OI.float() - codec.decode(decoded, parts).reshape(w_OI.shape).to(w_OI.device)
        errors[name] = output_error(lost_OI, judge_II) / power if power > 0 else 0.0
        if best is None or errors[name] < errors[best[0]]:
            best = name, parts
    assert best is not None
    return Choice(best[0], best[1], errors)


def _candidates(codec: Codec, spec: TensorSpec, dense: torch.Tensor, moments_II: torch.Tensor) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """``plain`` first: equal errors go to the earlier."""
    if isinstance(codec, NF4):
        return _nf4_candidates(codec, spec, dense, moments_II)
    if isinstance(codec, Int8):
        return _int8_candidates(codec, spec, dense, moments_II)
    raise UnsupportedError(f"{codec.name}: calibration knows nf4 and int8", hint="leave --calib out")


# --- NF4 ---------------------------------------------------------------------------------------------------------------------


def _nf4_candidates(codec: NF4, spec: TensorSpec, dense: torch.Tensor, moments_II: torch.Tensor) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    plain, searching = replace(codec, search=None), replace(codec, search=codec.search or DEFAULT_SEARCH)
    w_OI = dense.reshape(len(dense), -1)
    yield PLAIN, plain.encode(spec, dense)
    yield "search", searching.encode(spec, dense, _input_weights(dense, moments_II))
    scales = searching.fit(spec, dense)
    codes_OI = _fed_back(w_OI, moments_II, _grid(scales, w_OI))
    yield "search+gptq", searching.pack(spec, codes_OI.view(spec.shape), scales)
    if w_OI.shape[1] % codec.block_size == 0:
        yield "search+gptq refit", _nf4_refitted(searching, spec, w_OI, moments_II, codes_OI, scales)


def _fed_back(w_OI: torch.Tensor, moments_II: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes by error feedback and descent."""
    return descend(w_OI, sweep(w_OI, moments_II, grid, damp=DAMP), moments_II, grid, sweeps=DESCENTS, damp=DAMP)


def _input_weights(dense: torch.Tensor, moments_II: torch.Tensor) -> torch.Tensor | None:
    """What the scale search weights errors with, one per last axis of ``dense``: a convolution's kernel has other axes than its moments."""
    return moments_II.diagonal() if dense.ndim == 2 else None


def _grid(scales: Scales, w_OI: torch.Tensor) -> TableGrid:
    return nf4_grid(scales.decoded.to(w_OI.device), scales.state.blocksize, tuple(w_OI.shape))


def _nf4_refitted(
    codec: NF4, spec: TensorSpec, w_OI: torch.Tensor, moments_II: torch.Tensor, codes_OI: torch.Tensor, scales: Scales
) -> Mapping[str, torch.Tensor]:
    levels_K = torch.from_numpy(NF4_LEVELS.copy()).to(w_OI.device)
    scale_OB = scales.decoded.to(w_OI.device).view(len(w_OI), -1).clone()
    for start in range(0, len(w_OI), _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        refit_scales(w_OI[rows].float(), levels_K[codes_OI[rows].long()], scale_OB[rows], moments_II)
    fitted = codec.scales(spec, scale_OB.view(-1))
    codes_OI = descend(w_OI, codes_OI, moments_II, _grid(fitted, w_OI), sweeps=DESCENTS, damp=DAMP)
    return codec.pack(spec, codes_OI.view(spec.shape), fitted)


def refit_scales(w_OI: torch.Tensor, level_OI: torch.Tensor, scale_OB: torch.Tensor, moments_II: torch.Tensor) -> None:
    """One pass of least squares over the scales in place, block of columns by block of columns, each given the others: value = level * scale.

    A scale that least squares would turn round or take to nothing stays: the codes were made for its sign.
    """
    size = w_OI.shape[1] // scale_OB.shape[1]
    moments_II = moments_II.float()
    gradient_OI = (w_OI - level_OI * scale_OB.repeat_interleave(size, 1)) @ moments_II
    for block in range(scale_OB.shape[1]):
        columns = slice(block * size, (block + 1) * size)
        level_OS = level_OI[:, columns]
        square_O = ((level_OS @ moments_II[columns, columns]) * level_OS).sum(1)
        step_O = torch.where(square_O > float(TINY), (level_OS * gradient_OI[:, columns]).sum(1) / square_O, 0)
        step_O = torch.where((scale_OB[:, block] + step_O) * scale_OB[:, block] > 0, step_O, 0)
        scale_OB[:, block] += step_O
        gradient_OI -= (level_OS * step_O[:, None]) @ moments_II[columns]


# --- int8 --------------------------------------------------------------------------------------------------------------------


def _int8_candidates(codec: Int8, spec: TensorSpec, dense: torch.Tensor, moments_II: torch.Tensor) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    parts = codec.encode(spec, dense)
    yield PLAIN, parts
    weight, scales, _ = (part.name for part in codec.part_specs(spec))
    codes_OI = _fed_back(dense, moments_II, int8_grid(parts[scales].to(dense.device), tuple(dense.shape)))
    yield "gptq", {**parts, weight: signed(codes_OI).cpu()}
