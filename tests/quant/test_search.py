"""Searched NF4 scales: never worse, the kernel's equal to torch's, near a float64 brute force, and readable by stock bitsandbytes."""

from __future__ import annotations

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.errors import NonFiniteError, UsageError
from qlora_tools.quant import search
from qlora_tools.quant.kernels import NF4_LEVELS
from qlora_tools.quant.nf4 import NF4, pack_codes
from qlora_tools.quant.search import FORMS, POSITIVE, SIGNED, assign_codes, assign_codes_plain, search_scales, search_scales_plain
from qlora_tools.specs import spec_of

NAME = "model.layers.0.mlp.up_proj.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1,), (7,), (64,), (65,), (3, 5), (33, 48), (257, 17), (2, 3, 40), (300, 256)]


def weights(shape, dtype=torch.float32, seed=0, scale=0.05):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def codes_of(parts):
    packed = parts[NAME].view(-1)
    return torch.stack([packed >> 4, packed & 15], 1).view(-1)


def decoded(codec, dense, **options):
    spec = spec_of(NAME, dense)
    return codec.decode(spec, codec.encode(spec, dense, **options))


def squared_error(dense, restored, diag_I=None):
    difference = (restored.double() - dense.double()).square()
    return float((difference if diag_I is None else difference * diag_I.double()).sum())


def block_errors(values_BS, scales_B, weights_BS):
    """float64 [B]: weighted squared error of the nearest levels under each scale."""
    levels = torch.from_numpy(NF4_LEVELS).double()
    distance = (values_BS.double().unsqueeze(-1) - scales_B.double().view(-1, 1, 1) * levels).square().amin(-1)
    return (distance * weights_BS.double()).sum(1)


def brute_force(values_BS, weights_BS, *, signed):
    """float64 [B]: the least error over 300 scales of each sign allowed, in 0.4..1.15 of the largest magnitude."""
    largest = values_BS.double().abs().amax(1)
    least = torch.full_like(largest, torch.inf)
    for share in torch.linspace(0.4, 1.15, 300, dtype=torch.float64):
        for sign in (1, -1) if signed else (1,):
            least = torch.minimum(least, block_errors(values_BS, sign * share * largest, weights_BS))
    return least


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_error_is_within_two_percent_of_a_float64_brute_force(form, weighted):
    dense = weights((24, 64))
    diag_I = torch.rand(64, generator=torch.Generator().manual_seed(1)) ** 3 + 1e-3 if weighted else None
    spread = torch.ones(24, 64) if diag_I is None else diag_I.expand(24, 64)
    found = block_errors(dense, search_scales(dense, 64, form, diag_I), spread)
    best = brute_force(dense, spread, signed=form == SIGNED)
    assert float(found.sum() / best.sum()) < 1.02
    assert bool((found < 1.25 * best).all())


@pytest.mark.parametrize(("form", "bar"), [(POSITIVE, 0.88), (SIGNED, 0.86)])
def test_squared_error_falls_against_bitsandbytes_with_double_quantization(form, bar):
    for seed, scale in ((0, 0.02), (1, 1.0)):
        dense = weights((256, 512), seed=seed, scale=scale)
        stock = bnbf.dequantize_4bit(*bnbf.quantize_4bit(dense, compress_statistics=True, quant_type="nf4"))
        assert squared_error(dense, decoded(NF4(search=form), dense)) <= bar * squared_error(dense, stock)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_shape_is_worse_than_the_plain_scales(shape, form):
    for dtype in DTYPES:
        dense = weights(shape, dtype)
        plain, searched = (squared_error(dense, decoded(NF4(double_quant=False, search=chosen), dense)) for chosen in (None, form))
        assert searched <= plain * (1 + 1e-4) + (1e-4 if dtype != torch.float32 else 1e-12) * float(dense.double().square().sum())


@pytest.mark.parametrize("form", FORMS)
def test_input_weights_lower_the_weighted_error(form):
    dense = weights((64, 200))  # blocks across rows
    diag_I = torch.linspace(-3, 3, 200).exp()[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    blind, aware = decoded(NF4(search=form), dense), decoded(NF4(search=form), dense, diag_I=diag_I)
    assert squared_error(dense, aware, diag_I) < 0.9 * squared_error(dense, blind, diag_I)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (300, 256), (65, 321)], ids=str)
def test_kernel_equals_its_plain_twin(shape, dtype, form):
    dense = weights(shape, dtype)
    dense.view(-1)[64:128] = 0
    for diag_I in (None, torch.rand(shape[1], generator=torch.Generator().manual_seed(2)) + 0.1):
        kernel, plain = (find(dense, 64, form, diag_I) for find in (search_scales, search_scales_plain))
        assert float(((kernel - plain).abs() > 1e-5 * plain.abs()).float().mean()) < 0.01  # where two scales are as good
        for scales in (plain, plain.flip(0)):
            assert torch.equal(assign_codes(dense, scales, 64, form), assign_codes_plain(dense, scales, 64, form))


def test_plain_twin_in_tiles_equals_itself_whole(monkeypatch):
    dense, diag_I = weights((65, 321)), torch.rand(321) + 0.1
    whole = search_scales_plain(dense, 64, SIGNED, diag_I)
    codes = assign_codes_plain(dense, whole, 64, POSITIVE)
    monkeypatch.setattr(search, "_TILE_BLOCKS", 7)
    assert torch.equal(search_scales_plain(dense, 64, SIGNED, diag_I), whole)
    assert torch.equal(assign_codes_plain(dense, whole, 64, POSITIVE), codes)


def test_threads_change_nothing():
    dense = weights((1200, 130), torch.bfloat16)
    spec, diag_I = spec_of(NAME, dense), torch.rand(130) + 0.1
    one, three = (NF4(search=SIGNED, threads=threads).encode(spec, dense, diag_I) for threads in (1, 3))
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(128, 512), (257, 17), (65, 321)], ids=str)
def test_positive_form_survives_as_a_plain_checkpoint_into_stock_bitsandbytes(shape, dtype):
    dense = weights(shape, dtype)
    spec, codec = spec_of(NAME, dense), NF4(search=POSITIVE)
    parts = codec.encode(spec, dense)
    snapped = codec.decode(spec, parts)
    for double_quant in (False, True):
        packed, state = bnbf.quantize_4bit(snapped, compress_statistics=double_quant, quant_type="nf4")
        assert torch.equal(packed, parts[NAME])
        if shape == (128, 512):  # rows of whole blocks: stock decoding is right too, and what was gained stays
            plain = bnbf.dequantize_4bit(*bnbf.quantize_4bit(dense, compress_statistics=True, quant_type="nf4"))
            assert squared_error(dense, bnbf.dequantize_4bit(packed, state)) < 0.9 * squared_error(dense, plain)


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    blocksize=st.sampled_from((32, 64, 256)),
    dtype=st.sampled_from(DTYPES),
    double_quant=st.booleans(),
    seed=st.integers(0, 99),
    spread=st.floats(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_positive_codes_are_idempotent_whatever_the_blocks_hold(shape, blocksize, dtype, double_quant, seed, spread):
    dense = weights(shape, torch.float32, seed)
    dense = (dense * torch.exp(spread * weights(shape, seed=seed + 1, scale=1.0))).to(dtype)
    codec, spec = NF4(blocksize, double_quant, search=POSITIVE), spec_of(NAME, dense)
    parts = codec.encode(spec, dense)
    packed, _ = bnbf.quantize_4bit(codec.decode(spec, parts), blocksize=blocksize, quant_type="nf4")
    assert torch.equal(packed, parts[NAME])


def test_every_block_of_the_positive_form_keeps_an_end():
    dense = weights((200, 64))
    dense[3] = 0
    parts = NF4(search=POSITIVE).encode(spec_of(NAME, dense), dense)
    codes = codes_of(parts).view(200, 64)
    ended = ((codes == 0) | (codes == 15)).any(1)
    assert int(ended.sum()) == 199 and bool((codes[3] == 7).all())


@pytest.mark.parametrize("double_quant", [False, True])
def test_signed_form_is_decoded_exactly_by_stock_bitsandbytes(double_quant):
    dense = weights((64, 128))
    codec, spec = NF4(double_quant=double_quant, search=SIGNED), spec_of(NAME, dense)
    parts = codec.encode(spec, dense)
    assert 0.25 < float((codec.fit(spec, dense).decoded < 0).float().mean()) < 0.75
    stats = {name.removeprefix(NAME + "."): tensor for name, tensor in parts.items() if name != NAME}
    loaded = bnb.nn.Params4bit.from_prequantized(parts[NAME], stats, device="cpu")
    restored = bnbf.dequantize_4bit(loaded.data, loaded.quant_state)
    assert torch.equal(restored, codec.decode(spec, parts))
    x = weights((5, 128), seed=3, scale=1.0)
    torch.testing.assert_close(bnb.matmul_4bit(x, loaded.data.t(), loaded.quant_state), x @ restored.t(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_zeros_and_of_equal_values_are_exact(form):
    dense = torch.zeros(5, 64)
    dense[1], dense[2], dense[4, 7] = 0.25, -0.25, 1e-3
    restored = decoded(NF4(double_quant=False, search=form), dense)
    torch.testing.assert_close(restored, dense, rtol=1e-6, atol=0)
    assert torch.equal(decoded(NF4(search=form), torch.zeros(3, 50)), torch.zeros(3, 50))


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_nearest_under_the_scales_a_reader_sees(form):
    dense = weights((64, 96))
    codec, spec = NF4(search=form), spec_of(NAME, dense)
    scales = codec.fit(spec, dense).decoded
    nearest = block_errors(dense.view(-1, 64), scales, torch.ones(96, 64)).sum()
    assert squared_error(dense, codec.decode(spec, codec.encode(spec, dense))) == pytest.approx(float(nearest), rel=1e-5 if form == SIGNED else 1e-3)


def test_pack_and_scales_are_the_two_halves_of_encoding():
    for double_quant in (False, True):
        for search_form in (None, SIGNED):
            for shape in ((33, 48), (5, 33), (1,)):
                dense = weights(shape)
                codec, spec = NF4(double_quant=double_quant, search=search_form), spec_of(NAME, dense)
                parts = codec.encode(spec, dense)
                codes = codes_of(parts)[: dense.numel()].view(shape)
                again = codec.pack(spec, codes, codec.fit(spec, dense))
                assert again.keys() == parts.keys() and all(torch.equal(again[name], parts[name]) for name in parts)


def test_odd_counts_are_packed_with_the_code_of_zero():
    assert pack_codes(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist() == [0x12, 0xF7]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_located(value, form):
    for dtype in DTYPES:
        dense = weights((10, 10), dtype)
        dense[3, 7] = value
        with pytest.raises(NonFiniteError, match=r"first at index \[3, 7\]"):
            NF4(32, search=form).encode(spec_of(NAME, dense), dense)


def test_unknown_forms_are_refused_and_configs_stay_stock():
    with pytest.raises(UsageError, match="no scale search `best`"):
        NF4(search="best")
    assert NF4(search=SIGNED).describe() == NF4().describe() and NF4(search=SIGNED).part_specs(spec_of(NAME, weights((3, 50)))) == NF4().part_specs(
        spec_of(NAME, weights((3, 50)))
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_gpu_search_is_as_good_as_the_cpu(form):
    dense, diag_I = weights((257, 130), torch.bfloat16), torch.rand(130) + 0.1
    codec, spec = NF4(search=form), spec_of(NAME, dense)
    here, there = codec.encode(spec, dense, diag_I), codec.encode(spec, dense.cuda(), diag_I.cuda())
    errors = [squared_error(dense, codec.decode(spec, {n: t.cpu() for n, t in parts.items()}), diag_I) for parts in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)
