"""Each weight format: what it stores, how far that is from the weight, and that ONNX Runtime computes with exactly that."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.dense import Dense
from qlora_tools.export.formats.digits import Digits
from tests.export.formats_run import run_format

FORMATS = {
    "dense": Dense(),
    "int8 blocks": Blocks(8),
    "int8 blocks with zeros": Blocks(8, zeros=True),
    "int4 blocks": Blocks(4),
    "digits": Digits(),
    "digits in groups": Digits(longest_group=64),
    "digits with remainder": Digits(longest_group=128, remainder=True),
    "one digit": Digits(digits=1),
    "one digit in groups": Digits(longest_group=64, digits=1),
}
#: Relative rounding error of the weight (Gaussian), and of the product on top of it, that each format may have.
ERRORS = {
    "dense": (0, 1e-6),
    "int8 blocks": (0.006, 0.007),
    "int8 blocks with zeros": (0.0055, 0.007),
    "int4 blocks": (0.09, 0.007),
    "digits": (0.0075, 3e-4),
    "digits in groups": (0.006, 3e-4),
    "digits with remainder": (0.0065, 3e-4),
    "one digit": (0.0075, 0.01),
    "one digit in groups": (0.006, 0.01),
}
SHAPES = [(8, 64), (33, 96), (7, 75), (130, 200), (1, 1), (5, 17)]


def gaussian(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def distance(found, reference):
    return float(
        np.linalg.norm(np.asarray(found, np.float64) - np.asarray(reference, np.float64)) / max(np.linalg.norm(np.asarray(reference, np.float64)), 1e-30)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_what_encode_gives_and_start_with_the_rows(name):
    for rows, columns in SHAPES:
        form = FORMATS[name]
        parts = form.encode("w", gaussian(rows, columns))
        specs = {spec.name: spec for spec in form.parts("w", rows, columns)}
        assert parts.keys() == specs.keys()
        for part, tensor in parts.items():
            assert (tensor.dtype, tuple(tensor.shape)) == (specs[part].torch_dtype, specs[part].shape)
            assert tensor.shape[0] == rows


@pytest.mark.parametrize("name", FORMATS)
def test_rows_encode_alone_as_they_encode_together(name):
    form, w = FORMATS[name], gaussian(12, 96)
    whole, upper, lower = form.encode("w", w), form.encode("w", w[:5]), form.encode("w", w[5:])
    for part, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([upper[part], lower[part]]))


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_weight_is_near_the_weight(name):
    form, w = FORMATS[name], gaussian(64, 256)
    assert distance(form.decode("w", form.encode("w", w), 256), w) <= ERRORS[name][0]


@pytest.mark.parametrize("name", FORMATS)
def test_onnxruntime_multiplies_with_the_decoded_weight(name, tmp_path):
    for number, (rows, columns) in enumerate(SHAPES):
        x = np.random.default_rng(number).standard_normal((5, columns)).astype(np.float32)
        bias = np.arange(rows, dtype=np.float32)
        found, carried = run_format(tmp_path / str(number), FORMATS[name], gaussian(rows, columns), x_TI=x, bias_O=bias)
        assert distance(found - bias, x.astype(np.float64) @ carried.numpy().astype(np.float64).T) <= max(ERRORS[name][1], 1e-6) * (3 if columns < 32 else 1.5)


@pytest.mark.parametrize("name", ["dense", "int8 blocks", "int8 blocks with zeros", "int4 blocks", "digits", "digits in groups", "digits with remainder"])
def test_onnxruntime_looks_up_the_decoded_rows(name, tmp_path):
    for number, (rows, columns) in enumerate([(9, 64), (33, 96), (7, 80)]):
        ids = np.array([0, rows - 1, 3, 3], np.int64)
        found, carried = run_format(tmp_path / str(number), FORMATS[name], gaussian(rows, columns), ids_T=ids)
        np.testing.assert_allclose(found, carried.numpy()[ids], rtol=1e-6, atol=1e-7)


def test_a_table_keeps_the_checkpoints_bf16_bit_for_bit(tmp_path):
    w = gaussian(20, 33).bfloat16()
    ids = np.arange(20, dtype=np.int64)
    found, _ = run_format(tmp_path / "t", Dense(stored="BF16"), w, ids_T=ids)
    assert np.array_equal(found, w.float().numpy())


def test_a_remainder_makes_lookups_two_hundred_times_finer():
    form, w = FORMATS["digits with remainder"], gaussian(64, 256)
    parts = form.encode("w", w)
    multiplied, looked_up = (distance(form.decode("w", parts, 256, looked_up=wanted), w) for wanted in (False, True))
    assert looked_up < multiplied / 200


@pytest.mark.parametrize("name", FORMATS)
def test_zero_constant_and_one_sided_rows_survive(name, tmp_path):
    w = torch.stack([torch.zeros(64), torch.full((64,), 3.0), torch.full((64,), -0.5), torch.linspace(0, 1, 64), torch.linspace(-1, 0, 64)])
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    found, carried = run_format(tmp_path / "t", FORMATS[name], w, x_TI=x)
    assert torch.equal(carried[0], torch.zeros(64)) and np.all(found[:, 0] == 0)
    assert distance(carried, w) < (0.05 if "int4" in name else 0.005)


@pytest.mark.parametrize("digits", [1, 2])
def test_digits_of_a_token_do_not_depend_on_the_tokens_beside_it(digits, tmp_path):
    w = gaussian(40, 128)
    x = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    loud = x.copy()
    loud[3] *= 1000
    quiet_found, _ = run_format(tmp_path / "t", Digits(digits=digits), w, x_TI=x)
    loud_found, _ = run_format(tmp_path / "t", Digits(digits=digits), w, x_TI=loud)
    others = [0, 1, 2, 4, 5]
    assert np.array_equal(quiet_found[others], loud_found[others])
    np.testing.assert_allclose(loud_found[3], quiet_found[3] * 1000, rtol=1e-4, atol=0.5)


@pytest.mark.parametrize("digits", [1, 2])
def test_digits_of_zero_and_tiny_tokens_are_finite(digits, tmp_path):
    x = np.zeros((3, 64), np.float32)
    x[1, 5], x[2] = 1e-20, 1e-38
    found, carried = run_format(tmp_path / "t", Digits(digits=digits), gaussian(8, 64), x_TI=x)
    assert np.isfinite(found).all() and np.all(found[0] == 0)
    np.testing.assert_allclose(found[1], x[1] @ carried.numpy().T, rtol=1e-2)


def test_digits_at_their_extremes_stay_below_the_pairwise_saturation_of_older_cpus(tmp_path):
    w = torch.full((4, 256), 1.0)
    w[:, 0] = -0.004
    x = np.ones((2, 256), np.float32)
    x[1] = -1
    found, carried = run_format(tmp_path / "t", Digits(), w, x_TI=x)
    np.testing.assert_allclose(found, x @ carried.numpy().T, rtol=1e-5)
    assert 2 * 127 * 128 < 2**15


def test_digit_groups_cover_the_columns():
    assert Digits().groups(1024) == (1024,)
    assert Digits().groups(2816) == (960, 960, 896)
    assert Digits(longest_group=64).groups(75) == (64, 11)
    assert Digits().groups(1) == (1,)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 150), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1.0, 1e4]), name=st.sampled_from(sorted(FORMATS))
)
def test_any_shape_decodes_within_one_step_of_its_grid(rows, columns, seed, scale, name):
    form = FORMATS[name]
    w = gaussian(rows, columns, seed) * scale
    carried = form.decode("w", form.encode("w", w), columns)
    assert carried.shape == w.shape
    step = 0.16 if name == "int4 blocks" else 0.0075
    assert float((carried - w).abs().max()) <= step * float(w.abs().max()) + 1e-12
