"""Mixtures of experts through every verb: both forms in which checkpoints hold experts, and what each verb does with them."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from tests.conftest import nudge
from tests.flows.test_export_and_bench import distance, logits

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
}
IDS = torch.arange(3, 40)[None]


def save_mixtral(folder, *, stacked=False, **changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**{**SIZES, **changes}))
    for parameter in model.parameters():
        parameter.data *= 6 if parameter.ndim > 1 else 1
    model.to(torch.bfloat16).save_pretrained(folder, save_original_format=not stacked)
    return folder


def expected(folder, adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter))(IDS).logits.float().numpy()


@pytest.fixture
def mixtral(tmp_path):
    return save_mixtral(tmp_path / "mixtral")


@pytest.fixture
def tuned(mixtral, tmp_path):
    return nudge(mixtral, tmp_path / "tuned", only="experts.", rank=3)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_quantized_mixture_is_one_that_transformers_loads(qlt, tmp_path, stacked):
    folder = save_mixtral(tmp_path / "m", stacked=stacked)
    done = qlt("quantize", folder, "--nf4", "-o", tmp_path / "q")
    assert done.code == 0 and "8 linears to nf4" in done.out and "of experts and routers" in done.out
    assert distance(expected(tmp_path / "q"), expected(folder)) < 0.5
    written = open_checkpoint(tmp_path / "q")
    assert all(".self_attn." in name for name in written.quantized)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    again = json.loads(qlt("quantize", folder, "--nf4", "-o", tmp_path / "q2", "--json").out)
    assert again["bare_tensors"] == (2 * 3 if stacked else 2 * (1 + 3 * 4)) and again["bare_bytes"] == 2 * 2 * (4 * 64 + 4 * 3 * 64 * 96)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_a_lora_out_of_tuned_experts_is_one_that_peft_loads_and_merges_back(qlt, mixtral, tuned, tmp_path):
    assert qlt("extract", "--base", mixtral, "--tuned", tuned, "--rank", 3, "--targets", r"experts\.", "-o", tmp_path / "a").code == 0
    wanted, base = expected(tuned), expected(mixtral)
    assert distance(expected(mixtral, tmp_path / "a"), wanted) < 0.1 * distance(base, wanted)
    assert qlt("merge", "--base", mixtral, "--adapter", tmp_path / "a", "-o", tmp_path / "merged").code == 0
    assert distance(expected(tmp_path / "merged"), wanted) < 0.1 * distance(base, wanted)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_a_lora_of_experts_is_merged_on_the_way_into_the_graph(qlt, mixtral, tuned, tmp_path):
    assert qlt("extract", "--base", mixtral, "--tuned", tuned, "--rank", 3, "--targets", r"experts\.", "-o", tmp_path / "a").code == 0
    assert qlt("export", "--base", mixtral, "--adapter", tmp_path / "a", "--merge", "--fp32", "-o", tmp_path / "x").code == 0
    assert distance(logits(tmp_path / "x", IDS.numpy()), expected(mixtral, tmp_path / "a")) < 1e-3


def test_a_lora_of_experts_that_one_node_multiplies_cannot_be_kept_and_says_so(qlt, mixtral, tuned, tmp_path):
    assert qlt("extract", "--base", mixtral, "--tuned", tuned, "--rank", 3, "--targets", r"experts\.", "-o", tmp_path / "a").code == 0
    done = qlt("export", "--base", mixtral, "--adapters", tmp_path / "a", "--fp32", "-o", tmp_path / "x")
    assert done.code != 0 and "block_sparse_moe.experts.0.w1" in done.err and "merge it" in done.err and not (tmp_path / "x").exists()


def test_stacked_experts_cannot_become_a_lora_and_are_named(qlt, tmp_path):
    base, tuned = (save_mixtral(tmp_path / name, stacked=True) for name in ("b", "t"))
    from safetensors.torch import load_file, save_file

    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj"] += 0.1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    done = qlt("extract", "--base", base, "--tuned", tuned, "--rank", 4, "-o", tmp_path / "a")
    assert done.code != 0 and "model.layers.1.mlp.experts.down_proj" in done.err and "--drop" in done.err


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("stacked", [False, True])
def test_both_forms_are_exported_and_checked(qlt, tmp_path, stacked, scheme):
    folder = save_mixtral(tmp_path / "m", stacked=stacked)
    done = qlt("export", folder, f"--{scheme}", "-o", tmp_path / "x")
    assert done.code == 0 and "relative error" in done.out
    assert distance(logits(tmp_path / "x", IDS.numpy()), expected(folder)) < {"fp32": 1e-3, "int8": 0.4, "int4": 0.9}[scheme]
