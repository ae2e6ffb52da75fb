"""``qlt extract`` with weights, a quantized base in mind and distillation, and ``qlt init``, as a user would type them."""

from __future__ import annotations

import json

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.manifest import read_manifest
from tests.conftest import build_llama
from tests.flows.conftest import files

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "qlt-manifest.json"}


@pytest.fixture
def text(here):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "nobody", "looks"]
    chosen = torch.randint(len(words), (3000,), generator=torch.Generator().manual_seed(1)).tolist()
    (here / "text.txt").write_text(" ".join(words[number] for number in chosen))
    return here / "text.txt"


def test_weighted_extraction_calibrates_by_itself_and_says_what_it_used(qlt, here, llama, tuned, text):
    done = qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "--weight", "fisher", "--calib", text, "-o", "a", "--json")
    assert done.code == 0, done.err
    assert files(here / "a") == ADAPTER and done.json["report"]["weighted_total"]["error"] < 1
    manifest = read_manifest(here / "a")
    assert manifest.command["weight"] == "fisher" and manifest.inputs["calibration"]["name"] == "text.txt"
    assert not list(here.glob(".qlt-*"))


def test_statistics_of_base_or_tuned_serve_and_those_of_a_third_model_do_not(qlt, here, llama, tuned, text, tmp_path):
    other = build_llama(tmp_path / "other", seed=9, tokenizer=True)
    for model, code in ((llama, 0), (tuned, 0), (other, 3)):
        assert qlt("calibrate", model, "--data", text, "-o", f"{model.name}.safetensors").code == 0
        words = ("--rank", 4, "--weight", "input", "--calib", f"{model.name}.safetensors", "-o", f"a-{model.name}")
        assert qlt("extract", "--base", llama, "--tuned", tuned, *words).code == code
    done = qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "--weight", "fisher", "--calib", "base.safetensors")
    assert done.code == 3 and "--fisher" in done.err


def test_weights_without_text_are_refused_with_the_way_out(qlt, llama, tuned):
    done = qlt("extract", "--base", llama, "--tuned", tuned, "--weight", "input")
    assert done.code == 2 and "--calib" in done.err


def test_auto_measures_every_objective_and_takes_the_nearest(qlt, here, llama, tuned, text):
    done = qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "--for", "nf4", "--objective", "auto", "--text", text, "-o", "a", "--json")
    assert done.code == 0, done.err
    contenders = done.json["contenders"]
    assert sorted(contender["objective"] for contender in contenders) == ["delta", "split", "total"]
    assert [contender["kl"] for contender in contenders] == sorted(contender["kl"] for contender in contenders)
    manifest = read_manifest(here / "a")
    assert manifest.command["objective"] == done.json["objective"] == contenders[0]["objective"] and manifest.command["base_format"] == "nf4"
    assert files(here / "a") == ADAPTER and not list(here.glob(".qlt-*"))


def test_auto_without_text_takes_the_change(qlt, here, llama, tuned):
    done = qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "--for", "int4", "--objective", "auto", "-o", "a", "--json")
    assert done.code == 0 and done.json["objective"] == "delta" and done.json["contenders"] == []
    assert read_manifest(here / "a").command["base_format"] == "int4"


def test_a_base_that_is_quantized_already_is_no_base_for_another_format(qlt, llama, tuned):
    assert qlt("quantize", llama, "--nf4", "-o", "q").code == 0
    done = qlt("extract", "--base", "q", "--tuned", tuned, "--rank", 4, "--for", "int8")
    assert done.code == 3 and "--for" in done.err


def test_refine_improves_what_was_extracted_for_its_base(qlt, here, llama, tuned, text):
    done = qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 2, "--for", "nf4", "--refine", 8, "--text", text, "-o", "a", "--json")
    assert done.code == 0, done.err
    assert done.json["refined"]["end_kl"] <= done.json["refined"]["start_kl"] and files(here / "a") == ADAPTER
    assert read_manifest(here / "a").command["start"]["verb"] == "extract"


def test_refine_needs_text(qlt, llama, tuned):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--refine").code == 2


def test_dry_run_of_everything_writes_nothing(qlt, here, llama, tuned, text):
    words = ("--weight", "fisher", "--for", "nf4", "--objective", "auto", "--refine", 4, "--calib", text)
    done = qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, *words, "--dry-run")
    assert done.code == 0 and "to compare" in done.out and files(here) == {"text.txt"}
    done = qlt("init", "--base", llama, "--rank", 4, "--calib", text, "--dry-run")
    assert done.code == 0 and files(here) == {"text.txt"}


def delta_of(folder, base):
    """Dense ``scale B A`` of the first query, as PEFT computes it."""
    from safetensors.torch import load_file

    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    return config["lora_alpha"] / config["r"] * tensors[f"{prefix}B.weight"].float() @ tensors[f"{prefix}A.weight"].float()


NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("method", ["qera", "loftq"])
def test_init_mends_the_quantized_base_whatever_the_alpha(qlt, here, llama, text, method):
    from qlora_tools.quant.nf4 import NF4
    from qlora_tools.stages.extract_objective import held

    for alpha in (8, 32):
        done = qlt("init", "--base", llama, "--method", method, "--rank", 8, "--alpha", alpha, "--calib", text, "-o", f"a{alpha}", "--json")
        assert done.code == 0, done.err
        assert done.json["left"] < done.json["lost"] and done.json["weighed_left"] < 1
    w = open_checkpoint(llama).read(NAME)
    lost = w.float() - held(NF4(), NAME, w).float()
    small, large = delta_of(here / "a8", llama), delta_of(here / "a32", llama)
    assert (small - large).norm() < 0.02 * small.norm() and (lost - small).norm() < lost.norm()


def test_init_pissa_writes_the_base_it_belongs_to(qlt, here, llama):
    done = qlt("init", "--base", llama, "--method", "pissa", "--rank", 8, "-o", "a", "--residual", "rest", "--json")
    assert done.code == 0, done.err
    together = open_checkpoint(here / "rest").read(NAME).float() + delta_of(here / "a", llama)
    w = open_checkpoint(llama).read(NAME).float()
    assert (together - w).norm() < 0.01 * w.norm() and done.json["left"] < done.json["lost"]


def test_a_started_adapter_trains_in_stock_peft(qlt, here, llama, text):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert qlt("init", "--base", llama, "--rank", 4, "--calib", text, "-o", "a").code == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), here / "a", is_trainable=True)
    model(torch.arange(3, 40)[None], labels=torch.arange(3, 40)[None]).loss.backward()
    learning = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert learning and all(parameter.requires_grad and bool(parameter.grad.any()) for parameter in learning)


@pytest.mark.parametrize(
    ("words", "code"), [(("--method", "qera"), 2), (("--method", "loftq", "--residual", "rest"), 2), (("--method", "loftq", "--rank", 1000), 2)]
)
def test_init_refuses_what_it_cannot_do(qlt, here, llama, words, code):
    assert qlt("init", "--base", llama, *words).code == code and files(here) == set()
