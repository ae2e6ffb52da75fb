"""``qlt merge --nf4|--int8``: what keeps the adapter, what is refused, what stock libraries load, and what PEFT's own merge does."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.manifest import FILE_NAME
from tests.conftest import nudge
from tests.flows.conftest import files

NAME = "model.layers.0.self_attn.q_proj.weight"
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 40


@pytest.fixture
def small(qlt, here, llama, tmp_path):
    """An adapter far below half a step of the NF4 grid."""
    assert qlt("extract", "--base", llama, "--tuned", nudge(llama, tmp_path / "small", scale=0.01), "--rank", 4, "-o", "small").code == 0
    return here / "small"


@pytest.fixture
def base_nf4(qlt, here, llama):
    assert qlt("quantize", llama, "--nf4", "-o", "base-nf4").code == 0
    return here / "base-nf4"


@pytest.fixture
def text(here):
    (here / "text.txt").write_text(TEXT)
    return here / "text.txt"


def kept_share(base, adapter, merged):
    """The projection of merged - base on what the adapter adds to one weight."""
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (next(value.float() for key, value in factors.items() if f"layers.0.self_attn.q_proj.lora_{side}" in key) for side in "AB")
    change = open_checkpoint(merged).read(NAME).float() - open_checkpoint(base).read(NAME).float()
    return float((change * (b @ a)).sum() / (b @ a).square().sum())


def test_an_nf4_base_keeps_its_scales_and_the_adapter_survives(qlt, here, base_nf4, small, text):
    done = qlt("merge", "--base", base_nf4, "--adapter", small, "--nf4", "-o", "m", "--json")
    assert done.code == 0 and done.json["method"] == "keep-grid" and done.json["target"] == "trained"
    assert 0.9 < done.json["retention"]["retention"] < 1.1 and done.json["retention"]["dead_zone"] < 0.2
    assert done.json["retention"]["retention"] == pytest.approx(1, abs=0.1) and min(row["retention"] for row in done.json["tensors"]) > 0.8
    assert 0.8 < kept_share(base_nf4, small, here / "m") < 1.1
    before, after = load_file(base_nf4 / "model.safetensors"), load_file(here / "m/model.safetensors")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(open_checkpoint(base_nf4).quantized)
    assert json.loads((here / "m/config.json").read_text())["quantization_config"] == json.loads((base_nf4 / "config.json").read_text())["quantization_config"]


def test_rounding_to_the_nearest_point_is_refused_unless_told_otherwise(qlt, here, base_nf4, small):
    words = ("merge", "--base", base_nf4, "--adapter", small, "--nf4", "--method", "requant", "-o", "m")
    refused = qlt(*words)
    assert refused.code == 1 and "would survive" in refused.err and "hint:" in refused.err and not (here / "m").exists()
    done = qlt(*words, "--anyway")
    assert done.code == 0 and "rounded away" in done.err and (here / "m").exists()


def test_int8_keeps_its_grid_too(qlt, here, llama, tmp_path):
    qlt("quantize", llama, "--int8", "-o", "base-int8")
    qlt("extract", "--base", llama, "--tuned", nudge(llama, tmp_path / "tiny", scale=0.002), "--rank", 4, "-o", "tiny", "--dtype", "F32")
    done = qlt("merge", "--base", "base-int8", "--adapter", "tiny", "--int8", "-o", "m", "--json")
    assert done.code == 0 and done.json["method"] == "keep-grid" and 0.9 < done.json["retention"]["retention"] < 1.1
    before, after = load_file(here / "base-int8/model.safetensors"), load_file(here / "m/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("SCB"))


def test_stock_transformers_loads_the_result(qlt, here, base_nf4, small):
    from transformers import AutoModelForCausalLM

    qlt("merge", "--base", base_nf4, "--adapter", small, "--nf4", "-o", "m")
    model = AutoModelForCausalLM.from_pretrained(here / "m", dtype=torch.float32)
    held = open_checkpoint(here / "m")
    layer = model.get_submodule(NAME.removesuffix(".weight"))
    from bitsandbytes.functional import dequantize_4bit

    assert torch.allclose(dequantize_4bit(layer.weight, layer.weight.quant_state).float(), held.read(NAME).float(), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_pefts_merge_into_a_4_bit_model_erases_what_keep_grid_keeps(qlt, here, base_nf4, small):
    """The comparison that this verb exists for: PEFT adds in dense and rounds to the nearest point of the same grid."""
    from bitsandbytes.functional import dequantize_4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    qlt("merge", "--base", base_nf4, "--adapter", small, "--nf4", "-o", "m")
    ours = kept_share(base_nf4, small, here / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_nf4, dtype=torch.float32), small).merge_and_unload()
    layer = merged.get_submodule(NAME.removesuffix(".weight"))
    factors = load_file(small / "adapter_model.safetensors")
    a, b = (next(value.float() for key, value in factors.items() if f"layers.0.self_attn.q_proj.lora_{side}" in key) for side in "AB")
    found = dequantize_4bit(layer.weight, layer.weight.quant_state).float() - open_checkpoint(base_nf4).read(NAME).float()
    theirs = float((found * (b @ a)).sum() / (b @ a).square().sum())
    assert theirs < 0.3 and ours > 0.8


def test_the_gain_kept_end_to_end_is_measured_on_a_text(qlt, here, base_nf4, small, text):
    done = qlt("merge", "--base", base_nf4, "--adapter", small, "--nf4", "-o", "m", "--text", text, "--json")
    gain = done.json["gain"]
    assert done.code == 0 and gain["text"] == "text.txt" and gain["n_tokens"] > 1000
    assert gain["ppl_merged"] == pytest.approx(gain["ppl_unmerged"], rel=0.05)


def test_calibration_measures_outputs(qlt, here, base_nf4, small, text):
    done = qlt("merge", "--base", base_nf4, "--adapter", small, "--nf4", "-o", "m", "--calib", text, "--json")
    assert done.code == 0 and 0.6 < done.json["retention"]["output_retention"] < 1.4
    fresh = qlt("merge", "--base", here.parent / "llama-none", "--adapter", small, "--nf4", "-o", "n", "--calib", text)
    assert fresh.code != 0 and files(here / "n") == set()


def test_what_was_lost_lies_beside_as_an_adapter(qlt, here, base_nf4, small):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = qlt("merge", "--base", base_nf4, "--adapter", small, "--nf4", "--method", "residual", "--branch-rank", 4, "-o", "m", "--json")
    assert done.code == 0 and files(here / "m-branch") == {"adapter_config.json", "adapter_model.safetensors", FILE_NAME}
    beside = qlt("merge", "--base", "m", "--adapter", "m-branch", "-o", "both")
    assert beside.code == 0

    def lost(folder):
        factors = load_file(small / "adapter_model.safetensors")
        a, b = (next(value.float() for key, value in factors.items() if f"layers.0.self_attn.q_proj.lora_{side}" in key) for side in "AB")
        return (open_checkpoint(folder).read(NAME).float() - open_checkpoint(base_nf4).read(NAME).float() - b @ a).norm()

    assert lost(here / "both") < 0.95 * lost(here / "m")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "m", dtype=torch.float32), here / "m-branch")


def test_an_adapter_that_corrects_a_quantized_base_is_not_put_on_the_original_one(qlt, here, llama, small):
    manifest = json.loads((small / FILE_NAME).read_text())
    manifest["command"] = {"verb": "init", "method": "loftq"}
    (small / FILE_NAME).write_text(json.dumps(manifest))
    refused = qlt("merge", "--base", llama, "--adapter", small, "--target", "original", "-o", "m")
    assert refused.code == 2 and "count twice" in refused.err
    done = qlt("merge", "--base", llama, "--adapter", small, "-o", "m", "--json")
    assert done.code == 0 and done.json["target"] == "trained"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "keep-grid"), "stored dense"),
        (("--heal", "3"), "nothing that could be healed"),
        (("--nf4", "--method", "keep-grid"), "no nf4 grid to keep"),
        (("--nf4", "--method", "residual", "--heal", "3"), "choose one"),
        (("--nf4", "--teacher", "x"), "--heal"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_before_a_read(qlt, here, llama, small, words, said):
    done = qlt("merge", "--base", llama, "--adapter", small, "-o", "m", *words)
    assert done.code == 2 and said in done.err and not (here / "m").exists()


@pytest.mark.parametrize("onto", ["original", "nf4"])
def test_healing_brings_the_rounded_model_nearer_to_the_teacher(qlt, here, llama, tmp_path, base_nf4, text, onto):
    tuned = nudge(llama, tmp_path / "tuned", scale=0.2)
    qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "-o", "adapter")
    base = llama if onto == "original" else base_nf4
    words = ("--nf4", "--heal", 12, "--heal-text", text, *(("--teacher", tuned) if onto == "original" else ()))
    done = qlt("merge", "--base", base, "--adapter", "adapter", *words, "-o", "m", "--json")
    assert done.code == 0, done.err
    healed = done.json["healed"]
    assert healed["end_kl"] <= healed["start_kl"] and healed["text"] == "text.txt"
    if onto == "nf4":
        before, after = load_file(base_nf4 / "model.safetensors"), load_file(here / "m/model.safetensors")
        assert torch.equal(before[f"{NAME}.absmax"], after[f"{NAME}.absmax"])
