"""``qlt train`` end to end: what it learns on every kind of base, and that what it writes is what it trained."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_tools.verbs import train as verb
from tests.conftest import build_llama
from tests.flows.conftest import files
from tests.flows.training_material import (
    adapter_bytes,
    build,
    untimed,
    without_estimate_and_picture,
    write_images,
    write_labelled,
    write_pairs,
)

OUTPUT = {"adapter_config.json", "adapter_model.safetensors", "loss.png", "metrics.jsonl", "qlt-manifest.json"}
RHYME = "round and round the ragged rock the ragged rascal ran\n"
SHORT = ["--rank", 4, "--batch", 4, "--steps", 3, "--lr", 1e-2, "--max-len", 64]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        without_estimate_and_picture(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("material")


@pytest.fixture(scope="module")
def loud(folder):
    """A Llama whose random head is wide enough to predict anything with certainty."""
    return build_llama(folder / "loud", tokenizer=True, initializer_range=0.25)


@pytest.fixture(scope="module")
def data(folder):
    return write_pairs(folder / "pairs.jsonl")


@pytest.fixture(scope="module")
def base_of(folder):
    """``base_of("gpt2")``: a tiny base, built once."""
    made = {}
    return lambda kind: made.setdefault(kind, None) or made.update({kind: build(kind, folder / kind)}) or made[kind]


@pytest.fixture
def live(monkeypatch):
    """The run in memory, once it is over."""
    seen = []

    def keep(*arguments):
        seen.append(prepare_run(*arguments))
        return seen[-1]

    prepare_run = verb.prepare_run
    monkeypatch.setattr(verb, "prepare_run", keep)
    return seen


def of_kind(path, kind):
    return [line for line in untimed(path / "metrics.jsonl") if line["event"] == kind]


# learning


@pytest.mark.parametrize("held", ["--nf4", "--int8", "--bf16"])
def test_a_toy_text_is_learnt_by_heart_on_every_kind_of_base(qlt, here, loud, held):
    (here / "rhyme.txt").write_text(RHYME * 8)
    words = ["--rank", 16, "--batch", 2, "--steps", 30, "--lr", 1e-2, "--max-len", 64, "-o", "out"]
    assert qlt("train", "--base", loud, "--data", "rhyme.txt", held, *words).code == 0
    losses = [line["loss"] for line in of_kind(here / "out", "step")]
    assert losses[0] > 5
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("words", [["--nf4"], ["--int8", "--dora"], ["--init", "pissa", "--checkpointing", "on"], ["--init", "loftq", "--pack"]], ids=str)
def test_gpt2_learns(qlt, here, base_of, data, words):
    assert qlt("train", "--base", base_of("gpt2"), "--data", data, *SHORT, "--steps", 12, *words, "-o", "out").code == 0
    losses = [line["loss"] for line in of_kind(here / "out", "step")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("words", [["--nf4"], ["--int8", "--rank-budget", 3], ["--checkpointing", "on", "--targets", "attn"]], ids=str)
def test_bert_learns_labels_and_its_new_head_is_written(qlt, here, base_of, folder, words):
    labelled = write_labelled(folder / "labelled.jsonl")
    made = qlt(
        "train", "--base", base_of("bert"), "--data", labelled, "--rank", 4, "--batch", 4, "--epochs", 3, "--val-share", 0.25, "--lr", 5e-3, *words, "-o", "out"
    )
    assert made.code == 0
    assert of_kind(here / "out", "evaluation")[-1]["accuracy"] == 1.0
    config = json.loads((here / "out/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert "base_model.model.classifier.weight" in load_file(here / "out/adapter_model.safetensors")
    assert json.loads((here / "out/qlt-manifest.json").read_text())["command"]["labels"] == ["neg", "pos"]


@pytest.mark.parametrize(("kind", "words"), [("vit", ["--nf4"]), ("resnet", ["--nf4"]), ("resnet", ["--int8", "--init", "pissa"])], ids=str)
def test_images_in_folders_are_told_apart(qlt, here, base_of, folder, kind, words):
    images = folder / "images" if (folder / "images").exists() else write_images(folder / "images")
    made = qlt(
        "train", "--base", base_of(kind), "--data", images, "--rank", 4, "--batch", 4, "--epochs", 3, "--val-share", 0.25, "--lr", 5e-3, *words, "-o", "out"
    )
    assert made.code == 0
    assert of_kind(here / "out", "evaluation")[-1]["accuracy"] == 1.0


def test_batch_norms_keep_the_statistics_of_the_base(qlt, here, base_of, folder, live):
    images = folder / "images" if (folder / "images").exists() else write_images(folder / "images")
    assert qlt("train", "--base", base_of("resnet"), "--data", images, *SHORT, "-o", "out").code == 0
    stored = load_file(base_of("resnet") / "model.safetensors")
    found = {name.removeprefix("base_model.model."): value for name, value in live[0].run.model.state_dict().items() if "running_" in name}
    assert found
    assert all(torch.equal(value, stored[name].to(value.dtype)) for name, value in found.items())


# what is written


@pytest.mark.parametrize(
    "words",
    [["--rank-pattern", "layers.0=2"], ["--rslora", "--alpha", 5], ["--dora"], ["--init", "pissa"], ["--init", "olora"], ["--start-rank", 2], ["--rank-budget", 3]],
    ids=lambda words: words[0] + str(words[1:2]),
)  # fmt: skip
def test_stock_peft_computes_what_was_trained(qlt, here, llama, data, live, words):
    made = qlt(
        "train", "--base", llama, "--data", data, "--bf16", "--rank", 6, "--batch", 4, "--steps", 3, "--lr", 2e-2, "--compute", "fp32", *words, "-o", "out"
    )
    assert made.code == 0
    assert files(here / "out") == OUTPUT
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        trained = live[0].run.model.eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        before = base(ids).logits
        loaded = PeftModel.from_pretrained(base, here / "out").eval()(input_ids=ids).logits
    moved = (trained - before).norm()
    assert moved > 0.05 * before.norm()
    assert (trained - loaded).norm() < 2**-7 * moved + 2**-8 * before.norm() * ("pissa" in words or "olora" in words)


def test_the_adapter_of_the_best_evaluation_is_written(qlt, here, loud, data):
    (here / "val.jsonl").write_text(json.dumps({"prompt": "say 2: ", "completion": "qqqq"}) + "\n")  # a letter that training makes less and less likely
    words = [
        "--base",
        loud,
        "--data",
        data,
        "--rank",
        4,
        "--batch",
        4,
        "--lr",
        0.03,
        "--schedule",
        "constant",
        "--warmup",
        0,
        "--val",
        "val.jsonl",
        "--keep",
        1,
    ]
    made = qlt("train", *words, "--steps", 9, "--eval-every", 1, "--json", "-o", "out")
    report = made.json["report"]
    assert report["best_step"] < report["steps"] - 1
    evaluations = {line["step"]: line["loss"] for line in of_kind(here / "out", "evaluation")}
    assert report["best_loss"] == min(evaluations.values()) == evaluations[report["best_step"]]
    assert qlt("train", *words, "--steps", report["best_step"], "--eval-every", 100, "-o", "as-far").code == 0
    assert adapter_bytes(here / "out") == adapter_bytes(here / "as-far")


def test_merge_and_export_follow_without_a_word(qlt, here, llama, data, tmp_path):
    assert qlt("train", "--base", llama, "--data", data, *SHORT, "-o", "adapters/mine").code == 0
    assert qlt("merge", "-o", "merged").code == 0
    before, after = load_file(llama / "model.safetensors"), load_file(here / "merged/model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    assert qlt("export", "--merge", "--int8", "-o", "exported").code == 0
    assert any(name.endswith(".onnx") for name in files(here / "exported"))
    other = build_llama(tmp_path / "other", seed=9, tokenizer=True)
    refused = qlt("merge", "--base", other, "--adapter", "adapters/mine", "-o", "wrong")
    assert refused.code == 3
    assert "sha256" in refused.err or "fingerprint" in refused.err or "other base" in refused.err


@pytest.mark.parametrize("held", ["--nf4", "--int8"])
def test_a_stored_quantized_base_trains_like_the_original_quantized_on_the_way(qlt, here, llama, data, held):
    assert qlt("quantize", llama, held, "-o", "stored").code == 0
    assert qlt("train", "--base", "stored", "--data", data, held, *SHORT, "-o", "from-stored").code == 0
    assert qlt("train", "--base", llama, "--data", data, held, *SHORT, "-o", "from-original").code == 0
    assert of_kind(here / "from-stored", "step") == of_kind(here / "from-original", "step")
    stored, original = (load_file(here / name / "adapter_model.safetensors") for name in ("from-stored", "from-original"))
    assert all(torch.equal(stored[name], original[name]) for name in original)
    refused = qlt("train", "--base", "stored", "--data", data, "--int8" if held == "--nf4" else "--nf4", *SHORT, "-o", "no")
    assert refused.code == 3
    assert f"stored in {held[2:]}" in refused.err


def test_loftq_refuses_a_base_whose_original_weights_are_gone(qlt, here, llama, data):
    assert qlt("quantize", llama, "--nf4", "-o", "stored").code == 0
    refused = qlt("train", "--base", "stored", "--data", data, "--nf4", "--init", "loftq", *SHORT, "-o", "out")
    assert refused.code == 8
    assert "--init loftq needs the weights before quantization" in refused.err
    assert files(here) == files(here / "stored") or not (here / "out.run").exists()


def test_a_teacher_that_is_the_base_itself_has_nothing_to_teach(qlt, here, llama, data):
    words = ["--base", llama, "--data", data, "--bf16", *SHORT, "--steps", 1, "--teacher", llama, "--teacher-weight"]
    assert qlt("train", *words, 1, "-o", "whole").code == 0
    assert abs(of_kind(here / "whole", "step")[0]["loss"]) < 1e-3
    assert qlt("train", *words, 0, "-o", "none").code == 0
    assert of_kind(here / "none", "step")[0]["loss"] > 4


def test_a_teacher_pulls_the_student_towards_itself(qlt, here, llama, tuned, data):
    words = ["--base", llama, "--data", data, "--bf16", "--rank", 8, "--batch", 4, "--steps", 20, "--lr", 1e-2, "--teacher", tuned, "--teacher-weight", 1]
    assert qlt("train", *words, "-o", "out").code == 0
    losses = [line["loss"] for line in of_kind(here / "out", "step")]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_two_equal_runs_write_the_same_bytes(qlt, here, llama, data):
    for name in ("first", "second"):
        assert qlt("train", "--base", llama, "--data", data, *SHORT, "--dropout", 0.1, "-o", name).code == 0
    assert adapter_bytes(here / "first") == adapter_bytes(here / "second")
    assert qlt("train", "--base", llama, "--data", data, *SHORT, "--dropout", 0.1, "--seed", 1, "-o", "third").code == 0
    assert adapter_bytes(here / "first") != adapter_bytes(here / "third")


# what is said and kept


def test_a_dry_run_writes_nothing_and_says_what_would_be(qlt, here, llama, data):
    made = qlt("train", "--base", llama, "--data", data, *SHORT, "--dry-run", "--json")
    assert made.code == 0
    assert made.json["report"] is None
    assert made.json["plan"]["steps"] == 3
    assert 0 < made.json["plan"]["seconds_per_step"] < 60
    assert len(made.json["plan"]["modules"]) == 14
    assert not list(here.iterdir())


def test_json_is_one_object_even_with_all_events(qlt, here, llama, data):
    made = qlt("train", "--base", llama, "--data", data, *SHORT, "--val-share", 0.2, "--sample", "say", "--json", "-o", "out")
    assert made.json["report"]["stopped"] == "done"
    assert made.json["output"].endswith("out")
    assert set(made.json["report"]) >= {"first_loss", "final_loss", "best_loss", "tokens_per_s", "peak_bytes"}


def test_checkpoints_are_made_and_kept_as_asked(qlt, here, llama, data, monkeypatch):
    kept = []
    finish = verb._finish
    monkeypatch.setattr(
        verb, "_finish", lambda ready, dest, *rest: kept.extend(path.name for path in ready.folder.glob("step-*")) or finish(ready, dest, *rest)
    )
    assert qlt("train", "--base", llama, "--data", data, *SHORT, "--steps", 7, "--save-every", 2, "--keep", 3, "-o", "out").code == 0
    assert sorted(kept) == ["step-000004", "step-000006", "step-000007"]
    assert files(here) == {f"out/{name}" for name in OUTPUT}


def test_patience_stops_the_run_and_says_so(qlt, here, llama, data):
    made = qlt("train", "--base", llama, "--data", data, *SHORT, "--steps", 60, "--lr", 1, "--val-share", 0.2, "--eval-every", 1, "--patience", 2, "-o", "out")
    assert made.code == 0
    assert "evaluations no longer improved" in made.out
    assert len(of_kind(here / "out", "step")) < 60


def test_an_output_that_exists_is_kept_unless_forced(qlt, here, llama, data):
    words = ["train", "--base", llama, "--data", data, *SHORT, "-o", "out"]
    assert qlt(*words).code == 0
    before = adapter_bytes(here / "out")
    assert qlt(*words, "--seed", 2).code == 7
    assert adapter_bytes(here / "out") == before
    assert qlt(*words, "--seed", 2, "--force").code == 0
    assert adapter_bytes(here / "out") != before
