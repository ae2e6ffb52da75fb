"""Where weights come from, how much of them is in memory, and what stops a walk."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools import api
from qlora_tools.calibrate import collect as module
from qlora_tools.calibrate import walk
from qlora_tools.calibrate.collect import collect
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import IncompatibleError, NonFiniteError
from qlora_tools.live.parking import Parking
from qlora_tools.live.weights import Weights, stops_of
from tests.calibrate import models
from tests.calibrate.test_collect import windows_of
from tests.conftest import build_llama


def same(one, other, rtol=0.0):
    assert one.specs.keys() == other.specs.keys() and one.specs
    for name in one.specs:
        torch.testing.assert_close(one.read(name), other.read(name), rtol=rtol, atol=rtol)


def test_a_model_loaded_whole_gives_the_same_statistics(llama, tmp_path, monkeypatch):
    checkpoint, windows = open_checkpoint(llama), windows_of(160)
    streamed = collect(checkpoint, windows, tmp_path / "a", fisher=True)
    monkeypatch.setattr(Weights, "_strangers", lambda self, names: ["renamed"])
    whole = collect(checkpoint, windows, tmp_path / "b", fisher=True)
    same(streamed, whole, rtol=1e-5)
    assert whole.origin.shared == streamed.origin.shared
    whole.check(checkpoint)


@pytest.mark.parametrize("scheme", ["bf16", "nf4"])
def test_a_model_that_reaches_into_its_blocks_is_loaded_whole(llama, tmp_path, monkeypatch, scheme):
    folder = llama if scheme == "bf16" else api.quantize(model=llama, scheme=scheme, output=tmp_path / scheme, device="cpu").output
    checkpoint, windows = open_checkpoint(folder), windows_of(160)
    streamed = collect(checkpoint, windows, tmp_path / "a")
    monkeypatch.setattr(walk, "stops_of", lambda model: (["model.layers"], ["model.embed_tokens"]))
    whole = collect(checkpoint, windows, tmp_path / "b")
    same(streamed, whole, rtol=1e-5 if scheme == "bf16" else 5e-3)  # streamed weights are decoded to bf16, as the checkpoint says, whole ones to fp32
    whole.check(checkpoint)
    assert whole.origin.weights and sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a", "b"]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantized_checkpoint_is_decoded_and_recognised(llama, tmp_path, scheme):
    api.quantize(model=llama, scheme=scheme, output=tmp_path / scheme, device="cpu")
    checkpoint = open_checkpoint(tmp_path / scheme)
    statistics = collect(checkpoint, windows_of(160), tmp_path / "s")
    dense = load_file(llama / "model.safetensors")
    dense |= {name: checkpoint.read(name) for name in checkpoint.quantized}
    folder = build_llama(tmp_path / "dense")
    save_file({name: value.contiguous() for name, value in dense.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    same(statistics, collect(open_checkpoint(folder), windows_of(160), tmp_path / "t"), rtol=1e-6)
    statistics.check(checkpoint)
    with pytest.raises(IncompatibleError, match="taken from"):
        statistics.check(open_checkpoint(llama))


def test_hidden_states_may_wait_in_files(llama, tmp_path, monkeypatch):
    checkpoint, windows = open_checkpoint(llama), windows_of(160, count=40, length=64)
    monkeypatch.setattr(module, "BATCH_TOKENS", 512)
    in_memory = collect(checkpoint, windows, tmp_path / "a", fisher=True)
    made = []

    def small(folder):
        made.append(Parking(folder, budget_bytes=0))
        return made[0]

    monkeypatch.setattr(module, "Parking", small)
    same(in_memory, collect(checkpoint, windows, tmp_path / "b", fisher=True))
    assert made[0].peak_in_files > 0 and made[0].in_memory == 0


def test_only_one_block_of_weights_is_filled_at_a_time(llama, tmp_path, monkeypatch):
    filled, most = set(), []
    fill, empty = Weights.fill, Weights.empty

    def counted_fill(self, path, leaving=()):
        fill(self, path, leaving)
        if path:
            filled.add(path)
            most.append(len(filled))

    def counted_empty(self, path):
        empty(self, path)
        filled.discard(path)
        assert all(parameter.device.type == "meta" for parameter in self.model.get_submodule(path).parameters())

    monkeypatch.setattr(Weights, "fill", counted_fill)
    monkeypatch.setattr(Weights, "empty", counted_empty)
    collect(open_checkpoint(llama), windows_of(160), tmp_path / "s", fisher=True)
    assert max(most) == 1 and not filled and len(most) == 2 + 1 + 2


def test_blocks_are_the_elements_of_the_outermost_lists(tmp_path, llama):
    def stops(folder, task):
        return stops_of(Weights(open_checkpoint(folder), task, torch.float32, "cpu").model)

    assert stops(llama, "language") == (["model.layers.0", "model.layers.1"], ["model.embed_tokens"])
    assert stops(models.resnet(tmp_path / "resnet"), "image")[0] == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]


def test_nan_weights_stop_the_walk_and_leave_nothing(tmp_path):
    folder = build_llama(tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.mlp\.down_proj"):
        collect(open_checkpoint(folder), windows_of(160), tmp_path / "out" / "s")
    assert list((tmp_path / "out").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pass-")]


def test_an_error_inside_a_block_names_it(tmp_path):
    folder = build_llama(tmp_path / "short")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = tensors["model.layers.1.self_attn.q_proj.weight"][:32].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match=r"model\.layers\.1\.self_attn\.q_proj"):
        collect(open_checkpoint(folder), windows_of(160), tmp_path / "s")
