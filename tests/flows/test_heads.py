"""A classifier all the way: trained on a base without its head, merged, stored quantized, exported; held against PEFT's own model of base and adapter."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf
from peft import PeftModel

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.manifest import read_manifest
from qlora_tools.training.config import TrainConfig
from qlora_tools.verbs.train import train
from tests.conftest import write_tokenizer
from tests.flows.training_material import without_estimate_and_picture, write_images, write_labelled, write_preparation

BODY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}  # sides that bitsandbytes multiplies by on the CPU
BERT = {**BODY, "vocab_size": 160, "max_position_embeddings": 128}
DECODER = {**BERT, "num_key_value_heads": 2, "pad_token_id": 1}
VIT = {**BODY, "image_size": 32, "patch_size": 8, "num_labels": 5}
RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
#: Bases of which none has a head for two classes.
BUILDS = {
    "headless bert": lambda: hf.BertModel(hf.BertConfig(**BERT)),
    "bert with the heads of its pretraining": lambda: hf.BertForPreTraining(hf.BertConfig(**BERT)),
    "bert for three classes": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3, problem_type="multi_label_classification")),
    "masked roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT)),
    "tied gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "untied llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, tie_word_embeddings=False)),
    "headless vit": lambda: hf.ViTModel(hf.ViTConfig(**VIT)),
    "vit for five classes": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    "resnet for five classes": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET)),
}
TEXTS = ["headless bert", "bert with the heads of its pretraining", "bert for three classes", "masked roberta", "tied gpt2", "untied llama"]
IMAGES = ["headless vit", "vit for five classes", "resnet for five classes"]
IDS = torch.randint(2, 160, (4, 12), generator=torch.Generator().manual_seed(3))
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        without_estimate_and_picture(patch)
        yield


def build(kind, folder, seed=0):
    """A tiny base in fp32, with what training reads beside the weights."""
    torch.manual_seed(seed)
    BUILDS[kind]().save_pretrained(folder)
    write_tokenizer(folder, 160)
    write_preparation(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made("headless bert")``: (base, adapter trained on it), built once."""
    root = tmp_path_factory.mktemp("made")
    data = {"text": write_labelled(root / "labelled.jsonl", 16), "image": write_images(root / "images", 6)}
    found = {}

    def make(kind):
        if kind not in found:
            base = build(kind, root / kind.replace(" ", "-"))
            config = TrainConfig(rank=4, batch=4, steps=6, lr=2e-2, max_len=32, base_format="bf16", compute="fp32")
            adapter = root / f"{base.name}-adapter"
            train(base=base, data=data["image" if kind in IMAGES else "text"], config=config, output=adapter)
            found[kind] = base, adapter
        return found[kind]

    make.labelled, make.images = data["text"], data["image"]
    return make


def auto(kind):
    return hf.AutoModelForImageClassification if kind in IMAGES else hf.AutoModelForSequenceClassification


@torch.inference_mode()
def logits(model, kind):
    inputs = {"pixel_values": PIXELS} if kind in IMAGES else {"input_ids": IDS}
    return model.eval()(**inputs).logits.float()


def by_peft(base, adapter, kind):
    """What PEFT's model of base and adapter says."""
    head = {"num_labels": 2, "ignore_mismatched_sizes": True}
    return logits(PeftModel.from_pretrained(auto(kind).from_pretrained(base, dtype=torch.float32, **head), adapter), kind)


def loaded(folder, kind, **options):
    """The checkpoint as transformers loads it, which must find all it needs and nothing else."""
    model, report = auto(kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


@pytest.mark.parametrize("kind", [*TEXTS, *IMAGES])
def test_a_trained_head_is_merged_and_transformers_computes_what_peft_does(qlt, here, made, kind):
    base, adapter = made(kind)
    done = qlt("merge", "--base", base, "--adapter", adapter, "-o", "m")
    assert done.code == 0, done.err
    model = loaded(here / "m", kind, dtype=torch.float32)
    torch.testing.assert_close(logits(model, kind), by_peft(base, adapter, kind), atol=2e-5, rtol=1e-4)
    names = ["blue", "red"] if kind in IMAGES else ["neg", "pos"]
    assert model.config.id2label == dict(enumerate(names)) and model.config.label2id == {name: number for number, name in enumerate(names)}
    assert model.config.architectures == [type(model).__name__] and type(model).__name__ in done.err
    assert model.config.problem_type == "single_label_classification"


def test_what_the_classifier_has_no_place_for_is_named(qlt, here, made):
    base, adapter = made("bert with the heads of its pretraining")
    done = qlt("merge", "--base", base, "--adapter", adapter, "-o", "m")
    head = read_manifest(here / "m").report["head"]
    gone = {name for name in open_checkpoint(base).specs if name.startswith("cls.")}
    assert set(head["dropped"]) == gone and "cls.predictions.bias" in gone and "cls.predictions.decoder.weight" not in gone
    assert head["added"] == ["classifier.bias", "classifier.weight"] and head["architecture"] == "BertForSequenceClassification"
    assert "left out" in done.err and "cls.predictions.bias" in done.err
    stored = open_checkpoint(here / "m")
    assert {spec.dtype for spec in stored.specs.values()} == {"F32"} and not any(name.startswith("cls.") for name in stored.specs)


@pytest.mark.parametrize("scheme", ["--nf4", "--int8"])
@pytest.mark.parametrize("kind", ["headless bert", "vit for five classes"])
def test_quantized_merges_keep_the_head_dense_and_load(qlt, here, made, kind, scheme):
    base, adapter = made(kind)
    done = qlt("merge", "--base", base, "--adapter", adapter, scheme, "--anyway", "-o", "m")
    assert done.code == 0, done.err
    held = open_checkpoint(here / "m")
    assert held.quantized and all(name in held.stored.specs and name not in held.quantized for name in ("classifier.weight", "classifier.bias"))
    assert "classifier" in held.config["quantization_config"]["llm_int8_skip_modules"]
    found, wanted = logits(loaded(here / "m", kind), kind), by_peft(base, adapter, kind)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    assert qlt("merge", "--base", base, "--adapter", adapter, "-o", "dense").code == 0
    assert open_checkpoint(here / "dense").specs.keys() == held.specs.keys()


def test_a_quantized_base_keeps_its_grid_under_the_new_names(qlt, here, made):
    base, _ = made("headless bert")
    assert qlt("quantize", base, "--nf4", "-o", "stored").code == 0
    words = ["--rank", 4, "--batch", 4, "--steps", 4, "--lr", 1e-2, "--max-len", 32, "--nf4"]
    assert qlt("train", "--base", "stored", "--data", made.labelled, *words, "-o", "a").code == 0
    done = qlt("merge", "--base", "stored", "--adapter", "a", "--nf4", "--anyway", "-o", "m", "--json")
    assert done.code == 0 and done.json["method"] == "keep-grid", done.err
    before, after = open_checkpoint(here / "stored"), open_checkpoint(here / "m")
    assert {f"bert.{name}" for name in before.quantized} == set(after.quantized)
    scales = [part for item in before.quantized.values() for part in item.parts if part.endswith(".absmax")]
    assert all(torch.equal(before.stored.read(part), after.stored.read(f"bert.{part}")) for part in scales)
    assert "classifier" in after.config["quantization_config"]["llm_int8_skip_modules"]
    loaded(here / "m", "headless bert")
    other = build("headless bert", here / "other", seed=5)
    assert qlt("quantize", other, "--nf4", "-o", "other-stored").code == 0
    refused = qlt("merge", "--base", "other-stored", "--adapter", "a", "-o", "no")
    assert refused.code == 3 and "made for another base" in refused.err and not (here / "no").exists()


@pytest.mark.parametrize("kind", ["headless bert", "vit for five classes"])
def test_the_exported_classifier_answers_as_peft_does(qlt, here, made, kind):
    base, adapter = made(kind)
    done = qlt("export", "--base", base, "--adapter", adapter, "--merge", "--int8", "-o", "e")
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(here / "e/model.onnx", providers=["CPUExecutionProvider"])
    given = {"pixel_values": PIXELS.numpy()} if kind in IMAGES else {"input_ids": IDS.numpy(), "attention_mask": np.ones(IDS.shape, np.int64)}
    given |= {"token_type_ids": np.zeros(IDS.shape, np.int64)}
    found = session.run(["logits"], {name: given[name] for name in (value.name for value in session.get_inputs())})[0]
    wanted = by_peft(base, adapter, kind)
    assert np.linalg.norm(found - wanted.numpy()) < 0.05 * wanted.norm() and np.array_equal(found.argmax(1), wanted.argmax(1).numpy())
    assert list(json.loads((here / "e/config.json").read_text())["id2label"].values()) == (["blue", "red"] if kind in IMAGES else ["neg", "pos"])
    assert read_manifest(here / "e").report["head"]["added"]
    verified = qlt("verify", "e", "--json")
    assert verified.code == 0, verified.out
    assert {check["name"]: check["status"] for check in verified.json["checks"]} == dict.fromkeys(("files", "inputs", "weights", "computation"), "ok")


def test_the_export_is_judged_beside_the_merged_checkpoint(qlt, here, made):
    base, adapter = made("headless bert")
    assert qlt("merge", "--base", base, "--adapter", adapter, "-o", "m").code == 0
    assert qlt("export", "--base", base, "--adapter", adapter, "--merge", "--fp32", "-o", "e").code == 0
    done = qlt("eval", "e", "--against", "m", "--labels", made.labelled, "--json")
    assert done.code == 0, done.err
    figures = done.json["models"][0]["figures"]
    assert figures["top1_agreement"] == 1 and figures["accuracy"] == figures["accuracy_reference"] > 0.5


def test_a_head_of_the_same_size_brings_the_names_of_its_classes(qlt, here, made):
    torch.manual_seed(0)
    hf.BertForSequenceClassification(hf.BertConfig(**BERT)).save_pretrained(here / "two")  # LABEL_0 and LABEL_1
    write_tokenizer(here / "two", 160)
    words = ["--rank", 4, "--batch", 4, "--steps", 2, "--max-len", 32]
    assert qlt("train", "--base", "two", "--data", made.labelled, *words, "-o", "a").code == 0
    assert qlt("merge", "--base", "two", "--adapter", "a", "-o", "m").code == 0
    assert loaded(here / "m", "headless bert").config.id2label == {0: "neg", 1: "pos"} and "head" not in read_manifest(here / "m").report


def test_an_adapter_fits_a_base_that_transformers_renames_on_loading(qlt, here, made, tmp_path):
    torch.manual_seed(0)
    hf.ViTForImageClassification(hf.ViTConfig(**{**VIT, "num_labels": 2})).save_pretrained(here / "two")
    write_preparation(here / "two")
    words = ["--rank", 4, "--batch", 4, "--steps", 2, "--lr", 2e-2, "--bf16", "--compute", "fp32"]
    assert qlt("train", "--base", "two", "--data", made.images, *words, "-o", "a").code == 0
    done = qlt("merge", "--base", "two", "--adapter", "a", "-o", "m")
    assert done.code == 0, done.err
    before, after = open_checkpoint(here / "two"), open_checkpoint(here / "m")
    assert before.specs == after.specs and any("encoder.layer.0" in name for name in after.specs)
    model = loaded(here / "m", "vit for five classes", dtype=torch.float32)
    torch.testing.assert_close(logits(model, "vit for five classes"), by_peft(here / "two", here / "a", "vit for five classes"), atol=2e-5, rtol=1e-4)
    assert model.config.id2label == {0: "blue", 1: "red"}
    torch.manual_seed(3)
    hf.ViTForImageClassification(hf.ViTConfig(**{**VIT, "num_labels": 2})).save_pretrained(here / "other")
    refused = qlt("merge", "--base", "other", "--adapter", "a", "-o", "no")
    assert refused.code == 3 and "was made for another base" in refused.err and not (here / "no").exists()


# what is refused


@pytest.mark.parametrize("verb", [("merge",), ("export", "--merge", "--int8")], ids=lambda words: words[0])
def test_an_adapter_for_another_base_is_refused_by_name(qlt, here, made, verb):
    _, adapter = made("headless bert")
    build("headless bert", here / "other", seed=7)
    refused = qlt(*verb, "--base", "other", "--adapter", adapter, "-o", "no")
    assert refused.code == 3 and "was made for another base" in refused.err and "bert.encoder" in refused.err
    wide = hf.BertModel(hf.BertConfig(**{**BERT, "hidden_size": 128}))
    wide.save_pretrained(here / "wide")
    refused = qlt(*verb, "--base", "wide", "--adapter", adapter, "-o", "no")
    assert refused.code == 3 and "does not fit the base" in refused.err and "expected" in refused.err
    base, _ = made("untied llama")
    refused = qlt(*verb, "--base", base, "--adapter", adapter, "-o", "no")
    assert refused.code == 3 and "match nothing in the base" in refused.err and "classifier" in refused.err
    assert not (here / "no").exists()


def test_a_new_head_is_neither_weighted_nor_added_nor_kept_beside_a_graph(qlt, here, made):
    base, adapter = made("headless bert")
    for words in ([f"{adapter}=0.5"], [f"{adapter}=0"], [adapter, "--adapter", adapter]):
        refused = qlt("merge", "--base", base, "--adapter", *words, "-o", "no")
        assert refused.code == 3 and "it cannot be weighted or added" in refused.err, words
    refused = qlt("export", base, "--adapters", adapter, "--int8", "-o", "no")
    assert refused.code == 8 and "cannot be kept beside a graph" in refused.err and "--merge" in refused.err
    assert not (here / "no").exists()


@pytest.mark.parametrize("words", [("merge", "--nf4", "--calib", "builtin"), ("export", "--merge", "--int8", "--calib", "builtin")], ids=lambda words: words[0])
def test_what_would_run_the_base_without_the_head_is_refused(qlt, here, made, words):
    base, adapter = made("headless bert")
    refused = qlt(words[0], "--base", base, "--adapter", adapter, *words[1:], "-o", "no")
    assert refused.code == 2 and "--calib would run" in refused.err and "merge it dense first" in refused.err and not (here / "no").exists()


@pytest.mark.parametrize("kind", ["headless bert", "vit for five classes"])
def test_judging_an_adapter_on_a_base_without_its_head_is_refused_with_the_way_out(qlt, here, made, kind):
    base, adapter = made(kind)
    refused = qlt("eval", base, "--adapter", adapter, "--labels", made.images if kind in IMAGES else made.labelled)
    assert refused.code == 2 and "--adapter would run" in refused.err and "qlt merge" in refused.err
