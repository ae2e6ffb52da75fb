"""Files of statistics are read back, bound to their model, and refused when anything in them contradicts itself."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.checkpoint.reader import tensor_sha256
from qlora_tools.checkpoint.statistics import Origin, Statistics, StatisticsWriter
from qlora_tools.errors import CorruptError, IncompatibleError, MissingError
from tests.conftest import build_llama

Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def origin_of(folder, **changes):
    checkpoint = open_checkpoint(folder)
    found = {
        "model": folder.name, "headers_sha256": checkpoint.stored.headers_sha256(), "weights": {name: checkpoint.sha256(name) for name in (Q, K)},
        "shared": {K: Q}, "text": "text.txt", "text_sha256": "0" * 64, "tokens": 100, "held_out_tokens": 20,
    }  # fmt: skip
    return Origin(**{**found, **changes})


@pytest.fixture
def written(llama, tmp_path):
    writer = StatisticsWriter(tmp_path / "s.safetensors", 10)
    square = torch.arange(16.0).view(4, 4)
    writer.add(f"input.{Q}", [square[:3], square[3:]])
    writer.add(f"mean.{Q}", [torch.ones(4)])
    writer.add(f"output.{K}", [torch.eye(2)])
    writer.close(origin_of(llama))
    return tmp_path / "s.safetensors"


def test_what_was_written_is_read_also_by_the_reference_reader(written, llama):
    statistics = Statistics(written)
    name = statistics.name_of("input", K)
    assert name == statistics.name_of("input", Q) == f"input.{Q}"
    assert torch.equal(statistics.read(name), torch.arange(16.0).view(4, 4)) and torch.equal(statistics.read(name, (1, 3)), torch.arange(16.0).view(4, 4)[1:3])
    assert statistics.name_of("output", Q) is None and statistics.name_of("output", K) == f"output.{K}" and statistics.name_of("held_out", Q) is None
    assert statistics.has_gradients and statistics.origin == origin_of(llama)
    with safe_open(written, "pt") as reference:
        assert set(reference.keys()) == set(statistics.specs)
        assert torch.equal(reference.get_tensor(f"mean.{Q}"), torch.ones(4))


def test_an_abandoned_file_leaves_nothing(tmp_path):
    writer = StatisticsWriter(tmp_path / "s", 1)
    writer.add("input.x", [torch.eye(3)])
    writer.abort()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_statistics_belong_to_the_model_they_were_taken_from(written, llama, tuned, tmp_path):
    statistics = Statistics(written)
    statistics.check(open_checkpoint(llama))
    statistics.check(open_checkpoint(tuned), open_checkpoint(llama))
    with pytest.raises(IncompatibleError, match="taken from base"):
        statistics.check(open_checkpoint(tuned))
    with pytest.raises(IncompatibleError):
        statistics.check(open_checkpoint(build_llama(tmp_path / "other", num_hidden_layers=1)))


def test_only_a_few_weights_are_read_to_tell_the_model(llama, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(llama)
    names = [name for name in checkpoint.specs if name.endswith("_proj.weight")]
    writer = StatisticsWriter(tmp_path / "s", 10)
    writer.close(origin_of(llama, weights={name: tensor_sha256(checkpoint.read(name)) for name in names}, shared={}))
    read = []
    monkeypatch.setattr(type(checkpoint), "sha256", lambda self, name: read.append(name) or self.stored.sha256(name))
    Statistics(tmp_path / "s").check(checkpoint)
    assert len(read) <= 5 < len(names) and {min(names), max(names)} <= set(read)


def saved(folder, tensors, **changes):
    origin = {
        "model": "m", "headers_sha256": "0", "weights": {}, "shared": {}, "text": "t", "text_sha256": "0", "tokens": 1, "held_out_tokens": 0, **changes.pop("origin", {}),
    }  # fmt: skip
    metadata = {"format": "qlt-statistics", "version": "1", "origin": json.dumps(origin), **changes}
    save_file(tensors, folder / "s", metadata=metadata)
    return folder / "s"


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"input.w": torch.eye(2)}, {"format": "pt"}, "no calibration statistics"),
        ({"input.w": torch.eye(2)}, {"version": "9"}, "version '9'"),
        ({"input.w": torch.eye(2)}, {"origin": "{}"}, "do not say"),
        ({"input.w": torch.eye(2)}, {"origin": "["}, "do not say"),
        ({"input.w": torch.zeros(2, 3)}, {}, "not a tensor of statistics"),
        ({"input.w": torch.eye(2).half()}, {}, "not a tensor of statistics"),
        ({"mean.w": torch.eye(2)}, {}, "not a tensor of statistics"),
        ({"weight": torch.eye(2)}, {}, "not a tensor of statistics"),
        ({"input.": torch.eye(2)}, {}, "not a tensor of statistics"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, changes, message):
    if isinstance(changes.get("origin"), str):
        save_file(tensors, tmp_path / "s", metadata={"format": "qlt-statistics", "version": "1", "origin": changes["origin"]})
        path = tmp_path / "s"
    else:
        path = saved(tmp_path, tensors, **changes)
    with pytest.raises(CorruptError, match=message):
        Statistics(path)


@pytest.mark.parametrize("origin", [{"shared": {"b": "w"}}, {"weights": {"w": 3}}, {"model": 7}, {"shared": ["w"]}, {"tokens": "many"}])
def test_metadata_that_contradict_the_tensors_are_refused(tmp_path, origin):
    with pytest.raises(CorruptError):
        Statistics(saved(tmp_path, {"mean.w": torch.ones(2)}, origin=origin))


def test_a_truncated_file_is_refused(written):
    data = written.read_bytes()
    written.write_bytes(data[:-3])
    with pytest.raises(CorruptError):
        Statistics(written)
    with pytest.raises(MissingError):
        Statistics(written.with_name("none"))
