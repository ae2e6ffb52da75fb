"""Statistics taken block by block equal those of the whole model in float64, family by family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from qlora_tools.calibrate.collect import collect, collect_batches
from qlora_tools.calibrate.walk import Batch
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.text import split_windows
from tests.calibrate import models

TEXT = ("text", "0" * 64)


def windows_of(vocab, count=10, length=16, seed=0):
    return split_windows(torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(seed)), "random")


def compare(statistics, expected, kind="input"):
    assert expected
    for weight, (square, total, count) in expected.items():
        found = statistics.read(statistics.name_of(kind, weight)).double()
        scale = float((square / count).diagonal().mean())
        torch.testing.assert_close(found, square / count, rtol=2e-5, atol=2e-5 * scale)
        assert torch.equal(found, found.T)
        if kind == "input":
            torch.testing.assert_close(statistics.read(statistics.name_of("mean", weight)).double(), total / count, rtol=2e-4, atol=2e-5 * scale**0.5)


def weight_names(model, checkpoint, renamed=None):
    names = {path: f"{path}.weight" for path, _ in model.named_modules()}
    names |= renamed or {}
    return {path: name for path, name in names.items() if name in checkpoint.specs}


@pytest.fixture
def llama_statistics(llama, tmp_path):
    checkpoint = open_checkpoint(llama)
    windows = windows_of(160)
    return checkpoint, windows, collect(checkpoint, windows, tmp_path / "statistics.safetensors")


def test_a_decoders_moments_are_those_of_the_whole_model_in_float64(llama, llama_statistics):
    checkpoint, windows, statistics = llama_statistics
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    names = weight_names(model, checkpoint)
    compare(statistics, models.reference(model, names, [Batch({"input_ids": windows.learn_NL})]))
    compare(statistics, models.reference(model, names, [Batch({"input_ids": windows.held_out_NL})]), kind="held_out")
    assert statistics.origin.tokens == windows.learn_NL.numel() and statistics.origin.held_out_tokens == windows.held_out_NL.numel()


def test_layers_that_read_the_same_tensor_share_one_sum(llama_statistics):
    _, _, statistics = llama_statistics
    layer = "model.layers.1."
    name = statistics.name_of("input", f"{layer}self_attn.q_proj.weight")
    assert name == statistics.name_of("input", f"{layer}self_attn.k_proj.weight") == statistics.name_of("input", f"{layer}self_attn.v_proj.weight")
    assert statistics.name_of("input", f"{layer}mlp.up_proj.weight") == f"input.{layer}mlp.gate_proj.weight"
    assert statistics.name_of("input", f"{layer}self_attn.o_proj.weight") == f"input.{layer}self_attn.o_proj.weight"
    assert statistics.name_of("output", f"{layer}self_attn.o_proj.weight") is None
    assert statistics.name_of("input", "lm_head.weight") == "input.lm_head.weight"


def test_gpt2s_turned_layers_and_tied_head_are_heard(tmp_path):
    checkpoint = open_checkpoint(models.gpt2(tmp_path / "gpt2"))
    windows = windows_of(96)
    statistics = collect(checkpoint, windows, tmp_path / "s.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    names = weight_names(model, checkpoint, {"lm_head": "transformer.wte.weight"})
    assert "lm_head" in names
    compare(statistics, models.reference(model, names, [Batch({"input_ids": windows.learn_NL})]))


def test_padding_is_left_out(tmp_path):
    checkpoint = open_checkpoint(models.bert(tmp_path / "bert", labels=3))
    ids = torch.randint(1, 96, (6, 12), generator=torch.Generator().manual_seed(0))
    keep = torch.arange(12) < torch.tensor([12, 5, 1, 9, 12, 3])[:, None]
    batches = [Batch({"input_ids": ids[part], "attention_mask": keep[part].long()}, keep[part]) for part in (slice(0, 2), slice(2, 6))]
    statistics = collect_batches(checkpoint, batches, tmp_path / "s.safetensors", "classification", text=TEXT)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    expected = models.reference(model, weight_names(model, checkpoint), batches)
    compare(statistics, expected)
    assert expected["bert.encoder.layer.0.output.dense.weight"][2] == int(keep.sum()) == statistics.origin.tokens
    assert expected["bert.pooler.dense.weight"][2] == 6


def test_convolutions_are_heard_as_the_patches_their_kernels_see(tmp_path):
    checkpoint = open_checkpoint(models.resnet(tmp_path / "resnet"))
    pixels = torch.rand(4, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    batches = [Batch({"pixel_values": pixels[:3]}), Batch({"pixel_values": pixels[3:]})]
    statistics = collect_batches(checkpoint, batches, tmp_path / "s.safetensors", "image", text=TEXT)
    model = AutoModelForImageClassification.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    compare(statistics, models.reference(model, weight_names(model, checkpoint), batches))


def test_a_head_that_the_checkpoint_lacks_is_not_asked_for(tmp_path):
    checkpoint = open_checkpoint(models.bert(tmp_path / "bert"))
    statistics = collect(checkpoint, windows_of(96), tmp_path / "s.safetensors")
    assert statistics.name_of("input", "bert.encoder.layer.1.attention.self.value.weight") == "input.bert.encoder.layer.1.attention.self.query.weight"


def test_two_runs_write_the_same_bytes(llama, tmp_path):
    checkpoint, windows = open_checkpoint(llama), windows_of(160)
    for name in ("a", "b"):
        collect(checkpoint, windows, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_model_of_images_is_refused_for_texts(tmp_path):
    checkpoint = open_checkpoint(models.resnet(tmp_path / "resnet"))
    with pytest.raises(UnsupportedError, match="reads no text"):
        collect(checkpoint, windows_of(96), tmp_path / "s")


def test_threads_of_passes_leave_the_drivers_own_count_alone(llama, tmp_path):
    before = torch.get_num_threads()
    collect(open_checkpoint(llama), windows_of(160), tmp_path / "s")
    assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_statistics(llama, tmp_path):
    checkpoint, windows = open_checkpoint(llama), windows_of(160)
    here = collect(checkpoint, windows, tmp_path / "a", fisher=True)
    there = collect(checkpoint, windows, tmp_path / "b", fisher=True, device="cuda", dtype=torch.float32)
    for name in here.specs:
        expected = here.read(name)
        torch.testing.assert_close(there.read(name), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
