"""What ONNX Runtime dequantizes from our bytes is what we meant, and the scale search pays."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qlora_tools.errors import NonFiniteError, UnsupportedError, UsageError
from qlora_tools.quant.blockwise import Grid, dequantize_blocks, quantize_blocks, quantize_blocks_plain, quantize_channels, quantize_embedding

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(5, 32), (8, 100), (16, 128), (3, 8), (8, 256)]
GRIDS = [Grid(bits, block, search) for bits in (4, 8) for block in (16, 32, 128) for search in (False, True)]


def weights(shape, dtype=torch.float32, seed=0, scale=0.05):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def run(node, constants, feed, output_shape):
    """The one output of a one-node graph on the CPU."""
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape) for name, value in feed.items()]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, output_shape)
    graph = helper.make_graph([node], "one", inputs, [output], [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def relative_square(restored, dense):
    return float((restored - dense.float()).pow(2).sum() / dense.float().pow(2).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_matmulnbits_multiplies_with_the_values_we_decode(grid, shape):
    n, k = shape
    dense = weights(shape)
    dense[0] = 0
    packed, scale = quantize_blocks(dense, grid)
    assert tuple(packed.shape) == grid.packed_shape(n, k) and tuple(scale.shape) == (n, grid.blocks(k)) and scale.dtype == torch.float32
    node = helper.make_node("MatMulNBits", ["a", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=grid.bits, block_size=grid.block)
    product = run(node, {"b": packed.numpy(), "s": scale.numpy()}, {"a": np.eye(k, dtype=np.float32)}, [k, n])
    decoded = dequantize_blocks(packed, scale, grid, k)
    np.testing.assert_allclose(product.T, decoded.numpy(), rtol=1e-6, atol=1e-8)
    assert relative_square(decoded, dense) < (0.02 if grid.bits == 4 else 1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gatherblockquantized_returns_the_same_rows(grid, shape):
    v, k = shape
    dense = weights(shape)
    data, scale = quantize_embedding(dense, grid)
    assert tuple(data.shape) == grid.embedding_shape(v, k)
    rows = np.array([[v - 1, 0], [1, 1]])
    attributes = {"bits": grid.bits, "block_size": grid.block, "gather_axis": 0, "quantize_axis": 1}
    node = helper.make_node("GatherBlockQuantized", ["d", "i", "s"], ["y"], domain="com.microsoft", **attributes)
    gathered = run(node, {"d": data.numpy(), "s": scale.numpy()}, {"i": rows}, [2, 2, k])
    decoded = dequantize_blocks(*quantize_blocks(dense, grid), grid, k)
    np.testing.assert_allclose(gathered, decoded.numpy()[rows], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduce_range", [False, True])
def test_dynamic_quantize_matmul_takes_channels(reduce_range):
    dense = weights((24, 40))
    codes, scale = quantize_channels(dense, reduce_range=reduce_range)
    assert tuple(codes.shape) == (40, 24) and codes.dtype == torch.int8 and codes.is_contiguous()
    assert int(codes.abs().max()) == (64 if reduce_range else 127)
    node = helper.make_node("DynamicQuantizeMatMul", ["a", "b", "s"], ["y"], domain="com.microsoft")
    product = run(node, {"b": codes.numpy(), "s": scale.numpy()}, {"a": np.eye(40, dtype=np.float32)}, [40, 24])
    np.testing.assert_allclose(product, codes.numpy() * scale.numpy(), rtol=1e-5, atol=1e-7)
    step = dense.abs().amax(1) / (64 if reduce_range else 127)
    assert bool(((codes.float() * scale - dense.T).abs() <= step * 0.50001).all())


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 90),
    bits=st.sampled_from((4, 8)),
    block=st.sampled_from((16, 32, 64)),
    dtype=st.sampled_from(DTYPES),
    power=st.integers(-8, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_kernel_equals_its_twin_and_the_plain_grid_is_idempotent(n, k, bits, block, dtype, power, seed):
    grid = Grid(bits, block)
    dense = weights((n, k), dtype, seed, 2.0**power)
    packed, scale = quantize_blocks(dense, grid)
    twin = quantize_blocks_plain(dense, grid)
    assert torch.equal(packed, twin[0]) and torch.equal(scale, twin[1])
    restored = dequantize_blocks(packed, scale, grid, k)
    assert torch.equal(quantize_blocks(restored, grid)[0], packed)


@given(n=st.integers(1, 9), k=st.integers(1, 90), bits=st.sampled_from((4, 8)), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_search_never_loses_against_the_plain_grid(n, k, bits, dtype, seed):
    dense = weights((n, k), dtype, seed)
    grid = Grid(bits, 32, search=True)

    def block_errors(packed, scale):
        wrong = (dequantize_blocks(packed, scale, grid, k).double() - dense.double()).pow(2)
        return torch.nn.functional.pad(wrong, (0, -k % 32)).view(n, -1, 32).sum(-1)

    found = block_errors(*quantize_blocks(dense, grid))
    floor = dense.double().pow(2).max() * 1e-12
    assert bool((found <= block_errors(*quantize_blocks(dense, Grid(bits, 32))) * 1.0001 + floor).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_search_agrees_with_its_twin_in_all_but_near_ties(bits, dtype):
    dense = weights((64, 1000), dtype)
    grid = Grid(bits, 32, search=True)
    (packed, scale), (twin, twin_scale) = quantize_blocks(dense, grid), quantize_blocks_plain(dense, grid)
    same = (packed == twin).all(-1) & ((scale - twin_scale).abs() <= 1e-5 * scale.abs())
    assert float(same.double().mean()) > (0.999 if bits == 4 else 0.98)
    assert relative_square(dequantize_blocks(packed, scale, grid, 1000), dense) == pytest.approx(
        relative_square(dequantize_blocks(twin, twin_scale, grid, 1000), dense), rel=1e-4
    )


def best_by_brute_force(dense, block):
    """float64: least error over 400 signed scales and two refits, per block; the whole error."""
    values = dense.double().view(-1, block)
    largest = values.abs().amax(1, keepdim=True)
    least = torch.full((len(values), 1), torch.inf, dtype=torch.float64)
    for inverse in torch.cat([torch.linspace(4, 12, 200), -torch.linspace(4, 12, 200)]).tolist():
        scale = largest / inverse
        for _ in range(3):
            codes = torch.round(values / scale).clamp(-8, 7)
            square = (codes * codes).sum(1, keepdim=True).clamp(min=1)
            scale = (values * codes).sum(1, keepdim=True) / square
            least = torch.minimum(least, (values - scale * codes).pow(2).sum(1, keepdim=True))
            scale = torch.where(scale == 0, largest, scale)
    return float(least.sum() / values.pow(2).sum())


@pytest.mark.parametrize("block", [32, 128])
def test_search_gains_a_tenth_and_comes_within_two_percent_of_brute_force(block):
    dense = weights((64, 1024))
    plain, searched = (relative_square(dequantize_blocks(*quantize_blocks(dense, grid), grid, 1024), dense) for grid in (Grid(4, block), Grid(4, block, True)))
    absmax = dense.view(-1, block).abs().amax(1, keepdim=True) / 7
    textbook = relative_square((torch.round(dense.view(-1, block) / absmax) * absmax).view_as(dense), dense)
    assert searched < 0.91 * plain and searched < 0.74 * textbook
    assert searched < 1.02 * best_by_brute_force(dense, block)


def test_search_helps_eight_bits_too():
    dense = weights((64, 1024))
    plain, searched = (relative_square(dequantize_blocks(*quantize_blocks(dense, grid), grid, 1024), dense) for grid in (Grid(8, 32), Grid(8, 32, True)))
    assert searched < 0.92 * plain


def test_tiles_of_rows_give_the_rows_of_the_whole():
    dense = weights((50, 70), torch.bfloat16)
    for grid in GRIDS:
        whole, tiles = quantize_blocks(dense, grid), [quantize_blocks(dense[low : low + 20], grid, threads=2) for low in (0, 20, 40)]
        assert torch.equal(whole[0], torch.cat([packed for packed, _ in tiles])) and torch.equal(whole[1], torch.cat([scale for _, scale in tiles]))


def test_padding_and_zero_blocks_hold_the_zero_point():
    packed, scale = quantize_blocks(torch.zeros(2, 20), Grid(4, 16))
    assert packed.unique().tolist() == [0x88] and not scale.any()
    packed, _ = quantize_blocks(torch.ones(1, 20), Grid(8, 16))
    assert packed[0, 1, 4:].unique().tolist() == [128]


def test_extreme_magnitudes_stay_finite():
    for value in (3e38, 1e-30, 1e-37):
        dense = weights((4, 64), scale=1.0).clamp(-1, 1) * value
        for grid in (Grid(4), Grid(4, search=True)):
            restored = dequantize_blocks(*quantize_blocks(dense, grid), grid, 64)
            assert bool(torch.isfinite(restored).all()) and relative_square(restored.double() / value, dense.double() / value) < 0.02
    tiny = torch.full((1, 32), 1e-42)
    assert not dequantize_blocks(*quantize_blocks(tiny, Grid()), Grid(), 32).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_values_are_located_in_the_whole_tensor(value, dtype):
    dense = weights((6, 64), dtype)
    dense[2, 5] = value
    for quantize in (lambda: quantize_blocks(dense, Grid(), name="w", row=100), lambda: quantize_channels(dense, name="w", row=100)):
        with pytest.raises(NonFiniteError, match=r"w: 1 of 384 .* index \[102, 5\]"):
            quantize()


def test_refusals():
    for bad in ({"bits": 3}, {"block": 48}, {"block": 8}):
        with pytest.raises(UsageError):
            Grid(**bad)
    with pytest.raises(UnsupportedError, match="whole bytes"):
        quantize_embedding(weights((3, 7)), Grid(4, 16))
    with pytest.raises(UnsupportedError, match="int8"):
        quantize_blocks(torch.zeros(2, 32, dtype=torch.int8), Grid())
