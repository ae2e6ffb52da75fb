"""Exported graphs against transformers' own models, in ONNX Runtime."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from qlora_tools.checkpoint.folder import output_folder
from qlora_tools.errors import IncompatibleError, MissingError, NonFiniteError, UnsupportedError
from qlora_tools.export.decoder import parity
from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.decoder.genai import write_genai_config
from qlora_tools.export.decoder.parity import check_parity
from qlora_tools.export.runtime.session import DecoderSession
from qlora_tools.export.target import Target
from tests.export.decoder.families import HALF, MODELS, PROMPT, STEPS, expected, run
from tests.export.tiny_decoders import MemorySource, build, carry, export, relative_error, tokens


def plan(tiny, scheme="fp32"):
    return plan_export(tiny.source, tiny.config, scheme)


@pytest.mark.parametrize("name", MODELS)
def test_fp32_graph_computes_what_transformers_computes(name, tmp_path):
    family, changes = MODELS[name]
    tiny = build(family, **changes)
    export(tiny, tmp_path)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    np.testing.assert_allclose(run(tmp_path, ids), expected(tiny, ids), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(
    "name",
    [
        *("llama-tied", "llama-odd-sizes", "qwen2", "qwen3-tied-biased", "phi3", "phi3-window", "gemma", "gemma2-window", "gemma3-window-tied"),
        *("smollm3", "olmo2", "granite-tied-biased", "starcoder2", "gpt2", "gpt2-narrow-heads"),
    ],
)
def test_quantized_graph_computes_with_exactly_the_weights_it_carries(name, scheme, tmp_path):
    family, changes = MODELS[name]
    tiny = build(family, **changes)
    planned = export(tiny, tmp_path, scheme)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    found = run(tmp_path, ids)
    assert relative_error(found, expected(carry(tiny, planned), ids)) < 0.03
    assert relative_error(found, expected(tiny, ids)) < {"int8": 0.05, "int4": 0.6}[scheme]


def test_int8_uses_the_two_digit_product_on_matrices_that_are_large_enough(tmp_path):
    tiny = build("llama", hidden_size=576, intermediate_size=1152, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3, spread=2.0)
    planned = export(tiny, tmp_path, "int8")
    ids = tokens(tiny, 1, PROMPT + STEPS)
    assert relative_error(run(tmp_path, ids), expected(carry(tiny, planned), ids)) < 0.02
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("MatMulNBits") == 2 and kinds.count("QGemm") == 5  # attention; gate, up, down in two groups of columns, head


def test_one_digit_halves_the_rows_of_the_product_and_is_less_exact(tmp_path):
    tiny = build("llama", hidden_size=576, intermediate_size=1152, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3, spread=2.0)
    ids = tokens(tiny, 1, PROMPT + STEPS)
    errors = {}
    for scheme in ("int8", "w8a8"):
        (tmp_path / scheme).mkdir()
        planned = export(tiny, tmp_path / scheme, scheme)
        errors[scheme] = relative_error(run(tmp_path / scheme, ids), expected(carry(tiny, planned), ids))
    kinds = {scheme: Counter(node.op_type for node in onnx.load(tmp_path / scheme / "model.onnx", load_external_data=False).graph.node) for scheme in errors}
    assert kinds["w8a8"]["QGemm"] > kinds["int8"]["QGemm"] and kinds["w8a8"]["MatMulNBits"] < kinds["int8"]["MatMulNBits"]  # attention's too
    assert kinds["w8a8"]["QuantizeLinear"] < kinds["int8"]["QuantizeLinear"]
    assert 2e-3 < errors["w8a8"] < 0.05, errors


def test_nf4_is_carried_as_int8_and_says_so():
    tiny = build("llama")
    planned = plan_export(tiny.source, tiny.config, "nf4")
    assert planned.scheme.carried == "int8" and "int8" in planned.scheme.note


def test_the_graph_is_small_and_asks_for_no_newer_runtime_than_it_needs(tmp_path):
    tiny = build("qwen3", head_dim=16)
    export(tiny, tmp_path, "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["genai_config.json", "model.onnx", "model.onnx.data"]
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert model.ir_version == 8 and {opset.domain: opset.version for opset in model.opset_import} == {"": 17, "com.microsoft": 1}
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert all({entry.key: entry.value for entry in tensor.external_data}["location"] == "model.onnx.data" for tensor in external)
    assert all(int({entry.key: entry.value for entry in tensor.external_data}["offset"]) % 4096 == 0 for tensor in external)
    assert max(len(tensor.raw_data) for tensor in model.graph.initializer) < 1024


def test_inputs_and_outputs_have_the_names_that_runtimes_look_for(tmp_path):
    tiny = build("llama")
    export(tiny, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    initialized = {tensor.name for tensor in graph.initializer}
    assert [value.name for value in graph.input if value.name not in initialized] == [
        "input_ids",
        "attention_mask",
        *[f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")],
    ]
    assert [value.name for value in graph.output] == ["logits", *[f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")]]


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_the_same_input_gives_the_same_bytes(scheme, tmp_path):
    tiny = build("llama", tie_word_embeddings=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export(tiny, tmp_path / name, scheme)
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_tied_table_is_stored_once(tmp_path):
    for scheme in ("fp32", "int8", "int4"):
        tied, untied = (build("llama", vocab_size=2048, tie_word_embeddings=tie) for tie in (True, False))
        small, large = (plan_export(tiny.source, tiny.config, scheme).file_bytes for tiny in (tied, untied))
        assert large - small > 2048 * 64 // 2
        names = [matrix.name for matrix in plan_export(tied.source, tied.config, scheme).layout.matrices()]
        assert names.count("head") == 1 and "embedding" not in names


def test_nan_in_a_weight_is_refused_by_name_and_leaves_nothing(tmp_path):
    tiny = build("llama")
    tiny.source.tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    for scheme in ("fp32", "int8", "int4"):
        planned = plan_export(tiny.source, tiny.config, scheme)
        with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"), output_folder(tmp_path / "out") as folder:
            write_graph(planned, tiny.source, folder)
        assert list(tmp_path.iterdir()) == []


def test_a_read_that_fails_halfway_leaves_nothing(tmp_path):
    tiny = build("llama")
    planned = plan_export(tiny.source, tiny.config, "int4")

    class Failing:
        specs = tiny.source.specs

        def read(self, name, rows=None):
            if name == "model.norm.weight":
                raise OSError("the disk went away")
            return tiny.source.read(name, rows)

    with pytest.raises(OSError, match="the disk went away"), output_folder(tmp_path / "out") as folder:
        write_graph(planned, Failing(), folder)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_misshapen_tensors_are_found_before_a_byte_is_read():
    tiny = build("llama")
    weight = tiny.source.tensors.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(MissingError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        plan_export(tiny.source, tiny.config, "int8")
    tiny.source.tensors["model.layers.0.mlp.up_proj.weight"] = weight[:5]
    with pytest.raises(IncompatibleError, match=r"is \[5, 64\], config\.json makes it \[96, 64\]"):
        plan_export(tiny.source, tiny.config, "int8")


def test_a_bias_that_the_config_denies_is_refused():
    tiny = build("llama", attention_bias=True)
    with pytest.raises(IncompatibleError, match=r"q_proj\.bias"):
        plan_export(tiny.source, {**tiny.config, "attention_bias": False}, "fp32")


def test_unknown_schemes_and_providers_are_refused():
    tiny = build("llama")
    with pytest.raises(UnsupportedError, match="no scheme `int2`"):
        plan_export(tiny.source, tiny.config, "int2")
    with pytest.raises(UnsupportedError, match="provider `vulkan`"):
        plan_export(tiny.source, tiny.config, "int8", Target("vulkan"))


def test_a_head_size_that_the_attention_operator_does_not_take_is_refused():
    with pytest.raises(UnsupportedError, match="heads of 24"):
        plan(build("llama", head_dim=24))
    with pytest.raises(UnsupportedError, match="heads of which 8 dimensions are rotated"):
        plan(build("phi3", rope_parameters=HALF))
    with pytest.raises(UnsupportedError, match="heads of 4 are not"):
        plan(build("gpt2", num_attention_heads=16))


@pytest.mark.parametrize(("family", "sizes"), [("llama", {"head_dim": 24}), ("phi3", {"rope_parameters": HALF}), ("gpt2", {"num_attention_heads": 16})])
def test_plain_onnx_takes_every_head_size(family, sizes, tmp_path):
    tiny = build(family, **sizes)
    planned = export(tiny, tmp_path, "int8", Target(standard=True))
    assert check_parity(planned, tiny.source, tiny.config, tmp_path).error_carried < 0.03


@pytest.mark.parametrize(("family", "feed"), [("phi3", ["gate", "up"]), ("gpt2", ["up"]), ("starcoder2", ["up"]), ("gemma2", ["gate", "up"])])
def test_large_matrices_of_every_storage_come_apart_as_the_format_wants(family, feed, tmp_path):
    sizes = {"hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
    sizes |= {} if family == "gpt2" else {"intermediate_size": 1024, "num_key_value_heads": 2}
    tiny = build(family, **sizes, **({"head_dim": 64} if family == "gemma2" else {}), spread=2.0)
    planned = export(tiny, tmp_path, "int8")
    layer = planned.layout.layers[0]
    assert [matrix.name for matrix in layer.feed.into] == [f"layers.0.{role}" for role in feed]
    assert family != "phi3" or {piece.module for matrix in layer.feed.into for piece in matrix.pieces} == {"model.layers.0.mlp.gate_up_proj"}
    ids = tokens(tiny, 1, PROMPT + STEPS)
    assert relative_error(run(tmp_path, ids), expected(carry(tiny, planned), ids)) < 0.02


@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_a_checkpoint_without_its_bodys_prefix_is_the_same_model(scheme, tmp_path):
    tiny = build("gpt2", tie_word_embeddings=True)
    outputs = []
    for prefix in ("transformer.", ""):
        tensors = {name.replace("transformer.", prefix): tensor for name, tensor in tiny.source.tensors.items()}
        tensors["h.0.attn.bias" if not prefix else "transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a mask that old checkpoints hold
        planned = plan_export(MemorySource(tensors), tiny.config, scheme)
        folder = tmp_path / (prefix or "bare")
        folder.mkdir()
        write_graph(planned, MemorySource(tensors), folder)
        write_genai_config(planned, tiny.config, folder)
        outputs.append(run(folder, tokens(tiny, 1, PROMPT + STEPS)))
        assert check_parity(planned, MemorySource(tensors), tiny.config, folder).error_carried < 0.05
    assert np.array_equal(*outputs)


@pytest.mark.parametrize(
    ("family", "scheme"), [("gpt2", "int4"), ("phi3", "int8"), ("gemma2", "int4"), ("gemma3_text", "int8"), ("olmo2", "int4"), ("smollm3", "int8")]
)
def test_parity_holds_for_families_of_other_shapes(family, scheme, tmp_path, monkeypatch):
    tiny = build(family, **({"head_dim": 16} if "gemma" in family else {}), num_hidden_layers=3, tie_word_embeddings=True)
    planned = export(tiny, tmp_path, scheme)
    assert check_parity(planned, tiny.source, tiny.config, tmp_path).layers == 3
    monkeypatch.setattr(parity, "_LAYER_BYTES", 1)
    monkeypatch.setattr(parity, "_VOCAB", 50)
    assert check_parity(planned, tiny.source, tiny.config, tmp_path).layers == 1


@pytest.mark.parametrize("extra", ["model.layers.1.self_attn.q_norm.weight", "lm_head.bias", "model.layers.0.mlp.shared.weight"])
def test_tensors_that_would_be_left_out_are_named(extra):
    tiny = build("llama")
    tiny.source.tensors[extra] = torch.ones(4)
    with pytest.raises(IncompatibleError, match=extra.replace(".", r"\.")):
        plan(tiny)
    tiny.source.tensors.pop(extra)
    tiny.source.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    plan(tiny)


def test_a_head_that_is_not_where_the_family_says_is_named():
    tiny = build("olmo2")
    tiny.source.tensors["output.weight"] = tiny.source.tensors.pop("lm_head.weight")
    with pytest.raises(MissingError, match=r"`lm_head\.weight` \[96, 64\]"):
        plan(tiny)


def test_norms_with_an_offset_are_stored_with_it(tmp_path):
    tiny = build("gemma", head_dim=16)
    planned = export(tiny, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    stored = next(onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "model.norm.weight")
    assert np.array_equal(stored, tiny.source.tensors["model.norm.weight"].float().numpy() + 1) and planned.decoder.norm.offset == 1


def test_a_head_the_source_holds_is_exported_even_if_the_config_ties(tmp_path):
    tiny = build("llama")
    planned = plan_export(tiny.source, {**tiny.config, "tie_word_embeddings": True}, "fp32")
    assert not planned.decoder.tied
    write_graph(planned, tiny.source, tmp_path)
    ids = tokens(tiny, 1, PROMPT)
    np.testing.assert_allclose(DecoderSession(tmp_path, threads=1).score(ids), tiny.logits(ids), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "named"), [("phi3", "phi3"), ("gpt2", "decoder"), ("olmo2", "decoder"), ("smollm3", "smollm3")])
def test_families_that_genai_does_not_know_by_name_are_plain_decoders_to_it(family, named, tmp_path):
    export(build(family), tmp_path)
    assert json.loads((tmp_path / "genai_config.json").read_text())["model"]["type"] == named


def test_genai_config_describes_the_graph(tmp_path):
    tiny = build("qwen2", num_hidden_layers=3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5], "temperature": 0.7, "do_sample": True}))
    export(tiny, tmp_path, "int8")
    found = json.loads((tmp_path / "genai_config.json").read_text())
    model, decoder = found["model"], found["model"]["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("qwen2", 96, 64)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (0, [1, 5], 2)
    assert (decoder["num_hidden_layers"], decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (3, 4, 2, 16)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    named = {value.name for value in [*graph.input, *graph.output]}
    for group in ("inputs", "outputs"):
        for pattern in decoder[group].values():
            assert pattern.replace("%d", "2") in named
    assert found["search"]["temperature"] == 0.7 and found["search"]["past_present_share_buffer"] and found["search"]["max_length"] == 64
