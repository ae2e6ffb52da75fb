"""NF4 carried as it is: the operator against float64, and a checkpoint's own bytes."""

import numpy as np
import pytest
import torch

from qlora_tools.errors import NonFiniteError
from qlora_tools.export.calibrated import Factors, encode_calibrated
from qlora_tools.export.formats.format import Moments
from qlora_tools.export.formats.normal_floats import NormalFloats
from qlora_tools.export.target import Target
from qlora_tools.quant.codec import Stored
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec
from tests.export.formats_run import run_format

F16 = Target("cuda", "F16")
F32 = Target()


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (33, 192), (1, 128)])
@pytest.mark.parametrize(("compute", "target", "tolerance"), [("F32", F32, 1e-5), ("F16", F16, 4e-3)])
def test_onnxruntime_multiplies_with_the_decoded_levels(compute, target, tolerance, rows, columns, tmp_path):
    x = np.random.default_rng(0).standard_normal((5, columns)).astype(target.float_type.numpy())
    bias = np.arange(rows)
    found, carried = run_format(tmp_path, NormalFloats(compute), gaussian(rows, columns), x_TI=x, bias_O=bias, target=target)
    expected = x.astype(np.float64) @ carried.numpy().astype(np.float64).T + bias
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("search", [None, "signed"])
def test_a_checkpoints_codes_are_taken_over_bit_for_bit(double_quant, search, tmp_path):
    codec, spec = NF4(double_quant=double_quant, search=search), TensorSpec("model.w.weight", "BF16", (24, 128))
    parts = codec.encode(spec, gaussian(24, 128).bfloat16())
    held = Stored(NF4(double_quant=double_quant), spec, tuple(parts))
    form = NormalFloats("F16")
    assert form.adopts(held, 24, 128)
    adopted = form.adopt("w", held, parts)
    assert adopted["w"].numpy().tobytes() == parts["model.w.weight"].numpy().tobytes()
    dense = codec.decode(TensorSpec(spec.name, "F32", spec.shape), parts)
    torch.testing.assert_close(form.decode("w", adopted, 128), dense, rtol=2**-11, atol=1e-7)  # scales rounded to fp16, nothing else


def test_what_blocks_of_64_do_not_hold_is_not_taken_over():
    form = NormalFloats()
    other_block = Stored(NF4(block_size=128), TensorSpec("w", "BF16", (8, 128)), ())
    straddling = Stored(NF4(), TensorSpec("w", "BF16", (8, 96)), ())
    part = Stored(NF4(), TensorSpec("w", "BF16", (16, 128)), ())
    assert not any(form.adopts(held, 8, columns) for held, columns in ((other_block, 128), (straddling, 96), (part, 128)))
    assert not form.fits(96) and form.fits(128)


def test_rows_encode_alone_as_together_and_as_bitsandbytes_codec_does():
    form, w = NormalFloats("F32"), gaussian(12, 192)
    whole, upper, lower = form.encode("w", w), form.encode("w", w[:5]), form.encode("w", w[5:])
    parts = NF4(double_quant=False).encode(TensorSpec("w", "F32", (12, 192)), w)
    assert torch.equal(whole["w"].view(-1), parts["w"].view(-1)) and torch.equal(whole["w.absmax"].view(-1), parts["w.absmax"])
    for part, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([upper[part], lower[part]]))


def test_calibration_keeps_the_scales_and_lowers_the_error():
    form, w = NormalFloats("F16"), gaussian(16, 64)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    moments = x.T @ x / 200
    parts, choice = encode_calibrated(form, "w", "w", w, Moments(moments, moments, Factors().of("m", moments)))
    assert choice.error < 0.9 * choice.plain_error
    assert torch.equal(parts["w.absmax"], form.encode("w", w)["w.absmax"])


def test_scales_that_do_not_fit_fp16_are_refused():
    with pytest.raises(NonFiniteError, match="overflows in F16"):
        NormalFloats("F16").encode("w", torch.full((1, 64), 7e4))
    assert torch.isfinite(NormalFloats("BF16").encode("w", torch.full((1, 64), 7e4))["w.absmax"]).all()


def test_nan_shows_in_the_scales():
    w = gaussian(2, 64)
    w[1, 3] = torch.nan
    assert not torch.isfinite(NormalFloats("F16").encode("w", w)["w.absmax"]).all()
