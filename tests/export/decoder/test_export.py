"""Exported graphs against transformers' own models, in ONNX Runtime."""

import json

import numpy as np
import onnx
import pytest
import torch

from qlora_tools.checkpoint.folder import output_folder
from qlora_tools.errors import IncompatibleError, MissingError, NonFiniteError, UnsupportedError
from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.runtime import DecoderSession
from qlora_tools.export.target import Target
from tests.export.tiny_decoders import build, carry, export, relative_error, tokens

MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-grouping": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-sizes": (
        "llama",
        {"hidden_size": 57, "intermediate_size": 75, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 101},
    ),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "llama-3.1-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2-window-above-first-layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied-biased": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
}
PROMPT, STEPS = 11, 3


def run(folder, ids_BT):
    """Logits [B, prompt + 1 + steps, V]: prompt scored at once, then prompt and single steps over a shared past."""
    session = DecoderSession(folder, threads=1)
    pieces = [session.score(ids_BT[:, :PROMPT]), session.prefill(ids_BT[:, :PROMPT])[:, None]]
    pieces += [session.decode(ids_BT[:, step])[:, None] for step in range(PROMPT, PROMPT + STEPS)]
    session.close()
    return np.concatenate(pieces, axis=1)


def expected(tiny, ids_BT):
    logits = tiny.logits(ids_BT)
    return np.concatenate([logits[:, :PROMPT], logits[:, PROMPT - 1 :]], axis=1)


@pytest.mark.parametrize("name", MODELS)
def test_fp32_graph_computes_what_transformers_computes(name, tmp_path):
    family, changes = MODELS[name]
    tiny = build(family, **changes)
    export(tiny, tmp_path)
    ids = tokens(tiny, 2, PROMPT + STEPS)
    np.testing.assert_allclose(run(tmp_path, ids), expected(tiny, ids), atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama-tied", "llama-odd-sizes", "qwen2", "qwen3-tied-biased"])
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
    with pytest.raises(UnsupportedError, match="provider `cuda`"):
        plan_export(tiny.source, tiny.config, "int8", Target("cuda", "F16"))


def test_a_head_size_that_the_attention_operator_does_not_take_is_refused():
    tiny = build("llama", head_dim=24)
    with pytest.raises(UnsupportedError, match="heads of 24"):
        plan_export(tiny.source, tiny.config, "fp32")


def test_a_head_the_source_holds_is_exported_even_if_the_config_ties(tmp_path):
    tiny = build("llama")
    planned = plan_export(tiny.source, {**tiny.config, "tie_word_embeddings": True}, "fp32")
    assert not planned.decoder.tied
    write_graph(planned, tiny.source, tmp_path)
    ids = tokens(tiny, 1, PROMPT)
    np.testing.assert_allclose(DecoderSession(tmp_path, threads=1).score(ids), tiny.logits(ids), atol=3e-4, rtol=3e-4)


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
