"""Gradients taken back block by block equal those of one backward pass of the whole model in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from qlora_tools.calibrate import collect as module
from qlora_tools.calibrate.collect import collect, collect_batches
from qlora_tools.calibrate.walk import Batch
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UnsupportedError
from tests.calibrate import models
from tests.calibrate.test_collect import TEXT, weight_names, windows_of


def compare(statistics, expected):
    assert expected
    for weight, (square, count) in expected.items():
        found = statistics.read(statistics.name_of("output", weight)).double()
        scale = float((square / count).diagonal().mean())
        torch.testing.assert_close(found, square / count, rtol=1e-4, atol=1e-4 * scale)


@pytest.fixture
def batch_of_four(monkeypatch):
    monkeypatch.setattr(module, "BATCH_TOKENS", 64)


@pytest.mark.parametrize("build", ["llama", "gpt2"])
def test_a_decoders_output_gradients_are_those_of_the_whole_model(llama, tmp_path, build, batch_of_four):
    checkpoint = open_checkpoint(llama if build == "llama" else models.gpt2(tmp_path / "gpt2"))
    windows = windows_of(96)
    statistics = collect(checkpoint, windows, tmp_path / "s.safetensors", fisher=True, seed=5)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    batches = [Batch({"input_ids": part}) for part in windows.learn_NL.split(4)]
    names = weight_names(model, checkpoint)
    compare(statistics, models.gradient_reference(model, names, batches, seed=5))
    assert statistics.name_of("output", "lm_head.weight") is None and statistics.name_of("output", "transformer.wte.weight") is None
    without = collect(checkpoint, windows, tmp_path / "plain.safetensors")
    for name in without.specs:
        assert torch.equal(without.read(name), statistics.read(name)), name


def test_gradients_cross_what_lies_between_blocks_and_leave_padding_out(tmp_path):
    checkpoint = open_checkpoint(models.bert(tmp_path / "bert", labels=3))
    ids = torch.randint(1, 96, (6, 12), generator=torch.Generator().manual_seed(0))
    keep = torch.arange(12) < torch.tensor([12, 5, 1, 9, 12, 3])[:, None]
    batches = [Batch({"input_ids": ids[part], "attention_mask": keep[part].long()}, keep[part]) for part in (slice(0, 2), slice(2, 6))]
    statistics = collect_batches(checkpoint, batches, tmp_path / "s.safetensors", "classification", text=TEXT, fisher=True)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    expected = models.gradient_reference(model, weight_names(model, checkpoint), batches)
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= expected.keys()
    compare(statistics, expected)


def test_gradients_reach_the_first_convolution(tmp_path):
    checkpoint = open_checkpoint(models.resnet(tmp_path / "resnet"))
    pixels = torch.rand(4, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    batches = [Batch({"pixel_values": pixels[:3]}), Batch({"pixel_values": pixels[3:]})]
    statistics = collect_batches(checkpoint, batches, tmp_path / "s.safetensors", "image", text=TEXT, fisher=True)
    model = AutoModelForImageClassification.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    expected = models.gradient_reference(model, weight_names(model, checkpoint), batches)
    assert "resnet.embedder.embedder.convolution.weight" in expected
    compare(statistics, expected)


def test_a_model_without_a_head_has_no_gradients(tmp_path):
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")).save_pretrained(tmp_path / "bare")
    checkpoint = open_checkpoint(tmp_path / "bare")
    batches = [Batch({"pixel_values": torch.rand(1, 3, 20, 24)})]
    with pytest.raises(UnsupportedError):
        collect_batches(checkpoint, batches, tmp_path / "s.safetensors", "image", text=TEXT, fisher=True)
    assert not [path for path in tmp_path.iterdir() if path.name != "bare"]


def test_a_classifiers_gradients_are_of_its_own_labels(tmp_path):
    checkpoint = open_checkpoint(models.bert(tmp_path / "bert", labels=3))
    statistics = collect(checkpoint, windows_of(96), tmp_path / "s.safetensors", fisher=True)
    assert statistics.name_of("output", "classifier.weight") == "output.classifier.weight"
