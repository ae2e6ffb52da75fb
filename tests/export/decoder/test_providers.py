"""Decoders drawn for CUDA and in plain ONNX. CUDA's fp16 graphs run on the CPU too, slowly; bf16 ones are checked by their twins."""

import json
from collections import Counter

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import CheckFailed, NonFiniteError
from qlora_tools.export.bounds import BOUNDS, bound_of
from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.decoder.genai import write_genai_config
from qlora_tools.export.decoder.graph import DATA_FILE
from qlora_tools.export.decoder.parity import check_parity
from qlora_tools.export.external import place, read_stored
from qlora_tools.export.runtime import DecoderSession
from qlora_tools.export.runtime.description import describe
from qlora_tools.export.schemes import scheme_of, target_for
from qlora_tools.export.target import Target
from tests.export.decoder.test_export import MODELS as FAMILIES
from tests.export.tiny_decoders import build, carry, export, relative_error, tokens

F16, BF16 = Target("cuda", "F16"), Target("cuda", "BF16")
PLAIN = Target("cpu", "F32", standard=True)
MODELS = {
    "llama-untied": ("llama", {}),
    "qwen2-tied-biased-odd-vocabulary": ("qwen2", {"tie_word_embeddings": True, "vocab_size": 101}),
    "qwen3-head-norms": ("qwen3", {"head_dim": 16}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
}
PROMPT, STEPS = 11, 3


def run(folder, ids_BT):
    session = DecoderSession(folder, threads=1)
    pieces = [session.score(ids_BT[:, :PROMPT]), session.prefill(ids_BT[:, :PROMPT])[:, None]]
    pieces += [session.decode(ids_BT[:, step])[:, None] for step in range(PROMPT, PROMPT + STEPS)]
    session.close()
    return np.concatenate(pieces, axis=1).astype(np.float32)


def expected(tiny, ids_BT):
    logits = tiny.logits(ids_BT)
    return np.concatenate([logits[:, :PROMPT], logits[:, PROMPT - 1 :]], axis=1)


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_fp16_graphs_for_cuda_compute_with_the_weights_they_carry(name, scheme, tmp_path):
    family, changes = MODELS[name]
    tiny = build(family, **changes)
    planned = export(tiny, tmp_path, scheme, F16)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    assert relative_error(run(tmp_path, ids), expected(carry(tiny, planned), ids)) < 0.01


@pytest.mark.parametrize("scheme", ["bf16", "int8", "int4", "nf4"])
def test_bf16_graphs_pass_parity_by_their_twins(scheme, tmp_path):
    tiny = build("qwen2", tie_word_embeddings=True, vocab_size=101)
    planned = export(tiny, tmp_path, scheme, BF16)
    parity = check_parity(planned, tiny.source, tiny.config, tmp_path)
    assert parity.error_carried < 0.02 and parity.elsewhere == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["genai_config.json", "model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_plain_onnx_computes_with_the_weights_it_carries(name, scheme, tmp_path):
    family, changes = MODELS[name]
    tiny = build(family, **changes)
    planned = export(tiny, tmp_path, scheme, PLAIN)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    assert relative_error(run(tmp_path, ids), expected(carry(tiny, planned), ids)) < (1e-5 if scheme == "fp32" else 0.04)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 23} and model.ir_version == 11
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


def test_plain_onnx_and_onnxruntimes_own_operators_agree(tmp_path):
    tiny = build("llama", spread=4.0)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    found = {}
    for target in (PLAIN, Target()):
        folder = tmp_path / str(target.standard)
        folder.mkdir()
        export(tiny, folder, "int4", target)
        found[target] = run(folder, ids)
    assert relative_error(found[PLAIN], found[Target()]) < 0.03  # the embedding is the only weight they carry differently


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_every_product_of_plain_onnx_fuses(scheme, tmp_path):
    tiny = build("llama")
    planned = export(tiny, tmp_path, scheme, PLAIN)
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "fused.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph.node)
    products = len(list(planned.layout.matrices())) - 1  # all but the embedding
    assert kinds["MatMulNBits"] == products and not kinds["DequantizeLinear"] and not kinds["MatMul"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_tied_table_of_plain_onnx_fuses_though_it_is_looked_up_too(scheme, tmp_path):
    export(build("llama", tie_word_embeddings=True), tmp_path, scheme, PLAIN)
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "fused.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph.node)
    assert not kinds["MatMul"] and kinds["DequantizeLinear"] == 1


def test_the_reference_evaluator_reads_a_plain_decoder_alike(tmp_path):
    tiny = build("qwen2", num_hidden_layers=1)
    planned = export(tiny, tmp_path, "int8", PLAIN)
    ids = tokens(tiny, 1, 5)
    past = np.zeros((1, 2, 0, 16), np.float32)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "past_key_values.0.key": past, "past_key_values.0.value": past}
    logits = onnx.reference.ReferenceEvaluator(onnx.load(tmp_path / "model.onnx")).run(["logits"], feeds | {"num_logits_to_keep": np.zeros(1, np.int64)})[0]
    assert relative_error(logits, carry(tiny, planned).logits(ids)) < 1e-4


def test_calibration_reaches_plain_onnx_the_way_it_reaches_the_operators(tmp_path):
    from qlora_tools.export.calibrated import Choice, Factors, encode_calibrated
    from qlora_tools.export.formats.format import Moments

    form = scheme_of("int4", PLAIN).linear("down", 16, 64)
    w, x = torch.randn(16, 64), torch.randn(200, 64) @ torch.randn(64, 64)
    moments = x.T @ x
    parts, choice = encode_calibrated(form.by_rows, "w", "w", w, Moments(moments, moments, Factors().of("m", moments)))
    assert isinstance(choice, Choice) and torch.equal(form.decode("w", form.assemble("w", parts), 64), form.by_rows.decode("w", parts, 64))


@pytest.mark.parametrize("compute", ["F16", "BF16"])
def test_nf4_hands_the_checkpoints_own_bytes_over(compute, llama, tmp_path):
    from qlora_tools.verbs.quantize import quantize

    quantize(model=llama, output=tmp_path / "nf4")
    checkpoint = open_checkpoint(tmp_path / "nf4")
    target = Target("cuda", compute)
    planned = plan_export(checkpoint, checkpoint.config, "nf4", target)
    (tmp_path / "out").mkdir()
    write_graph(planned, checkpoint, tmp_path / "out")
    offsets, specs = place(planned.plan.outputs)[0], {spec.name: spec for spec in planned.plan.outputs}
    taken = 0
    for matrix in planned.layout.matrices():
        if f"{matrix.name}.absmax" not in specs:
            continue
        stored = read_stored(tmp_path / "out" / DATA_FILE, specs[matrix.name], offsets[matrix.name], (0, matrix.total_rows))
        assert stored.numpy().tobytes() == b"".join(checkpoint.stored.read(f"{piece.module}.weight").numpy().tobytes() for piece in matrix.pieces)
        taken += len(matrix.pieces)
    assert taken == sum(item.spec.shape[1] % 64 == 0 for item in checkpoint.quantized.values()) > 0
    write_genai_config(planned, checkpoint.config, tmp_path / "out")
    assert check_parity(planned, checkpoint, checkpoint.config, tmp_path / "out").error_carried < 0.02


def test_a_weight_beyond_fp16_is_refused_under_its_own_name(tmp_path):
    for tensor, scheme in (("model.layers.1.mlp.down_proj.weight", "int4"), ("model.layers.0.input_layernorm.weight", "int8"), ("lm_head.weight", "fp16")):
        tiny = build("llama")
        tiny.source.tensors[tensor].view(-1)[7] = 7e4
        with pytest.raises(NonFiniteError, match=tensor) as caught:
            export(tiny, tmp_path, scheme, F16)
        assert "bf16" in caught.value.hint
        (tmp_path / DATA_FILE).unlink()
        export(tiny, tmp_path, "bf16" if scheme == "fp16" else scheme, BF16)
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.parametrize(("target", "logits", "caches"), [(F16, 10, 10), (BF16, 1, 16), (PLAIN, 1, 1)])
def test_inputs_and_outputs_have_the_targets_dtype(target, logits, caches, tmp_path):
    export(build("llama"), tmp_path, "int4", target)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert kinds["logits"] == logits and kinds["past_key_values.0.key"] == kinds["present.1.value"] == caches


def test_graphs_for_cuda_ask_for_no_newer_runtime_than_they_need(tmp_path):
    export(build("qwen3", head_dim=16), tmp_path, "int4", BF16)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert model.ir_version == 8 and {opset.domain: opset.version for opset in model.opset_import} == {"": 17, "com.microsoft": 1}


def test_what_switches_the_fast_kernels_on_lies_beside_the_graph(tmp_path):
    def written(scheme, target):
        folder = tmp_path / f"{scheme}{target.provider}{target.standard}"
        folder.mkdir()
        export(build("llama", num_hidden_layers=1), folder, scheme, target)
        content = json.loads((folder / "genai_config.json").read_text())
        taken = describe(folder)  # refuses what it does not take
        assert taken.session_options.keys() == content["model"]["decoder"]["session_options"].keys() - {"log_id", "provider_options"}
        return content["model"]["decoder"]["session_options"], content["search"]["past_present_share_buffer"]

    options, shared = written("int4", F16)
    assert shared and options["ep.cuda.fpa_intb_gemm"] == options["session.use_device_allocator_for_initializers"] == "1"
    assert options["provider_options"] == [{"cuda": {"enable_skip_layer_norm_strict_mode": "1"}}]
    assert all(isinstance(value, str) for row in options["provider_options"] for entry in row.values() for value in entry.values())
    assert "ep.cuda.fpa_intb_gemm" not in written("fp16", F16)[0]
    assert written("nf4", F16)[0]["provider_options"][0]["cuda"]["enable_cuda_graph"] == "0", "MatMulBnb4 is not to be replayed"
    assert written("int4", Target()) == ({"log_id": "onnxruntime-genai", "provider_options": []}, True)
    assert written("int8", F16)[0]["session.use_device_allocator_for_initializers"] == "1"
    assert written("int8", PLAIN)[1] is False


def test_cuda_graphs_are_held_to_closer_bounds_than_those_that_round_activations():
    for scheme in ("int8", "int4", "nf4"):
        assert bound_of(scheme_of(scheme, F16)).carried == BOUNDS["fp16"].carried
        assert bound_of(scheme_of(scheme, target_for(scheme, "cpu"))) == BOUNDS["int8" if scheme == "nf4" else scheme]


@pytest.mark.parametrize("name", ["gemma2", "gemma3-scaled-rope", "phi3-longrope-long", "gpt2", "olmo2", "starcoder2", "granite", "smollm3"])
def test_families_pass_parity_on_every_provider(name, tmp_path):
    family, changes = FAMILIES[name]
    tiny = build(family, **changes)
    for scheme, target, bound in (("int4", F16, 2e-3), ("bf16", BF16, 0.02), ("fp32", PLAIN, 1e-5)):
        folder = tmp_path / scheme
        folder.mkdir()
        planned = export(tiny, folder, scheme, target)
        assert check_parity(planned, tiny.source, tiny.config, folder).error_carried < bound


def test_activations_beyond_fp16_are_refused_for_fp16_only(tmp_path):
    tiny = build("llama", spread=2.0)
    tiny.source.tensors["model.layers.0.mlp.up_proj.weight"] *= 3e4
    tiny.source.tensors["model.layers.0.mlp.gate_proj.weight"] *= 100
    for target in (F16, BF16, Target()):
        folder = tmp_path / target.compute
        folder.mkdir()
        planned = export(tiny, folder, "int8", target)
        if target is F16:
            with pytest.raises(CheckFailed, match=r"activations of `model\.layers\.0\.mlp.*more than fp16 holds") as caught:
                check_parity(planned, tiny.source, tiny.config, folder)
            assert "bf16" in caught.value.hint
        else:
            check_parity(planned, tiny.source, tiny.config, folder)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["fp16", "bf16", "int8", "int4", "nf4"])
def test_graphs_for_cuda_run_there_with_every_node(scheme, tmp_path):
    tiny = build("llama", hidden_size=256, intermediate_size=512, vocab_size=512)
    planned = export(tiny, tmp_path, scheme, target_for(scheme, "cuda"))
    parity = check_parity(planned, tiny.source, tiny.config, tmp_path)
    assert parity.elsewhere == ()
