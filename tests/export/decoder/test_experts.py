"""Mixtures of experts: exported graphs against transformers' own models, in ONNX Runtime."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from qlora_tools.checkpoint.folder import output_folder
from qlora_tools.engine import plan as plans
from qlora_tools.errors import CheckFailed, IncompatibleError, MissingError, NonFiniteError
from qlora_tools.export.decoder import mixture as mixtures
from qlora_tools.export.decoder import parity
from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.decoder.genai import provider_options
from qlora_tools.export.decoder.parity import check_parity
from qlora_tools.export.decoder.stacked import separate_experts
from qlora_tools.export.external import place
from qlora_tools.export.target import Target
from tests.export.decoder.test_export import PROMPT, STEPS, expected, run
from tests.export.mixtures import MIXTURES, mixture, separated
from tests.export.tiny_decoders import carry, export, tokens

EXPERT = "model.layers.1.block_sparse_moe.experts.2"


def kinds(folder):
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def errors(found, wanted):
    """Relative error of each position."""
    found, wanted = (logits - logits.mean(-1, keepdims=True) for logits in (found, wanted))
    return np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


@pytest.mark.parametrize("name", MIXTURES)
def test_fp32_graph_computes_what_transformers_computes(name, tmp_path):
    tiny = mixture(name)
    export(tiny, tmp_path)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    np.testing.assert_allclose(run(tmp_path, ids), expected(tiny, ids), atol=3e-4, rtol=3e-4)
    assert kinds(tmp_path)["MoE"] == (1 if name == "qwen3-moe" else 2)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_quantized_graph_computes_with_the_weights_it_carries(name, scheme, tmp_path):
    """Where experts score alike, rounding sends a token to another one; that is seldom, and elsewhere the graphs agree."""
    tiny = mixture(name)
    planned = export(tiny, tmp_path, scheme)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    found = errors(run(tmp_path, ids), expected(carry(tiny, planned), ids))
    assert np.median(found) < 0.03 and found.max() < 0.4
    assert bool(kinds(tmp_path)["QMoE"]) == (name != "mixtral-odd-sizes")
    assert np.median(errors(run(tmp_path, ids), expected(tiny, ids))) < {"int8": 0.06, "int4": 0.5}[scheme]


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_experts_one_by_one_compute_what_one_node_computes(name, scheme, tmp_path, monkeypatch):
    tiny = mixture(name)
    ids, found = tokens(tiny, 2, PROMPT + STEPS), []
    for joint in (True, False):
        monkeypatch.setattr(mixtures, "has_one_node", lambda *_, joint=joint: joint)
        folder = tmp_path / str(joint)
        folder.mkdir()
        export(tiny, folder, scheme)
        assert bool(kinds(folder)["ScatterND"]) != joint and bool(kinds(folder)["MoE"] + kinds(folder)["QMoE"]) == joint
        found.append(run(folder, ids))
    assert np.median(errors(*found)) < (1e-5 if scheme == "fp32" else 0.03)


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_plain_onnx_has_experts_one_by_one(scheme, tmp_path):
    tiny = mixture("qwen2-moe")
    planned = export(tiny, tmp_path, scheme, Target(standard=True))
    assert [len(layer.feed.experts) for layer in planned.layout.layers] == [4, 4] and not any(matrix.joint for matrix in planned.layout.matrices())
    ids = tokens(tiny, 2, PROMPT + STEPS)
    assert np.median(errors(run(tmp_path, ids), expected(carry(tiny, planned), ids))) < (1e-5 if scheme == "fp32" else 0.04)


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("inner", [64, 96])
def test_graphs_for_cuda_take_blocks_of_64_where_sizes_allow(inner, scheme, tmp_path):
    """In fp16, which the CPU computes too. Blocks that are too small for CUDA's node leave experts one by one."""
    tiny = mixture("qwen2-moe", moe_intermediate_size=inner)
    planned = export(tiny, tmp_path, scheme, Target("cuda", "F16"))
    found = check_parity(planned, tiny.source, tiny.config, tmp_path)
    assert found.error_carried < 0.06
    assert bool(kinds(tmp_path)["ScatterND"]) == (inner == 96 and scheme != "fp16")
    (options,) = provider_options(planned)
    uncaptured = scheme == "nf4" or (inner == 96 and scheme != "fp16")  # rows picked on the host, and MatMulBnb4's own reasons
    assert (options["cuda"].get("enable_cuda_graph") == "0") == uncaptured
    for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node:
        if node.op_type == "QMoE":
            options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            assert (options["block_size"], options["weights_prepacked"], options["swiglu_fusion"]) == (64, 0, 1)


@pytest.mark.parametrize("name", MIXTURES)
def test_checkpoints_of_both_forms_give_the_same_bytes(name, tmp_path):
    stacked = mixture(name)
    contents = []
    for form in (stacked, separated(stacked)):
        folder = tmp_path / str(len(contents))
        folder.mkdir()
        export(form, folder, "int4")
        contents.append([(folder / file).read_bytes() for file in ("model.onnx", "model.onnx.data")])
    assert contents[0] == contents[1]


def test_one_expert_is_read_at_a_time():
    for tiny in (mixture("mixtral"), separated(mixture("mixtral"))):
        largest = 0

        class Watched:
            specs = tiny.source.specs

            def read(self, name, rows=None, tiny=tiny):
                nonlocal largest
                found = tiny.source.read(name, rows)
                largest = max(largest, found.numel() if "experts" in name else 0)
                return found

        planned = plan_export(Watched(), tiny.config, "int4")
        source = separate_experts(Watched(), planned.decoder)
        for unit in planned.plan.units:
            for read in unit.reads:
                source.read(read.name, read.rows)
        assert 0 < largest <= 2 * 96 * 64


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_tiles_change_no_byte(scheme, tmp_path, monkeypatch):
    tiny, contents = mixture("mixtral"), []
    for tile_bytes in (1 << 30, 5_000):
        monkeypatch.setattr(plans.row_tiles, "__defaults__", (tile_bytes, 1))
        folder = tmp_path / str(tile_bytes)
        folder.mkdir()
        export(tiny, folder, scheme)
        contents.append((folder / "model.onnx.data").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_an_expert_that_nobody_chooses_does_no_harm(scheme, joint, tmp_path, monkeypatch):
    monkeypatch.setattr(mixtures, "has_one_node", lambda *_: joint)
    tiny = mixture("mixtral", num_local_experts=5)
    for layer in range(2):  # whatever the token, two experts score above expert 1, which always scores 0
        router = dict(tiny.model.named_parameters())[f"model.layers.{layer}.mlp.gate.weight"]
        router.copy_(torch.stack([router[0] * share for share in (1, 0, -1, 2, -2)]))
        tiny.source.tensors[f"model.layers.{layer}.mlp.gate.weight"].copy_(router)
    planned = export(tiny, tmp_path, scheme)
    ids = tokens(tiny, 1, PROMPT + STEPS)
    found = run(tmp_path, ids)
    assert np.isfinite(found).all() and np.median(errors(found, expected(carry(tiny, planned), ids))) < 0.03


def test_where_scores_tie_any_of_the_tied_experts_is_right(tmp_path):
    tiny = mixture("mixtral")
    for name in list(tiny.source.tensors):
        parameter = dict(tiny.model.named_parameters())[name]
        if "experts" in name:  # experts are all alike, so it cannot matter which is taken
            parameter.copy_(parameter[:1].expand_as(parameter))
        elif "mlp.gate" in name:
            parameter.zero_()
        tiny.source.tensors[name].copy_(parameter)
    export(tiny, tmp_path)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    np.testing.assert_allclose(run(tmp_path, ids), expected(tiny, ids), atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("joint", [True, False])
def test_a_token_does_not_depend_on_its_company(joint, tmp_path, monkeypatch):
    monkeypatch.setattr(mixtures, "has_one_node", lambda *_: joint)
    tiny = mixture("qwen2-moe")
    export(tiny, tmp_path)
    ids = tokens(tiny, 3, PROMPT + STEPS)
    together = run(tmp_path, ids)
    for row in range(3):
        np.testing.assert_allclose(run(tmp_path, ids[row : row + 1])[0], together[row], atol=2e-5, rtol=2e-5)


def test_routers_stay_in_floats():
    planned = plan_export(mixture("qwen2-moe").source, mixture("qwen2-moe").config, "int4")
    dtypes = {spec.name: spec.dtype for spec in planned.plan.outputs}
    assert dtypes["layers.0.router"] == dtypes["layers.0.shared_scale"] == "F32" and dtypes["layers.0.shared.down"] == "U8"


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_right_export_passes_parity(name, scheme, tmp_path):
    tiny = mixture(name)
    found = check_parity(export(tiny, tmp_path, scheme), tiny.source, tiny.config, tmp_path)
    assert (found.layers, found.of_layers) == (2, 2) and (found.error_dense < 1e-5) == (scheme == "fp32")


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_a_large_mixture_is_checked_on_its_first_experts(scheme, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_LAYER_BYTES", 1)
    tiny = separated(mixture("mixtral"))
    planned = export(tiny, tmp_path, scheme)
    assert parity.truncated(planned)[0].experts.count == 2
    assert check_parity(planned, tiny.source, tiny.config, tmp_path).layers == 1


@pytest.mark.parametrize("part", ["layers.0.experts.gate_up", "layers.0.experts.down", "layers.0.router"])
def test_damaged_experts_fail_loudly(part, tmp_path):
    tiny = mixture("mixtral")
    planned = export(tiny, tmp_path, "fp32")
    spec = next(spec for spec in planned.plan.outputs if spec.name == part)
    with (tmp_path / "model.onnx.data").open("r+b") as stream:
        stream.seek(place(planned.plan.outputs)[0][part])
        block = stream.read(spec.nbytes)
        stream.seek(-spec.nbytes, 1)
        stream.write(np.frombuffer(block, np.float32)[::-1].tobytes())
    with pytest.raises(CheckFailed, match="parity"):
        check_parity(planned, tiny.source, tiny.config, tmp_path)


@pytest.mark.parametrize("weight", ["w1", "w2", "w3"])
@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_nan_in_an_expert_is_refused_by_name_and_leaves_nothing(scheme, weight, tmp_path):
    tiny = separated(mixture("mixtral"))
    tiny.source.tensors[f"{EXPERT}.{weight}.weight"][3, 4] = torch.nan
    planned = plan_export(tiny.source, tiny.config, scheme)
    with pytest.raises(NonFiniteError, match=rf"experts\.2\.{weight}\.weight"), output_folder(tmp_path / "out") as folder:
        write_graph(planned, tiny.source, folder)
    assert list(tmp_path.iterdir()) == []


def test_experts_that_are_missing_or_misshapen_are_found_before_a_byte_is_read():
    tiny = separated(mixture("mixtral"))
    tiny.source.tensors.pop(f"{EXPERT}.w3.weight")
    with pytest.raises(MissingError, match=r"experts\.2\.w3\.weight"):
        plan_export(tiny.source, tiny.config, "int8")
    tiny = mixture("mixtral")
    with pytest.raises(IncompatibleError, match=r"mlp.gate.weight` is \[4, 64\], config\.json makes it \[8, 64\]"):
        plan_export(tiny.source, {**tiny.config, "num_local_experts": 8}, "int8")


def test_weights_that_are_read_in_two_dtypes_are_woven_all_the_same(tmp_path):
    """A merged tensor comes in fp32, its unchanged neighbour as it is stored."""
    plain = separated(mixture("mixtral"))
    contents = []
    for wide in (False, True):
        tensors = {name: tensor.float() if wide and name.endswith("w3.weight") else tensor for name, tensor in plain.source.tensors.items()}
        folder = tmp_path / str(wide)
        folder.mkdir()
        planned = plan_export(plain.source, plain.config, "int4")
        write_graph(planned, type(plain.source)(tensors), folder)
        contents.append((folder / "model.onnx.data").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_the_file_holds_is_what_was_encoded(scheme, tmp_path):
    tiny = mixture("qwen2-moe")
    planned = export(tiny, tmp_path, scheme)
    found = [check_parity(planned, tiny.source, tiny.config, tmp_path, from_file=from_file) for from_file in (False, True)]
    assert found[0] == found[1]
