"""int8 convolutions as ONNX Runtime runs them, against torch's convolution of the same weights in float64."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.dialects.contrib import Contrib
from qlora_tools.export.external import ExternalWriter
from qlora_tools.export.formats.convolution import Patches, Window
from qlora_tools.export.nodes import CONTRIB, Nodes


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def square(rank=2, size=3, stride=1, pad=1, dilation=1):
    return Window(*((number,) * rank for number in (size, stride, pad, pad, dilation)))


def run(folder, w_OCS, x_NCS, window, bias=None, *, optimized=False):
    """(what the graph computes, the weight it carries)."""
    form = Patches()
    specs = form.parts("w", tuple(w_OCS.shape))
    parts = form.encode("w", w_OCS)
    (folder / DATA_FILE).unlink(missing_ok=True)
    with ExternalWriter(folder / DATA_FILE, specs) as writer:
        for name, tensor in parts.items():
            writer.write(name, tensor)
    nodes = Nodes({spec.name: spec for spec in specs}, writer.offsets, DATA_FILE)
    rank = len(window.kernel)
    x = ir.Value(name="x", shape=ir.Shape(("N", x_NCS.shape[1], *"DHW"[-rank:])), type=ir.TensorType(ir.DataType.FLOAT))
    y = form.convolve(nodes, x, "w", window, None if bias is None else nodes.constant(bias.numpy(), np.float32))
    y.shape, y.type = ir.Shape([None] * (rank + 2)), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=nodes.nodes, initializers=nodes.initializers, opset_imports={"": 18, CONTRIB: 1}, name="one")
    ir.save(ir.Model(graph, ir_version=Contrib.ir_version), folder / "one.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    session = ort.InferenceSession(folder / "one.onnx", options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x_NCS.numpy()})[0]), form.decode("w", parts, tuple(w_OCS.shape))


def reference(x_NCS, w_OCS, window, bias=None):
    """float64; the input rounded to the 256 levels that the graph rounds it to."""
    low, high = min(0.0, float(x_NCS.min())), max(0.0, float(x_NCS.max()))
    step = (high - low) / 255
    zero = round(-low / step)
    bytes_ = ((x_NCS.double() / step).round() + zero).clamp(0, 255)
    padding = [pad for pair in zip(reversed(window.starts), reversed(window.ends), strict=True) for pad in pair]
    padded = torch.nn.functional.pad((bytes_ - zero) * step, padding)
    convolve = getattr(torch.nn.functional, f"conv{len(window.kernel)}d")
    return convolve(padded, w_OCS.double(), None if bias is None else bias.double(), window.strides, 0, window.dilations)


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


WINDOWS = {
    "3x3": (2, square()),
    "1x1": (2, square(size=1, pad=0)),
    "1x1 with stride": (2, square(size=1, stride=2, pad=0)),
    "7x7 with stride": (2, square(size=7, stride=2, pad=3)),
    "dilated": (2, square(stride=1, pad=2, dilation=2)),
    "dilated with stride": (2, square(stride=2, pad=3, dilation=3)),
    "even kernel, uneven padding": (2, Window((2, 4), (1, 3), (1, 0), (0, 2), (1, 1))),
    "unpadded": (2, square(pad=0)),
    "one axis": (1, Window((3,), (2,), (1,), (1,), (1,))),
    "three axes": (3, square(rank=3)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_graph_convolves_as_torch_does(tmp_path, name):
    rank, window = WINDOWS[name]
    w, x, bias = draw(24, 19, *window.kernel), draw(2, 19, *(9, 11, 8)[:rank], seed=1) + 0.3, draw(24, seed=2)
    found, carried = run(tmp_path, w, x, window, bias)
    wanted = reference(x, carried, window, bias)
    assert found.shape == wanted.shape
    assert relative(found, wanted) < 1e-3  # a value on the border between two levels may fall to either side


@pytest.mark.parametrize("shape", [(16, 33, 3, 3), (5, 1, 1, 1), (1, 40, 5, 1)])
def test_the_carried_kernel_is_within_half_a_step(shape):
    w, form = draw(*shape), Patches()
    parts = form.encode("w", w)
    flat = w.flatten(1)
    step = (flat.amax(1).clamp(min=0) - flat.amin(1).clamp(max=0)) / 255
    difference = (form.decode("w", parts, shape) - w).flatten(1).abs().amax(1)
    assert (difference <= step * 0.5001 + 1e-12).all()
    assert {name: (str(part.dtype), tuple(part.shape)) for name, part in parts.items()} == {
        spec.name: (str(spec.torch_dtype), spec.shape) for spec in form.parts("w", shape)
    }


@settings(max_examples=15, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    dilations=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_any_window_gives_torchs_sizes_and_values(tmp_path_factory, kernel, strides, pads, dilations):
    window = Window(kernel, strides, pads[:2], pads[2:], dilations)
    w, x = draw(3, 5, *kernel), draw(1, 5, 10, 12, seed=3)
    found, carried = run(tmp_path_factory.mktemp("window"), w, x, window)
    wanted = reference(x, carried, window)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max() + 1e-6


def test_a_dead_input_gives_the_bias(tmp_path):
    bias = draw(16)
    found, _ = run(tmp_path, draw(16, 16, 3, 3), torch.zeros(1, 16, 6, 6), square(), bias)
    assert torch.equal(found, bias[None, :, None, None].expand(found.shape))


def test_a_dead_channel_stays_dead(tmp_path):
    w = draw(8, 16, 3, 3)
    w[3] = 0
    found, carried = run(tmp_path, w, draw(1, 16, 6, 6), square())
    assert not carried[3].any() and not found[:, 3].any()


def test_a_value_that_is_not_finite_shows_in_the_scale():
    w = draw(8, 16, 3, 3)
    w[2, 5, 1, 1] = float("nan")
    scale = Patches().encode("w", w)["w.scale"]
    assert scale.isfinite().tolist() == [row != 2 for row in range(8)]


def test_the_runtime_keeps_the_integer_product_and_its_bias_in_one_node(tmp_path):
    run(tmp_path, draw(32, 16, 1, 1), draw(1, 16, 8, 8), square(size=1, pad=0), draw(32), optimized=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert "DynamicQuantizeMatMul" in kinds or "MatMulIntegerToFloat" in kinds
    assert not {"MatMulInteger", "Cast", "Add"} & set(kinds)
