"""Families whose weights lie otherwise than Llama's, with a LoRA, through the command line: fused linears, transposed ones, names without the body's prefix."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_tokenizer

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FAMILIES = {
    "phi3": ({"intermediate_size": 96, "num_key_value_heads": 2}, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], False),
    "gpt2": ({}, ["c_attn", "c_proj", "c_fc"], True),
}
IDS = np.arange(3, 30)[None]


def make(family, folder):
    """A random model of ``family`` in ``folder``/base and a LoRA on it in ``folder``/adapter; the logits of the two together."""
    import peft
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    changes, targets, inputs_first = FAMILIES[family]
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES, **TOKENS, **changes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim == 2 else 1.0)
    model.save_pretrained(folder / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=inputs_first)).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.1)
    tuned.save_pretrained(folder / "adapter")
    with torch.inference_mode():
        return tuned(torch.from_numpy(IDS)).logits.numpy()


def logits(folder, **given):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), **given}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_export_computes_what_base_and_adapter_compute(family, qlt, here):
    expected = make(family, here)
    assert (exported := qlt("export", "--base", "base", "--adapter", "adapter", "--merge", "--fp32", "-o", "fp32")).code == 0, exported.err
    np.testing.assert_allclose(logits(here / "fp32"), expected, atol=2e-4, rtol=1e-4)
    assert (exported := qlt("export", "--base", "base", "--adapter", "adapter", "--merge", "--int8", "-o", "int8")).code == 0, exported.err
    assert np.linalg.norm(logits(here / "int8") - expected) < 0.1 * np.linalg.norm(expected)


def test_a_checkpoint_without_the_bodys_prefix_takes_the_same_adapter(qlt, here):
    expected = make("gpt2", here)
    file = here / "base/model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert "h.0.attn.c_attn.weight" in tensors
    assert (exported := qlt("export", "--base", "base", "--adapter", "adapter", "--merge", "--fp32", "-o", "e")).code == 0, exported.err
    np.testing.assert_allclose(logits(here / "e"), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_is_kept_passes_its_own_parity_check(family, qlt, here):
    make(family, here)
    exported = qlt("export", "--base", "base", "--adapters", "adapter", "--int8", "-o", "e")
    assert exported.code == 0 and exported.out.count("relative error") == 2, exported.out + exported.err
    assert (here / "e/adapter.onnx_adapter").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_reads_the_inputs_of_fused_and_transposed_linears(family, qlt, here):
    make(family, here)
    write_tokenizer(here / "base", SIZES["vocab_size"])
    (here / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    exported = qlt("export", "base", "--int4", "--calib", "text.txt", "-o", "e")
    assert exported.code == 0 and "calibrated: output error of 9 weights" in exported.out, exported.out + exported.err


def test_a_head_that_is_not_where_the_family_says_stops_the_export_and_leaves_nothing(qlt, here):
    make("phi3", here)
    file = here / "base/model.safetensors"
    tensors = {name.replace("lm_head", "output"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    exported = qlt("export", "base", "--int8", "-o", "e")
    assert exported.code != 0 and "lm_head.weight" in exported.err and not (here / "e").exists()
