"""Blocks in plain ONNX: the values of the operator's own form, and that ONNX Runtime fuses them back into it."""

from collections import Counter

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

from qlora_tools.export.formats.blocks import Blocks
from qlora_tools.export.formats.standard_blocks import StandardBlocks
from qlora_tools.export.target import Target
from tests.export.formats_run import draw_format, open_graph, run_format

PLAIN = {"F32": Target("cpu", "F32", standard=True), "F16": Target("cuda", "F16", standard=True)}
SHAPES = [(48, 128), (33, 96), (7, 75), (1, 1)]


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compute", PLAIN)
@pytest.mark.parametrize("bits", [4, 8])
def test_both_forms_carry_the_same_values(bits, compute):
    for rows, columns in SHAPES:
        w, form = gaussian(rows, columns), StandardBlocks(bits, compute=compute)
        specs = {spec.name: spec for spec in form.parts("w", rows, columns)}
        parts = form.encode("w", w)
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()} == {
            name: (spec.torch_dtype, spec.shape) for name, spec in specs.items()
        }
        blocks = Blocks(bits, compute=compute)
        assert torch.equal(form.decode("w", parts, columns), blocks.decode("w", blocks.encode("w", w), columns))


@pytest.mark.parametrize("compute", PLAIN)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_graph_is_valid_and_multiplies_with_the_decoded_weight(bits, compute, tmp_path):
    for number, (rows, columns) in enumerate(SHAPES):
        target, folder = PLAIN[compute], tmp_path / str(number)
        x = np.random.default_rng(0).standard_normal((5, columns)).astype(target.float_type.numpy())
        bias = np.arange(rows)
        found, carried = run_format(folder, StandardBlocks(bits, compute=compute), gaussian(rows, columns), x_TI=x, bias_O=bias, target=target)
        onnx.checker.check_model(folder / "one.onnx", full_check=True)
        expected = x.astype(np.float64) @ carried.numpy().astype(np.float64).T
        assert np.linalg.norm(found - bias - expected) <= 0.02 * np.linalg.norm(expected) + 1e-3 * rows  # fused, activations are 8 bits per block
        exact = onnx.reference.ReferenceEvaluator(onnx.load(folder / "one.onnx")).run(None, {"x": x})[0]
        assert np.linalg.norm(exact - bias - expected) <= 4e-3 * np.linalg.norm(expected) + 1e-3 * rows


@pytest.mark.parametrize("bits", [4, 8])
def test_onnxruntime_fuses_the_pair_into_one_product(bits, tmp_path):
    draw_format(tmp_path, StandardBlocks(bits), gaussian(48, 128), target=PLAIN["F32"])
    open_graph(tmp_path / "one.onnx", optimized_model_filepath=str(tmp_path / "fused.onnx"))
    assert Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node) == {"MatMulNBits": 1}


@pytest.mark.parametrize("compute", PLAIN)
def test_rows_are_looked_up_in_the_table_that_is_multiplied(compute, tmp_path):
    for number, (rows, columns) in enumerate([(33, 96), (7, 75)]):
        ids = np.array([0, rows - 1, 3, 3])
        found, carried = run_format(tmp_path / str(number), StandardBlocks(8, compute=compute), gaussian(rows, columns), ids_T=ids, target=PLAIN[compute])
        np.testing.assert_allclose(found, carried.numpy()[ids], rtol=0 if compute == "F32" else 1e-3)


def test_rows_encoded_apart_assemble_to_the_whole():
    form, w = StandardBlocks(4), gaussian(12, 96)
    pieces = [form.by_rows.encode("w", piece) for piece in (w[:5], w[5:])]
    assembled = form.assemble("w", {part: torch.cat([piece[part] for piece in pieces]) for part in pieces[0]})
    for part, tensor in form.encode("w", w).items():
        assert torch.equal(tensor, assembled[part])
