"""What ``qlt train`` refuses, before it writes anything, and how it says so; and runs that fail on the way."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from qlora_tools.training import loop
from qlora_tools.verbs import train as verb
from tests.flows.conftest import files
from tests.flows.training_material import build, without_estimate_and_picture, write_images, write_labelled, write_pairs

SHORT = ["--rank", 4, "--batch", 4, "--steps", 3, "--max-len", 64]


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    if "estimated" not in request.fixturenames:
        without_estimate_and_picture(monkeypatch)


@pytest.fixture
def estimated():
    """Asks for the memory estimate that the other tests do without."""


@pytest.fixture
def train(qlt, here, llama):
    """``qlt train`` on ``data.jsonl``; checks that a refusal leaves nothing but the data."""
    write_pairs(here / "data.jsonl")

    def call(*words, base=llama, data="data.jsonl"):
        before = sorted(here.rglob("*"))
        done = qlt("train", "--base", base, "--data", data, *SHORT, "-o", "out", *words)
        if done.code:
            assert sorted(path for path in here.rglob("*") if ".qlt" not in path.parts) == before
        return done

    return call


def test_a_malformed_line_is_named(train, here):
    with (here / "data.jsonl").open("a") as file:
        file.write('{"prompt": "a", "completion": \n')
    done = train()
    assert done.code == 4
    assert "data.jsonl, line 21" in done.err or "data.jsonl:21" in done.err


def test_a_record_without_its_field_is_named(train, here):
    (here / "data.jsonl").write_text('{"text": "a b c"}\n{"txt": "d"}\n')
    done = train()
    assert done.code in (3, 4)
    assert "2" in done.err


def test_a_template_that_refuses_a_conversation_is_named_with_its_line(train, here, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (here / "data.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    done = train(base=tmp_path / "chat")
    assert done.code == 3
    assert "chat template refuses this conversation (user, assistant): no such role" in done.err


def test_messages_without_a_template_are_refused(train, here):
    (here / "data.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}) + "\n")
    done = train()
    assert done.code == 3
    assert "template" in done.err


def test_long_examples_are_counted_and_named(train):
    done = train("--max-len", 14)
    assert done.code == 0
    assert "examples were cut: too long (lines " in done.err


def test_examples_are_cut_at_the_context_of_the_model(train, here):
    (here / "data.jsonl").write_text(json.dumps({"text": "abc " * 200}) + "\n")
    done = train("--max-len", 4096)
    assert done.code == 0
    assert "cut at 128 tokens, the model's context" in done.err


def test_a_target_that_matches_nothing_lists_the_linears_and_the_nearest(train):
    done = train("--targets", "q_project")
    assert done.code == 2
    assert "q_proj" in done.err
    assert "down_proj" in done.err


def test_a_rank_pattern_that_matches_nothing_is_refused(train):
    assert train("--rank-pattern", "layers.7=2").code == 2


def test_a_rank_above_a_layer_is_refused(train):
    done = train("--rank", 60)
    assert done.code == 2
    assert "the rank must lie between 1 and the smaller side" in done.err


def test_a_base_without_a_tokenizer_is_refused(train, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    done = train(base=tmp_path / "mute")
    assert done.code == 9
    assert "holds no tokenizer" in done.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--init", "loftq", "--bf16"], "--init loftq splits weights"),
        (["--dora", "--init", "pissa"], "--dora with --init pissa"),
        (["--start-rank", 2, "--dora"], "progressive ranks need plain LoRA"),
        (["--start-rank", 8], "start_rank 8 is above rank 4"),
        (["--epochs", 1], "both say how long to train"),
        (["--lr", -1], "lr -1.0 is not a positive number"),
        (["--rank-budget", 5], "a mean rank of 5 is not between 1 and the largest rank, 4"),
        (["--task", "image"], "--task image, but the data are for the task language"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_senseless_choices_are_usage_errors(train, words, text):
    done = train(*words)
    assert done.code == 2
    assert text in done.err


def test_a_held_out_file_of_another_task_is_refused(train, here):
    write_labelled(here / "val.jsonl")
    done = train("--val", "val.jsonl")
    assert done.code == 2
    assert "another task" in done.err


def test_a_teacher_with_another_vocabulary_is_refused(train, tmp_path):
    from tests.conftest import build_llama

    done = train("--teacher", build_llama(tmp_path / "teacher", vocab_size=176))
    assert done.code == 3
    assert "the teacher predicts 176 tokens, the base 160" in done.err


def test_what_only_language_models_have_is_refused_for_others(train, here, tmp_path, llama):
    write_labelled(here / "labelled.jsonl")
    bert = build("bert", tmp_path / "bert")
    assert "--pack with the task classification" in train("--pack", base=bert, data="labelled.jsonl").err
    assert "--teacher with the task classification" in train("--teacher", llama, base=bert, data="labelled.jsonl").err


def test_a_model_that_cannot_recompute_is_refused_only_when_told_to(train, here, tmp_path):
    resnet, images = build("resnet", tmp_path / "resnet"), write_images(tmp_path / "images", 4)
    done = train("--checkpointing", "on", base=resnet, data=images)
    assert done.code == 8
    assert "cannot compute its activations again" in done.err
    assert train(base=resnet, data=images).code == 0


def test_out_of_memory_comes_with_alternatives_that_were_computed(train, monkeypatch, estimated):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(verb, "prepare_run", full)
    monkeypatch.setattr("qlora_tools.training.estimate._PATIENCE_SECONDS", float("inf"))
    done = train("--int8")
    assert done.code == 10
    assert "out of memory" in done.err
    assert "GB were estimated" in done.err
    assert "--batch 2 --accum 2: " in done.err
    assert "--checkpointing on: " in done.err
    assert "--nf4: " in done.err


def test_out_of_memory_of_the_cpu_is_recognised_in_the_middle_of_a_run(train, monkeypatch, here):
    step = loop.backward

    def full(run, batch, targets):
        if run.progressed.step == 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return step(run, batch, targets)

    monkeypatch.setattr(loop, "backward", full)
    assert train("--save-every", 3).code == 10
    assert not (here / "out.run").exists()


def test_another_error_is_not_taken_for_a_lack_of_memory(train, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(verb, "prepare_run", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train()


@pytest.mark.parametrize(("what", "text"), [("loss", "the loss is nan at step 2"), ("gradient", "the gradient's norm is nan at step 2")])
def test_a_nan_stops_the_run_by_name(train, monkeypatch, what, text):
    step = loop.backward

    def poisoned(run, batch, targets):
        found = step(run, batch, targets)
        if run.progressed.step != 1:
            return found
        if what == "loss":
            return found * float("nan")
        next(iter(run.masters.values.values())).grad.fill_(float("nan"))
        return found

    monkeypatch.setattr(loop, "backward", poisoned)
    done = train("--save-every", 3)
    assert done.code == 6
    assert text in done.err


def test_a_run_that_fails_after_a_checkpoint_keeps_it(qlt, here, llama, monkeypatch):
    write_pairs(here / "data.jsonl")
    step = loop.backward
    words = ["train", "--base", llama, "--data", "data.jsonl", *SHORT, "--save-every", 1, "-o", "out"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "backward", lambda run, batch, targets: step(run, batch, targets) * (float("nan") if run.progressed.step == 2 else 1))
        assert qlt(*words).code == 6
    assert (here / "out.run/step-000002").is_dir()
    assert qlt(*words).code == 7
    assert qlt("train", "--resume", "-o", "out").code == 0


def test_an_input_in_the_output_is_not_lost_with_it(qlt, here, llama):
    write_pairs(here / "data.jsonl")
    words = ["train", "--base", llama, "--data", "data.jsonl", *SHORT, "-o", "out"]
    assert qlt(*words).code == 0
    write_pairs(here / "out/pairs.jsonl")
    (here / "out/text.txt").write_text("To be, or not to be. " * 300)
    shutil.copytree(llama, here / "out/model")
    before = files(here)
    for given in (
        ["--data", "out/pairs.jsonl"],
        ["--val", "out/pairs.jsonl"],
        ["--teacher", "out/model"],
        ["--init", "out"],
        ["--init", "qera", "--calib", "out/text.txt"],
    ):
        for dry_run in ([], ["--dry-run"]):
            done = qlt(*words, *given, "--force", *dry_run)
            assert done.code == 2 and "overlaps the input" in done.err, (given, done.err)
    assert files(here) == before
