"""``qlt extract`` and ``qlt merge`` end to end: what PEFT loads, what is refused, what is remembered."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.manifest import read_manifest
from tests.conftest import build_llama, nudge
from tests.flows.conftest import files

ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "qlt-manifest.json"}
NAME = "model.layers.0.self_attn.q_proj.weight"


def weights(folder):
    return load_file(folder / "model.safetensors")


def altered(source, folder, change):
    """A copy of a model folder with its tensors changed by ``change(dict)``."""
    shutil.copytree(source, folder)
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def adapter(qlt, here, llama, tuned):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 6).code == 0
    return here / "adapters/tuned-r6"


def test_the_extracted_adapter_is_a_peft_folder_that_gives_the_tuned_model(adapter, llama, tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert files(adapter) == ADAPTER
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, base = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits for folder in (tuned, llama))
        found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), adapter)(ids).logits
    assert (found - expected).norm() < 0.15 * (base - expected).norm()


def test_extract_then_merge_gives_the_tuned_weights_back(qlt, here, adapter, llama, tuned):
    done = qlt("merge", "-o", "merged")
    assert done.code == 0 and "using base" in done.err and "adapters/tuned-r6" in done.err
    merged, target, base = open_checkpoint(here / "merged"), open_checkpoint(tuned), open_checkpoint(llama)
    for name in target.specs:
        wanted, start = target.read(name).float(), base.read(name).float()
        assert (merged.read(name).float() - wanted).norm() <= 0.15 * (wanted - start).norm() + 1e-6, name


def test_the_report_is_printed_stored_and_true(qlt, here, llama, tuned):
    done = qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 6, "--json")
    row = next(row for row in done.json["report"]["rows"] if row["name"] == NAME)
    delta = weights(tuned)[NAME].double() - weights(llama)[NAME].double()
    optimum = float((torch.linalg.svdvals(delta)[6:] ** 2).sum().sqrt() / delta.norm())
    assert row["certificate"]["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
    assert row["certificate"]["optimum"] == pytest.approx(optimum, abs=1e-4)
    assert row["certificate"]["optimum"] <= row["certificate"]["error"] <= row["certificate"]["optimum"] + 0.02
    assert read_manifest(here / "adapters/tuned-r6").base_tensors[NAME] == open_checkpoint(llama).sha256(NAME)


@pytest.mark.parametrize(
    "words",
    [
        ("--rank", "auto"),
        ("--energy", "0.9"),
        ("--max-bytes", "40kB"),
        ("--rank", "3", "--targets", "attn"),
        ("--rank", "2", "--targets", r"layers\.1\..*up_proj"),
    ],
)
def test_every_way_to_choose_ranks_and_targets_writes_an_adapter(qlt, here, llama, tuned, words):
    done = qlt("extract", "--base", llama, "--tuned", tuned, *words, "-o", "a", "--json")
    assert done.code == 0, done.err
    assert qlt("merge", "--base", llama, "--adapter", "a", "-o", "m").code == 0
    if "--max-bytes" in words:
        assert 0.7 * 40_000 < done.json["report"]["adapter_bytes"] <= 40_000


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--rank", "0"), 2, "rank 0"),
        (("--rank", "65"), 2, "65"),
        (("--rank", "many"), 2, "many"),
        (("--energy", "1.5"), 2, "1.5"),
        (("--targets", "q_prj"), 2, "q_prj"),
        (("--targets", "("), 2, "regular expression"),
        (("--max-bytes", "lots"), 2, "lots"),
        (("--rank", "4", "--energy", "0.5"), 2, "one of them"),
    ],
)
def test_senseless_choices_are_usage_errors(qlt, here, llama, tuned, words, code, text):
    done = qlt("extract", "--base", llama, "--tuned", tuned, *words)
    assert done.code == code and text in done.err and files(here) == set()


def test_models_of_different_shape_are_refused_with_every_tensor_named(qlt, here, llama, tmp_path):
    other = build_llama(tmp_path / "other", intermediate_size=80)
    done = qlt("extract", "--base", llama, "--tuned", other)
    assert done.code == 3 and "mlp.down_proj.weight" in done.err and "80" in done.err and "96" in done.err and files(here) == set()


def test_nothing_changed_is_refused(qlt, here, llama):
    done = qlt("extract", "--base", llama, "--tuned", llama)
    assert done.code == 3 and files(here) == set()


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_nan_is_named_with_its_tensor(qlt, here, llama, tuned, tmp_path, side):
    bad = altered(llama if side == "base" else tuned, tmp_path / "bad", lambda tensors: tensors[NAME].view(-1)[7].fill_(float("nan")))
    done = qlt("extract", "--base", bad if side == "base" else llama, "--tuned", bad if side == "tuned" else tuned)
    assert done.code == 6 and NAME in done.err and files(here) == set()


def test_changed_norms_and_embeddings_are_saved_and_merged_whole(qlt, here, llama, tuned, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] += 0.25
        tensors["model.embed_tokens.weight"] += 0.01

    other = altered(tuned, tmp_path / "other", change)
    done = qlt("extract", "--base", llama, "--tuned", other, "--json")
    assert sorted(done.json["report"]["saved_whole"]) == ["model.embed_tokens.weight", "model.norm.weight"]
    assert qlt("merge", "-o", "m").code == 0
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(weights(here / "m")[name], weights(other)[name])


def test_frozen_layers_are_left_out_and_counted(qlt, here, llama, tmp_path):
    half = nudge(llama, tmp_path / "half", only="layers.1.")
    done = qlt("extract", "--base", llama, "--tuned", half, "--rank", 4, "--json")
    assert done.json["report"]["frozen"] == 7 and len(done.json["report"]["rows"]) == 7
    assert not [name for name in load_file(here / "adapters/half-r4/adapter_model.safetensors") if "layers.0." in name]


def test_added_vocabulary_grows_the_merged_model(qlt, here, llama, tuned, tmp_path):
    def grow(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.full((3, 64), 0.5, dtype=torch.bfloat16)])

    grown = altered(tuned, tmp_path / "grown", grow)
    config = json.loads((grown / "config.json").read_text()) | {"vocab_size": 163}
    (grown / "config.json").write_text(json.dumps(config))
    done = qlt("extract", "--base", llama, "--tuned", grown)
    assert done.code == 0 and "resize_token_embeddings(163)" in done.err
    assert qlt("merge", "-o", "m").code == 0
    assert json.loads((here / "m/config.json").read_text())["vocab_size"] == 163
    assert torch.equal(weights(here / "m")["lm_head.weight"], weights(grown)["lm_head.weight"])


def test_a_wrong_base_is_refused_before_any_output(qlt, here, adapter, llama, tmp_path):
    other = build_llama(tmp_path / "other", seed=9)
    done = qlt("merge", "--base", other, "--adapter", adapter, "-o", "m")
    assert done.code == 3 and "hint:" in done.err and not (here / "m").exists()


def test_a_base_that_differs_in_one_late_tensor_is_refused_and_leaves_nothing(qlt, here, adapter, llama, tmp_path):
    other = altered(llama, tmp_path / "other", lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].add_(0.5))
    done = qlt("merge", "--base", other, "--adapter", adapter, "-o", "m")
    assert done.code == 3 and "model.layers.1.self_attn.v_proj.weight" in done.err and not list(here.glob(".m.*")) and not (here / "m").exists()


def test_adapter_keys_that_match_nothing_are_refused(qlt, here, adapter, llama, tmp_path):
    strange = shutil.copytree(adapter, tmp_path / "strange")
    tensors = load_file(strange / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(6, 64)
    save_file(tensors, strange / "adapter_model.safetensors")
    done = qlt("merge", "--base", llama, "--adapter", strange, "-o", "m")
    assert done.code == 3 and "layers.7.self_attn.q_proj" in done.err


def test_several_adapters_merge_with_their_weights(qlt, here, adapter, llama):
    assert qlt("merge", "--base", llama, "--adapter", f"{adapter}=0.5", "--adapter", f"{adapter}=0.25", "-o", "m").code == 0
    assert qlt("merge", "--base", llama, "--adapter", f"{adapter}=0.75", "-o", "n").code == 0
    assert torch.equal(weights(here / "m")[NAME], weights(here / "n")[NAME])


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_requantized_merge_is_what_quantizing_the_merge_gives(qlt, here, adapter, llama, scheme):
    done = qlt("merge", f"--{scheme}", "-o", "m", "--json")
    assert done.code == 0 and 0.9 < done.json["retention"]["retention"] < 1.1
    stored, exact = open_checkpoint(here / "m"), open_checkpoint(llama)
    assert stored.quantized.keys() == {name for name in exact.specs if "_proj" in name}


def test_the_original_of_a_quantized_base_is_not_at_hand(qlt, here, adapter, llama):
    qlt("quantize", llama, "-o", "base-nf4")
    done = qlt("merge", "--base", "base-nf4", "--adapter", adapter, "--target", "original", "-o", "m")
    assert done.code == 2 and "16-bit" in done.err
    assert qlt("merge", "--base", "base-nf4", "--adapter", adapter, "-o", "m").code == 0


def test_the_trained_target_simulates_the_quantized_base(qlt, here, adapter, llama):
    qlt("quantize", llama, "--nf4", "-o", "base-nf4")
    qlt("merge", "--base", "base-nf4", "--adapter", adapter, "-o", "a")
    qlt("merge", "--base", llama, "--adapter", adapter, "--target", "trained", "-o", "b")
    assert (here / "a/model.safetensors").read_bytes() == (here / "b/model.safetensors").read_bytes()


def test_an_empty_memory_names_the_flags(qlt, here):
    done = qlt("merge")
    assert done.code == 2 and "--base" in done.err


def test_dry_runs_write_nothing(qlt, here, llama, tuned, tmp_path):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--dry-run").code == 0
    assert files(here) == set() and not (here / ".qlt").exists()


def test_the_same_inputs_give_the_same_bytes(qlt, here, llama, tuned):
    qlt("extract", "--base", llama, "--tuned", tuned, "-o", "a")
    qlt("extract", "--base", llama, "--tuned", tuned, "-o", "b")
    assert all((here / "a" / name).read_bytes() == (here / "b" / name).read_bytes() for name in ADAPTER)
