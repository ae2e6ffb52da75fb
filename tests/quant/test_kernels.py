"""The loops agree with torch on every 16-bit pattern, and compile where no cache can be written."""

from __future__ import annotations

import subprocess
import sys

import bitsandbytes.functional as bnbf
import numba
import numpy as np
import pytest
import torch

from qlora_tools.quant import kernels
from qlora_tools.quant.floats import bit_patterns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_pattern_is_widened_like_torch(dtype):
    words = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    finite = words[torch.isfinite(words)]
    bits, kind = bit_patterns(finite)
    widened = np.empty(len(finite), np.float32)
    kernels._widen(bits, kind, widened)
    assert np.array_equal(widened.view(np.uint32), finite.float().numpy().view(np.uint32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fp32_is_rounded_like_torch_at_and_around_every_halfway_point(dtype):
    halves = torch.arange(1 << 20, dtype=torch.int64) << 12  # every exponent and sign; fp16's and bf16's last bits and halves
    words = (halves.unsqueeze(1) + torch.tensor([-1, 0, 1])).view(-1).clamp(0, (1 << 32) - 1).to(torch.uint32)
    values = words.view(torch.float32)
    values = values[~values.isnan()]
    word = torch.uint32 if dtype == torch.float32 else torch.uint16
    expected = values.to(dtype).view(word).numpy()
    _, kind = bit_patterns(torch.zeros(1, dtype=dtype))
    narrowed = np.empty(len(values), np.uint32)
    _narrow_all(values.numpy(), kind, narrowed)
    assert np.array_equal(narrowed, expected)
    full_nan = np.array([0x7FFFFFFF], np.uint32).view(np.float32)  # rounding up would carry it into the sign
    _narrow_all(full_nan, kind, narrowed[:1])
    assert narrowed[0] == {kernels.BF16: 0x7FC0, kernels.FP16: 0x7E00, kernels.FP32: 0x7FFFFFFF}[kind]


_narrow = kernels._narrow


@numba.njit
def _narrow_all(values, kind, out):
    for j in range(len(values)):
        out[j] = _narrow(values[j], kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_pattern_that_is_not_finite_makes_its_block_not_finite(dtype):
    words = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    wrong = words[~torch.isfinite(words)]
    blocks = torch.ones(len(wrong), 32, dtype=dtype)
    blocks[:, 5] = wrong
    bits, kind = bit_patterns(blocks)
    absmax = np.empty(len(wrong), np.float32)
    kernels.quantize_nf4(bits.reshape(-1), kind, 32, np.empty(blocks.numel() // 2, np.uint8), absmax, 0, len(wrong))
    assert not np.isfinite(absmax).any()
    kernels.quantize_rows(bits, kind, np.float32(127), np.empty(blocks.shape, np.int8), absmax)
    assert not np.isfinite(absmax).any()


def test_levels_are_bitsandbytes():
    assert torch.equal(torch.from_numpy(kernels.NF4_LEVELS), bnbf.get_4bit_type("nf4", device="cpu"))


def test_values_on_a_bound_take_the_lower_code_like_bitsandbytes():
    values = torch.cat(
        [torch.ones(1), torch.from_numpy(kernels.NF4_MIDPOINTS), torch.nextafter(torch.from_numpy(kernels.NF4_MIDPOINTS), torch.ones(1)), torch.zeros(1)]
    )
    packed = np.empty(16, np.uint8)
    kernels.quantize_nf4(values.view(torch.uint32).numpy(), kernels.FP32, 32, packed, np.empty(1, np.float32), 0, 1)
    codes = np.stack([packed >> 4, packed & 15], 1).ravel()
    assert codes.tolist() == [15, *range(15), *range(1, 16), 7]
    assert np.array_equal(packed, bnbf.quantize_4bit(values, blocksize=32, quant_type="nf4")[0].numpy().ravel())


def test_a_function_without_a_cacheable_place_still_compiles():
    scope: dict = {}
    exec("def double(x):\n    return x + x", scope)  # no file: numba finds nowhere to cache it
    assert kernels._compiled(scope["double"])(21) == 42


def test_importing_the_kernels_compiles_nothing():
    code = "from qlora_tools.quant import kernels as k; print(sum(len(getattr(k, n).signatures) for n in ('quantize_nf4', 'dequantize_nf4', 'quantize_rows', 'quantize_grid')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "0"
