"""The choice between ways to store a layer: every one is the codec's own form, and held-out moments decide."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.errors import NonFiniteError, UnsupportedError
from qlora_tools.quant.calibrated import encode_calibrated, refit_scales
from qlora_tools.quant.gptq import output_error
from qlora_tools.quant.grids import nf4_grid
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec
from tests.quant.test_gptq import moments, weight

CODECS = [NF4(), NF4(search="positive"), NF4(double_quant=False), NF4(block_size=32), Int8()]


def spec_for(w_OI: torch.Tensor) -> TensorSpec:
    return TensorSpec("layer.weight", "F32", tuple(w_OI.shape))


def lost(codec, spec, parts, w_OI, r_II):
    return output_error(w_OI - codec.decode(spec, parts), r_II) / output_error(w_OI, r_II)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 128), (30, 96), (7, 65)])
def test_what_is_chosen_loses_least_and_less_than_plain(codec, outputs, inputs):
    w_OI, r_II = weight(outputs, inputs), moments(inputs)
    spec = spec_for(w_OI)
    choice = encode_calibrated(codec, spec, w_OI, r_II)
    assert choice.errors[choice.name] == min(choice.errors.values()) < 0.75 * choice.errors["plain"]
    assert lost(codec, spec, choice.parts, w_OI, r_II) == pytest.approx(choice.errors[choice.name], rel=1e-6)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in choice.parts.items()} == {
        part.name: (part.torch_dtype, part.shape) for part in codec.part_specs(spec)
    }


@pytest.mark.parametrize("codec", [NF4(), Int8()], ids=str)
def test_plain_stays_where_error_feedback_would_hurt_on_the_judging_text(codec):
    w_OI, taught = weight(32, 128), moments(128)
    choice = encode_calibrated(codec, spec_for(w_OI), w_OI, taught, torch.eye(128))  # uncorrelated: nearest is best
    assert choice.name in ("plain", "search") and choice.errors["plain"] < min(error for name, error in choice.errors.items() if "gptq" in name)
    for name, part in (codec.encode(spec_for(w_OI), w_OI) if choice.name == "plain" else {}).items():
        assert torch.equal(part, choice.parts[name])


def test_positive_scales_stay_positive():
    w_OI, codec = weight(32, 128), NF4(search="positive", double_quant=False)
    choice = encode_calibrated(codec, spec_for(w_OI), w_OI, moments(128))
    assert (choice.parts["layer.weight.absmax"] >= 0).all()
    signed = encode_calibrated(NF4(double_quant=False), spec_for(w_OI), w_OI, moments(128))
    assert (signed.parts["layer.weight.absmax"] < 0).any()


def test_bitsandbytes_decodes_the_chosen_parts_as_we_do():
    from bitsandbytes.functional import QuantState, dequantize_4bit

    w_OI, codec = weight(64, 128), NF4()
    spec = spec_for(w_OI)
    choice = encode_calibrated(codec, spec, w_OI, moments(128))
    packed = choice.parts["layer.weight"]
    state = QuantState.from_dict({name.removeprefix("layer.weight."): part for name, part in choice.parts.items() if name != "layer.weight"}, device="cpu")
    torch.testing.assert_close(dequantize_4bit(packed, state).view(64, 128), codec.decode(spec, choice.parts), rtol=0, atol=0)


def test_a_convolution_is_stored_under_the_moments_of_its_patches():
    w = weight(16, 8 * 9).view(16, 8, 3, 3)
    choice = encode_calibrated(NF4(), TensorSpec("conv.weight", "F32", (16, 8, 3, 3)), w, moments(72))
    assert choice.errors[choice.name] < 0.75 * choice.errors["plain"]


def test_the_grid_of_blocks_that_cross_rows_means_what_the_codec_decodes():
    w_OI, codec = weight(7, 65), NF4()
    spec = spec_for(w_OI)
    codes = torch.randint(0, 16, w_OI.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scales = codec.fit(spec, w_OI)
    torch.testing.assert_close(
        nf4_grid(scales.decoded, scales.state.blocksize, tuple(w_OI.shape)).values(codes), codec.decode(spec, codec.pack(spec, codes, scales)), rtol=0, atol=0
    )


def test_refitting_scales_agrees_with_float64_least_squares_and_never_raises_the_error():
    w_OI, r_II = weight(9, 64), moments(64)
    level_OI = torch.randint(-4, 5, w_OI.shape, generator=torch.Generator().manual_seed(0)).float() / 4
    scale_OB = torch.rand(9, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    expected_O = (level_OI.double() * (w_OI.double() @ r_II.double())).sum(1) / (level_OI.double() * (level_OI.double() @ r_II.double())).sum(1)
    refit_scales(w_OI, level_OI, scale_OB, r_II)
    fits = expected_O > 0
    torch.testing.assert_close(scale_OB[fits, 0].double(), expected_O[fits], rtol=1e-4, atol=1e-5)

    blocks = torch.rand(9, 4, generator=torch.Generator().manual_seed(2)) + 0.5
    before = output_error(w_OI - level_OI * blocks.repeat_interleave(16, 1), r_II)
    refit_scales(w_OI, level_OI, blocks, r_II)
    assert output_error(w_OI - level_OI * blocks.repeat_interleave(16, 1), r_II) < before and (blocks > 0).all()


def test_nothing_to_hear_means_nothing_to_gain():
    w_OI = weight(8, 64)
    choice = encode_calibrated(NF4(), spec_for(w_OI), w_OI, torch.zeros(64, 64))
    assert choice.name == "plain" and set(choice.errors.values()) == {0.0}


def test_nan_in_the_moments_and_unknown_codecs_are_refused():
    w_OI, r_II = weight(8, 64), moments(64)
    with pytest.raises(NonFiniteError):
        encode_calibrated(NF4(), spec_for(w_OI), w_OI, r_II * float("nan"))

    class Other:
        name = "other"

    with pytest.raises(UnsupportedError, match="other"):
        encode_calibrated(Other(), spec_for(w_OI), w_OI, r_II)
