"""``qlt train --init``: from an adapter in a folder, and from what quantization loses as calibration text sees it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.manifest import sha256_file
from qlora_tools.quant.nf4 import NF4
from qlora_tools.verbs import train as verb
from qlora_tools.verbs.merging import RoundTripped
from tests.conftest import nudge
from tests.flows.training_material import build, without_estimate_and_picture, write_images, write_pairs

QUICK = ["--batch", 4, "--steps", 3, "--lr", 1e-3, "--max-len", 64]
STILL = ["--batch", 4, "--steps", 1, "--lr", 1e-30, "--max-len", 64]
NAME = "model.layers.0.self_attn.q_proj.weight"
TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. " * 40
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        without_estimate_and_picture(patch)
        yield


@pytest.fixture
def data(here):
    return write_pairs(here / "pairs.jsonl")


@pytest.fixture
def text(here):
    (here / "text.txt").write_text(TEXT)
    return here / "text.txt"


@pytest.fixture
def qera(qlt, here, llama, text):
    """A QERA adapter for ``llama`` in NF4."""
    assert qlt("init", "--base", llama, "--method", "qera", "--rank", 4, "--alpha", 8, "--calib", text, "-o", "qera").code == 0
    return here / "qera"


@pytest.fixture
def patterned(qlt, here, llama, tmp_path):
    """An extracted adapter of two ranks, with whole tensors beside its factors."""
    tensors = load_file(llama / "model.safetensors")
    also = {name: value * 1.5 for name, value in tensors.items() if name.endswith("input_layernorm.weight")}
    assert also
    tuned = nudge(llama, tmp_path / "tuned", also=also)
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--energy", 0.9, "--max-rank", 8, "-o", "patterned").code == 0
    return here / "patterned"


def stock(base, folder):
    """Logits of stock PEFT for the adapter on a dense base."""
    model = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        return model(torch.arange(20).view(1, -1)).logits


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rounded(folder):
    """The dense model with the weights that its NF4 form computes with."""
    checkpoint, model = open_checkpoint(folder), dense(folder)
    source = RoundTripped(checkpoint, NF4())
    model.load_state_dict({name: source.read(name).float() for name in checkpoint.specs}, strict=False)
    return model


def said(folder):
    return json.loads((folder / "qlt-manifest.json").read_text())


def test_a_correction_is_trained_on_and_merged_where_it_belongs(qlt, here, llama, data, qera):
    done = qlt("train", "--base", llama, "--data", data, "--init", qera, "--nf4", *QUICK, "-o", "out")
    assert done.code == 0, done.err
    before, after = load_file(qera / WEIGHTS), load_file(here / "out" / WEIGHTS)
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    config = json.loads((here / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    manifest = said(here / "out")
    assert manifest["inputs"]["start"] == {"name": "qera", "sha256": sha256_file(qera / WEIGHTS)}
    assert manifest["command"]["start"]["method"] == "qera" and manifest["command"]["rank"] == 4
    refused = qlt("merge", "--base", llama, "--adapter", "out", "--target", "original", "-o", "m")
    assert refused.code == 2 and "count twice" in refused.err
    assert qlt("merge", "--base", llama, "--adapter", "out", "--target", "trained", "-o", "m").code == 0
    with torch.no_grad():
        merged = dense(here / "m")(torch.arange(20).view(1, -1)).logits
    assert torch.allclose(merged, stock(rounded(llama), here / "out"), atol=2e-2)
    assert qlt("merge", "--base", llama, "--adapter", "out", "-o", "by-itself", "--json").json["target"] == "trained"


def test_a_correction_of_a_correction_stays_one(qlt, here, llama, data, qera):
    assert qlt("train", "--base", llama, "--data", data, "--init", qera, *STILL, "-o", "first").code == 0
    assert qlt("train", "--base", llama, "--data", data, "--init", "first", *STILL, "-o", "second").code == 0
    assert qlt("merge", "--base", llama, "--adapter", "second", "--target", "original", "-o", "m").code == 2


def test_no_training_changes_nothing(qlt, here, llama, data, patterned):
    """Ranks, scales and whole tensors of a start come out as they went in."""
    done = qlt("train", "--base", llama, "--data", data, "--init", patterned, "--bf16", *STILL, "-o", "out")
    assert done.code == 0, done.err
    before, after = load_file(patterned / WEIGHTS), load_file(here / "out" / WEIGHTS)
    assert before.keys() == after.keys() and any("layernorm" in key for key in before)
    assert len({value.shape[0] for key, value in before.items() if "lora_A" in key}) > 1
    assert all(torch.equal(before[key].to(torch.bfloat16), after[key].to(torch.bfloat16)) for key in before)
    assert torch.allclose(stock(dense(llama), patterned), stock(dense(llama), here / "out"), atol=2e-2)


@pytest.mark.parametrize("settings", [{"use_rslora": True, "lora_alpha": 5}, {"use_dora": True}, {"target_modules": ["q_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}], ids=str)  # fmt: skip
def test_an_adapter_of_stock_peft_keeps_its_form(qlt, here, llama, data, settings):
    torch.manual_seed(0)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings})
    get_peft_model(dense(llama), config).save_pretrained(here / "peft")
    done = qlt("train", "--base", llama, "--data", data, "--init", "peft", "--bf16", *STILL, "-o", "out")
    assert done.code == 0, done.err
    wanted, found = stock(dense(llama), here / "peft"), stock(dense(llama), here / "out")
    assert (wanted - stock(dense(llama), here / "out")).abs().max() < 0.02 * wanted.abs().max(), (wanted - found).abs().max()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--rank", 8], ("--rank 8", "rank 4")),
        (["--alpha", 5], ("--alpha 5", "alpha 8")),
        (["--rslora"], ("--rslora True", "rslora False")),
        (["--dora"], ("--dora True", "dora False")),
        (["--targets", "qkv"], ("--targets qkv (6 layers)", "14 layers")),
        (["--rank-pattern", "layers.0=2"], ("--rank-pattern with 2", "has 4")),
        (["--int8"], ("--int8", "nf4")),
        (["--rank-budget", 3], ("--rank-budget", "ranks")),
        (["--calib", "text.txt"], ("--calib", "--init qera")),
    ],
    ids=lambda words: words[0],
)
def test_what_contradicts_the_adapter_is_refused_with_both_values(qlt, here, llama, data, qera, words, named):
    done = qlt("train", "--base", llama, "--data", data, "--init", qera, *QUICK, *words, "-o", "out")
    assert done.code == 2 and all(word in done.err for word in named), done.err
    assert not (here / "out").exists() and not (here / "out.run").exists()


def test_what_agrees_with_the_adapter_is_taken(qlt, here, llama, data, qera):
    words = ["--rank", 4, "--alpha", 8, "--targets", "all", "--nf4", "--no-dora"]
    assert qlt("train", "--base", llama, "--data", data, "--init", qera, *QUICK, *words, "-o", "out").code == 0


def test_another_base_is_refused(qlt, here, llama, data, qera, tmp_path):
    other = nudge(llama, tmp_path / "other")
    done = qlt("train", "--base", other, "--data", data, "--init", qera, *QUICK, "-o", "out")
    assert done.code != 0 and "made for another base" in done.err and not (here / "out.run").exists()


def test_a_pissa_start_trains_on_what_is_left_of_the_base_alone(qlt, here, llama, data):
    assert qlt("init", "--base", llama, "--method", "pissa", "--rank", 8, "-o", "leading", "--residual", "rest").code == 0
    refused = qlt("train", "--base", llama, "--data", data, "--init", "leading", *QUICK, "-o", "out")
    assert refused.code != 0 and "pissa" in refused.err and "--residual" in refused.err
    assert qlt("train", "--base", "rest", "--data", data, "--init", "leading", *QUICK, "-o", "out").code == 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_inside_the_weights_of_stock_peft_is_refused_with_the_way_out(qlt, here, llama, data, init):
    get_peft_model(dense(llama), LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=init)).save_pretrained(here / "peft")
    done = qlt("train", "--base", llama, "--data", data, "--init", "peft", *QUICK, "-o", "out")
    assert done.code != 0 and f"began with {init}" in done.err and "qlt import" in done.err


def test_token_rows_are_refused_by_name(qlt, here, llama, data):
    config = LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    get_peft_model(dense(llama), config).save_pretrained(here / "peft")
    done = qlt("train", "--base", llama, "--data", data, "--init", "peft", *QUICK, "-o", "out")
    assert done.code != 0 and "embed_tokens" in done.err and "qlt merge" in done.err


def interrupted(qlt, monkeypatch, *words):
    """Start a run and stop it after its first checkpoint."""
    run_loop = verb.run_loop

    def stop(run, progress):
        steps, run.steps = run.steps, 2
        run_loop(run, progress)
        run.steps = steps
        return "interrupted"

    monkeypatch.setattr(verb, "run_loop", stop)
    assert qlt("train", *words).code == 130
    monkeypatch.setattr(verb, "run_loop", run_loop)


def test_a_run_goes_on_from_the_same_adapter_alone(qlt, here, llama, data, qera, monkeypatch):
    interrupted(qlt, monkeypatch, "--base", llama, "--data", data, "--init", qera, *QUICK, "--save-every", 1, "-o", "out")
    assert json.loads((here / "out.run/run.json").read_text())["identity"]["config"]["start_sha256"] == sha256_file(qera / WEIGHTS)
    kept = (qera / WEIGHTS).read_bytes()
    changed = bytearray(kept)
    changed[-1] ^= 1
    (qera / WEIGHTS).write_bytes(bytes(changed))
    refused = qlt("train", "--resume", "-o", "out")
    assert refused.code != 0 and "start_sha256" in refused.err
    (qera / WEIGHTS).write_bytes(kept)
    done = qlt("train", "--resume", "-o", "out")
    assert done.code == 0, done.err
    assert said(here / "out")["inputs"]["start"]["name"] == "qera"


def test_a_recipe_keeps_the_adapter_and_not_its_form(qlt, here, llama, data, qera):
    assert qlt("train", "--base", llama, "--data", data, "--init", qera, *QUICK, "--save-config", "r.toml", "--dry-run", "-o", "out").code == 0
    recipe = (here / "r.toml").read_text()
    assert "qera" in recipe and "rank" not in recipe.replace("start-rank", "")
    assert qlt("train", "--config", "r.toml", "-o", "out").code == 0


def test_init_qera_starts_nearer_to_the_outputs_of_the_base(qlt, here, llama, data, text):
    for init, words in (("qera", ["--calib", text]), ("loftq", [])):
        done = qlt("train", "--base", llama, "--data", data, "--init", init, *words, "--rank", 8, *STILL, "-o", init)
        assert done.code == 0, done.err
    assert qlt("init", "--base", llama, "--method", "qera", "--rank", 8, "--alpha", 16, "--calib", text, "-o", "made").code == 0
    trained, made, plain = (load_file(here / name / WEIGHTS) for name in ("qera", "made", "loftq"))

    def product(tensors):
        return next(value.float() for key, value in tensors.items() if f"{NAME.removesuffix('.weight')}.lora_B" in key) @ next(
            value.float() for key, value in tensors.items() if f"{NAME.removesuffix('.weight')}.lora_A" in key
        )

    assert (product(trained) - product(made)).norm() < 0.05 * product(made).norm()
    assert (product(plain) - product(made)).norm() > 0.05 * product(made).norm()
    assert qlt("merge", "--base", llama, "--adapter", "qera", "--target", "original", "-o", "m").code == 2


def test_init_qera_without_a_text_is_refused(qlt, here, llama, data):
    done = qlt("train", "--base", llama, "--data", data, "--init", "qera", *QUICK, "-o", "out")
    assert done.code == 2 and "--calib" in done.err


def test_a_folder_with_the_name_of_a_start_is_told_apart_by_its_path(qlt, here, llama, data, qera):
    assert qlt("train", "--base", llama, "--data", data, "--init", "qera", *QUICK, "-o", "out").code == 2
    assert qlt("train", "--base", llama, "--data", data, "--init", "./qera", *QUICK, "-o", "out").code == 0


def test_a_trained_head_is_trained_on(qlt, here, data, tmp_path):
    """The head that a task trains whole begins where the adapter has it."""
    images, base = write_images(tmp_path / "images"), build("resnet", tmp_path / "resnet")
    words = ["--base", base, "--data", images, "--rank", 4, "--batch", 4, "--lr", 5e-3]
    assert qlt("train", *words, "--steps", 6, "-o", "first").code == 0
    done = qlt("train", *words[:4], "--batch", 4, "--steps", 1, "--lr", 1e-30, "--init", "first", "-o", "second")
    assert done.code == 0, done.err
    before, after = load_file(here / "first" / WEIGHTS), load_file(here / "second" / WEIGHTS)
    assert before.keys() == after.keys() and any("classifier" in key for key in before)
    assert all(torch.allclose(before[key].float(), after[key].float(), rtol=0, atol=1e-12) for key in before)
