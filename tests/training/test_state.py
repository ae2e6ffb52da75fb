"""Checkpoints of a run appear whole, are kept as asked, and come back bit for bit; a run is continued only as what it was."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from qlora_tools.errors import CorruptError, IncompatibleError, MissingError
from qlora_tools.training.state import (
    STATE,
    TENSORS,
    Progressed,
    RunIdentity,
    checkpoints,
    load_state,
    read_ranks,
    read_run,
    run_folder,
    save_state,
    seed_everything,
    write_run,
)

WEIGHTS = {
    "master/a": torch.tensor([[1.5, float("-inf")], [float("nan"), -0.0]]),
    "optimizer/a/step": torch.tensor(3.0),
    "optimizer/a/state1": torch.arange(5, dtype=torch.uint8),
}


def identity(**changes):
    return RunIdentity(**{"config": {"lr": 1e-3, "rank_pattern": (("q", 2),)}, "base_sha256": "b" * 64, "data_sha256": "d" * 64, **changes})


def names(folder):
    return [path.name for path in checkpoints(folder)]


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    progressed = Progressed(step=7, tokens=99, best_loss=1.25, best_step=4, stale=1, seconds=0.5, first_loss=3.0, recent_losses=[3.0, 0.1 + 0.2])
    assert save_state(tmp_path, WEIGHTS, {"a": {"step": 3}}, progressed, keep=2) == "step-000007"
    tensors, plain, found = load_state(tmp_path / "step-000007")
    assert found == progressed
    assert plain == {"a": {"step": 3}}
    assert tensors.keys() == WEIGHTS.keys()
    assert all(tensors[name].numpy().tobytes() == WEIGHTS[name].numpy().tobytes() for name in WEIGHTS)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save_state(tmp_path, WEIGHTS, {}, Progressed(step=step, best_step=min(step, 2)), keep=2)
    assert names(tmp_path) == ["step-000002", "step-000005", "step-000006"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for loss in (2.0, 1.0):
        save_state(tmp_path, WEIGHTS, {}, Progressed(step=1, best_loss=loss), keep=1)
    assert load_state(tmp_path / "step-000001")[2].best_loss == 1.0


def test_more_steps_than_six_digits_stay_in_order(tmp_path):
    for step in (999_999, 1_000_000):
        save_state(tmp_path, WEIGHTS, {}, Progressed(step=step), keep=2)
    assert names(tmp_path) == ["step-999999", "step-1000000"]


def test_half_written_folders_are_no_checkpoints_and_do_not_hinder(tmp_path):
    (tmp_path / ".step-000002.partial").mkdir(parents=True)
    (tmp_path / ".step-000002.partial" / TENSORS).write_bytes(b"half")
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-old").mkdir()
    assert names(tmp_path) == []
    save_state(tmp_path, WEIGHTS, {}, Progressed(step=2), keep=1)
    assert names(tmp_path) == ["step-000002"]
    assert load_state(tmp_path / "step-000002")[2].step == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("progressed"),
        lambda content: content.update(schema="other/1"),
        lambda content: content["progressed"].update(unknown=1),
        lambda content: content.update(optimizer=[1]),
    ],
)
def test_a_damaged_description_is_named(tmp_path, change):
    save_state(tmp_path, WEIGHTS, {}, Progressed(step=2), keep=1)
    path = tmp_path / "step-000002" / STATE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CorruptError, match=r"step-000002.state\.json"):
        load_state(tmp_path / "step-000002")


def test_damaged_tensors_are_named(tmp_path):
    save_state(tmp_path, WEIGHTS, {}, Progressed(step=2), keep=1)
    path = tmp_path / "step-000002" / TENSORS
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CorruptError, match=r"step-000002.state\.safetensors"):
        load_state(tmp_path / "step-000002")


def test_a_run_remembers_what_it_is_and_the_words_that_started_it(tmp_path):
    write_run(tmp_path / "out", identity(), {"base": "org/model", "val": None})
    found, words = read_run(tmp_path / "out")
    assert words == {"base": "org/model", "val": None}
    found.check(identity())
    assert run_folder(tmp_path / "out").name == "out.run"
    assert read_ranks(tmp_path / "out") is None
    assert [path.name for path in run_folder(tmp_path / "out").iterdir()] == ["run.json"]


def test_a_run_remembers_ranks_that_were_measured_for_it(tmp_path):
    write_run(tmp_path / "out", identity(), {}, {"layers.1.q": 3, "layers.0.q": 12})
    assert read_ranks(tmp_path / "out") == {"layers.0.q": 12, "layers.1.q": 3}
    path = run_folder(tmp_path / "out") / "run.json"
    for ranks in ([1], {"q": 0}, {"q": True}, {"q": "2"}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "ranks": ranks}))
        with pytest.raises(CorruptError, match="does not give each module a rank"):
            read_ranks(tmp_path / "out")


def test_there_must_be_a_run(tmp_path):
    with pytest.raises(MissingError, match="out has no interrupted run beside it"):
        read_run(tmp_path / "out")
    run_folder(tmp_path / "out").mkdir()
    for content in ("{}", '{"identity": {"config": {}}, "words": {}}', '{"identity": [], "words": {}}', "[]"):
        (run_folder(tmp_path / "out") / "run.json").write_text(content)
        with pytest.raises(CorruptError):
            read_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"base_sha256": "c" * 64}, f"the base has changed: sha256 was {'b' * 16}, is {'c' * 16}"),
        ({"data_sha256": "c" * 64}, f"the data have changed: sha256 was {'d' * 16}, is {'c' * 16}"),
        ({"val_sha256": "c" * 64}, f"the validation data have changed: sha256 was none, is {'c' * 16}"),
        ({"teacher_sha256": "c" * 64}, f"the teacher has changed: sha256 was none, is {'c' * 16}"),
        ({"world": 2}, "it ran on 1 processes, now on 2"),
        ({"config": {"lr": 2e-3, "rank_pattern": (("q", 2),)}}, "lr was 0.001, is 0.002"),
        ({"config": {"lr": 1e-3, "rank_pattern": (("q", 3),)}}, r"rank_pattern was [['q', 2]], is [['q', 3]]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_is_continued_only_as_what_it_was(changes, text):
    with pytest.raises(IncompatibleError) as refused:
        identity().check(identity(**changes))
    assert text in str(refused.value)


def test_every_generator_follows_the_seed():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    seed_everything(3, "step", 1)
    first = draw()
    seed_everything(3, "step", 1)
    assert draw() == first
    seed_everything(3, "step", 2)
    assert not set(draw()) & set(first)


def test_recent_losses_are_the_last_twenty():
    progressed = Progressed()
    for number in range(30):
        progressed.note_loss(float(number))
    assert progressed.first_loss == 0.0
    assert progressed.recent_losses == [float(number) for number in range(10, 30)]
