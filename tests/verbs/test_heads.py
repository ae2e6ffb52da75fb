"""Which head an adapter brings is told from headers alone; adapters saved by PEFT itself, with no manifest to help."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    ResNetConfig,
    ResNetModel,
)

from qlora_tools import api
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import IncompatibleError
from qlora_tools.verbs.heads import labelled, with_head

BERT = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 16}
BERT["initializer_range"] = 0.2  # at the usual 0.02 an adapter on attention moves no logit beyond rounding
RESNET = {"embedding_size": 16, "hidden_sizes": [32], "depths": [1], "layer_type": "basic"}
IDS = torch.tensor([[1, 7, 2, 60, 5]])


def saved(folder, owner, config):
    torch.manual_seed(0)
    owner(config).save_pretrained(folder)
    return folder


def adapter_of(base, auto, folder, task_type="SEQ_CLS", classes=3, target="query", **options):
    """An adapter of ``classes`` on ``base``, with values of its own, as PEFT saves it; and its live model."""
    torch.manual_seed(1)
    model = auto.from_pretrained(base, num_labels=classes, dtype=torch.float32, ignore_mismatched_sizes=True)
    live = get_peft_model(model, LoraConfig(task_type=task_type, r=2, target_modules=[target], **options))
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    live.save_pretrained(folder)
    return live.eval()


def test_a_foreign_head_tells_the_number_of_its_classes(tmp_path):
    base = saved(tmp_path / "base", BertModel, BertConfig(**BERT))
    live = adapter_of(base, AutoModelForSequenceClassification, tmp_path / "adapter")
    api.merge(base=base, adapters=[(tmp_path / "adapter", 1.0)], output=tmp_path / "m")
    merged, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(input_ids=IDS).logits, live(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    assert merged.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"} and merged.config.problem_type is None


def test_a_foreign_head_for_images_is_told_by_the_model(tmp_path):
    base = saved(tmp_path / "base", ResNetModel, ResNetConfig(**RESNET))
    adapter_of(base, AutoModelForImageClassification, tmp_path / "adapter", None, target="convolution", modules_to_save=["classifier"])
    checkpoint, head = with_head(open_checkpoint(base), [tmp_path / "adapter"])
    assert head.architecture == "ResNetForImageClassification" and head.dropped == ()
    assert {name: spec.shape for name, spec in head.added.items()} == {"classifier.1.bias": (3,), "classifier.1.weight": (3, 32)}
    assert checkpoint.config["architectures"] == ["ResNetForImageClassification"] and len(checkpoint.config["id2label"]) == 3
    assert all(name.startswith("resnet.") for name in checkpoint.specs) and checkpoint.opened.specs.keys() == open_checkpoint(base).specs.keys()


def test_older_names_stay_where_transformers_knows_them(tmp_path):
    base = saved(tmp_path / "base", BertForPreTraining, BertConfig(**BERT))
    file = base / "model.safetensors"
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value for name, value in load_file(file).items()}
    save_file(old, file, metadata={"format": "pt"})
    live = adapter_of(base, AutoModelForSequenceClassification, tmp_path / "adapter")
    api.merge(base=base, adapters=[(tmp_path / "adapter", 1.0)], output=tmp_path / "m")
    assert "bert.embeddings.LayerNorm.gamma" in open_checkpoint(tmp_path / "m").specs
    merged, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(input_ids=IDS).logits, live(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)


def test_a_head_that_fits_is_no_new_one(tmp_path):
    base = saved(tmp_path / "base", BertForSequenceClassification, BertConfig(**BERT, num_labels=3))
    adapter_of(base, AutoModelForSequenceClassification, tmp_path / "adapter")
    opened = open_checkpoint(base)
    assert with_head(opened, [tmp_path / "adapter"]) == (opened, None)


def test_weights_that_were_random_and_not_saved_are_missed_by_name(tmp_path):
    base = saved(tmp_path / "base", BertForMaskedLM, BertConfig(**BERT))  # without a pooler
    adapter_of(base, AutoModelForSequenceClassification, tmp_path / "adapter")
    with pytest.raises(IncompatibleError, match=r"bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight neither .* nor the adapter holds"):
        api.merge(base=base, adapters=[(tmp_path / "adapter", 1.0)], output=tmp_path / "m")


def test_the_head_of_another_task_is_not_taken_for_one(tmp_path):
    base = saved(tmp_path / "base", BertModel, BertConfig(**BERT))
    adapter_of(base, AutoModelForTokenClassification, tmp_path / "adapter", "TOKEN_CLS")
    opened = open_checkpoint(base)
    assert with_head(opened, [tmp_path / "adapter"]) == (opened, None)
    with pytest.raises(IncompatibleError, match=r"match nothing in the base: .*classifier\.bias"):
        api.merge(base=base, adapters=[(tmp_path / "adapter", 1.0)], output=tmp_path / "m")


def test_whole_tensors_that_the_configuration_does_not_name_are_refused(tmp_path):
    base = saved(tmp_path / "base", BertModel, BertConfig(**BERT))
    adapter_of(base, AutoModelForSequenceClassification, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["score"]}))
    with pytest.raises(IncompatibleError, match="match nothing in the base"):
        api.merge(base=base, adapters=[(tmp_path / "adapter", 1.0)], output=tmp_path / "m")


def test_a_second_adapter_by_the_old_names_is_merged_along(tmp_path):
    base = saved(tmp_path / "base", BertModel, BertConfig(**BERT))
    adapter_of(base, AutoModelForSequenceClassification, tmp_path / "head")
    tuned = tmp_path / "tuned"
    saved(tuned, BertModel, BertConfig(**BERT))
    tensors = load_file(tuned / "model.safetensors")
    name = "encoder.layer.0.output.dense.weight"
    change = torch.outer(torch.randn(64), torch.randn(96)) * 0.1
    save_file({**tensors, name: tensors[name] + change}, tuned / "model.safetensors", metadata={"format": "pt"})
    api.extract(base=base, tuned=tuned, config=api.ExtractConfig(rank=1), output=tmp_path / "body")
    api.merge(base=base, adapters=[(tmp_path / "head", 1.0), (tmp_path / "body", 0.5)], output=tmp_path / "m")
    found = open_checkpoint(tmp_path / "m").read(f"bert.{name}")
    torch.testing.assert_close(found, tensors[name] + 0.5 * change, atol=2e-3, rtol=1e-2)


def test_the_problem_of_an_old_head_is_not_handed_on():
    old = {"num_labels": 3, "problem_type": "regression", "model_type": "bert", "id2label": {"0": "x"}}
    assert labelled(old, ["a", "b"]) == {
        "model_type": "bert",
        "problem_type": "single_label_classification",
        "id2label": {"0": "a", "1": "b"},
        "label2id": {"a": 0, "b": 1},
    }
    assert "problem_type" not in labelled(old, ["a"], single=False)
