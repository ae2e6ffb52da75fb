"""Rounding onto a grid that the base sits on: scales stay, the adapter survives, and the closed forms agree with float64."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.errors import UnsupportedError
from qlora_tools.quant.codec import Stored
from qlora_tools.quant.int4 import Int4
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.keep_grid import enlarged, grid_of, half_steps_square, keep_grid, nearest, recoded, unrounded
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec

NAME = "layer.weight"


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(codec, shape=(96, 80), seed=0):
    """(how it is stored, its parts, what they decode to in fp32)."""
    spec = TensorSpec(NAME, "F32", shape)
    parts = codec.encode(spec, drawn(*shape, seed=seed) * 0.02)
    return Stored(codec, spec, tuple(part.name for part in codec.part_specs(spec))), parts, codec.decode(spec, parts)


def change(base, share=0.01, rank=4):
    """(D, its A factor): ``share`` of the norm of ``base``."""
    a_RI, b_OR = drawn(rank, base.shape[1], seed=1), drawn(base.shape[0], rank, seed=2)
    delta = b_OR @ a_RI
    return delta * (share * base.norm() / delta.norm()), a_RI


def retention(found, base, delta):
    return float(((found - base) * delta).sum() / delta.square().sum())


CODECS = [NF4(), NF4(double_quant=False), NF4(block_size=32), Int8()]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("shape", [(96, 80), (33, 129), (7, 5)])
def test_the_grid_holds_what_the_codec_decodes(codec, shape):
    form, parts, base = stored(codec, shape)
    grid = grid_of(form, parts)
    codes = nearest(grid, base)
    assert torch.allclose(grid.values(codes), base, rtol=2e-6, atol=1e-9)
    assert all(torch.equal(part, parts[name]) for name, part in recoded(form, parts, codes).items())


@pytest.mark.parametrize("codec", [*CODECS, NF4(search="signed")], ids=repr)
def test_an_adapter_far_below_half_a_step_survives_and_the_scales_keep_their_bits(codec):
    form, parts, base = stored(codec)
    delta, a_RI = change(base, 0.01 if isinstance(codec, NF4) else 0.002)
    kept = keep_grid(base + delta, form, parts, a_RI)
    found = codec.decode(form.spec, kept.parts)
    plain = codec.decode(form.spec, recoded(form, parts, nearest(grid_of(form, parts), base + delta)))
    assert retention(plain, base, delta) < (0.1 if isinstance(codec, NF4) else 0.5)
    assert 0.9 < retention(found, base, delta) < 1.05
    assert (found - base - delta).norm() < 0.12 * base.norm()
    assert [name for name in parts if not torch.equal(parts[name], kept.parts[name])] == [NAME]
    assert kept.parts.keys() == parts.keys() and all(kept.parts[name].dtype == parts[name].dtype for name in parts)


def test_moments_keep_the_outputs_better_than_none_do():
    form, parts, base = stored(NF4())
    delta, a_RI = change(base)
    mixed = drawn(80, 80, seed=5) * torch.logspace(0, -2, 80)
    moments = mixed @ mixed.T
    errors = {}
    for name, given in (("none", None), ("moments", moments)):
        lost = NF4().decode(form.spec, keep_grid(base + delta, form, parts, a_RI, given).parts) - base - delta
        errors[name] = float(((lost @ moments) * lost).sum())
    assert errors["moments"] < 0.8 * errors["none"]


def test_unrounded_weights_round_to_the_chosen_codes_and_lie_between_the_points():
    form, parts, base = stored(NF4())
    delta, a_RI = change(base)
    kept = keep_grid(base + delta, form, parts, a_RI)
    between, grid = unrounded(base + delta, kept), grid_of(form, parts)
    codes = nearest(grid, between)
    assert torch.equal(codes, nearest(grid, kept.values_OI))
    distance = (between - kept.values_OI).abs() / grid.scale_OI.abs()
    assert 0.005 < distance.mean() < 0.05  # 0.033 for values spread evenly over a mean step of 2/15


@pytest.mark.parametrize("given", [True, False])
def test_enlarged_moments_equal_their_float64_definition(given):
    a_RI, rows = drawn(5, 24), drawn(60, 24, seed=3)
    moments = (rows.T @ rows / 60) if given else None
    a = a_RI.double()
    projector = a.T @ torch.linalg.inv(a @ a.T) @ a
    one = torch.eye(24, dtype=torch.float64)
    first = moments.double() / moments.double().diagonal().mean() + 0.1 * one if given else one
    assert torch.allclose(enlarged(moments, a_RI, 30.0), first + 30.0 * projector, rtol=1e-9, atol=1e-9)


def test_repeated_and_empty_directions_count_once_or_not():
    a_RI = drawn(3, 16)
    twice = torch.cat([a_RI, 2 * a_RI, torch.zeros(2, 16)])
    assert torch.allclose(enlarged(None, twice, 7.0), enlarged(None, a_RI, 7.0), atol=1e-5)
    assert torch.equal(enlarged(None, torch.zeros(1, 16), 7.0), torch.eye(16, dtype=torch.float64))
    assert torch.equal(enlarged(torch.zeros(16, 16), torch.zeros(1, 16), 7.0), torch.eye(16, dtype=torch.float64))


def test_blocks_of_zeros_and_odd_sizes_keep_their_bytes():
    spec = TensorSpec(NAME, "F32", (3, 43))
    dense = drawn(3, 43)
    dense[0] = 0
    codec = NF4(block_size=32)
    parts = codec.encode(spec, dense)
    form = Stored(codec, spec, tuple(part.name for part in codec.part_specs(spec)))
    base = codec.decode(spec, parts)
    kept = keep_grid(base, form, parts, torch.zeros(1, 43))
    assert torch.equal(codec.decode(spec, kept.parts), base)


def test_half_steps_are_half_the_mean_distance_of_neighbours():
    form, parts, base = stored(NF4(double_quant=False))
    scale = grid_of(form, parts).scale_OI.double()
    assert half_steps_square(NF4(), base) == pytest.approx(float((scale / 15).square().sum()), rel=1e-4)
    form, parts, base = stored(Int8())
    scale = grid_of(form, parts).scale_OI.double()
    assert half_steps_square(Int8(), base) == pytest.approx(float((scale / 2).square().sum()), rel=1e-4)


def test_a_form_without_such_a_grid_is_refused():
    with pytest.raises(UnsupportedError, match="cannot be kept"):
        grid_of(Stored(Int4(), TensorSpec(NAME, "F32", (8, 32)), ()), {})
