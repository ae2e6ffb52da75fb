"""A run that is stopped and resumed ends with the very bytes of one that was not: by signal, by kill, at any step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_tools import api
from qlora_tools.errors import CorruptError, IncompatibleError, Interrupted, MissingError, OutputExistsError
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.state import checkpoints, run_folder
from tests.children import call_in_children, torchrun_environments
from tests.conftest import build_llama
from tests.flows.training_material import adapter_bytes, manifest, untimed, without_estimate_and_picture, write_pairs

STEPS = 8
#: 16 rows in steps of 4: an epoch ends after 4 steps. Ranks grow after 2 and after 4 steps. Evaluations after 3 and 6.
CHOICES = TrainConfig(
    rank=8, start_rank=2, dropout=0.2, neftune=5.0, batch=2, accum=2, steps=STEPS, lr=1e-2, max_len=64, val_share=0.2, eval_every=3,
    samples=("say 3: ",), sample_tokens=3, weight_decay=0.01, loraplus=4.0,
)  # fmt: skip


RUN_AND_STOP = f"{__name__}.run_and_stop"


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL would: nothing is saved any more."""


def at_step(number, act):
    """A listener that calls ``act`` when step ``number`` is done."""

    def listen(event):
        if event.kind == "step" and event.step == number:
            act()

    return listen


def killed():
    raise Killed


def terminated():
    signal.raise_signal(signal.SIGTERM)


def run_and_stop(base, data, output, stop_at, number, resume):
    """A run in a process of its own, which gets the signal ``number`` after step ``stop_at`` (``None``: is left alone) and exits as the command does."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        without_estimate_and_picture(patch)
        listen = at_step(stop_at, lambda: os.kill(os.getpid(), number))
        try:
            api.train(base=base, data=data, config=CHOICES, output=Path(output), listen=listen, resume=resume)
        except Interrupted:
            sys.exit(Interrupted.exit_code)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        without_estimate_and_picture(patch)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="module")
def start(llama, data):
    """``start(output, config, stop)``: a run that goes on where there is something to resume."""

    def call(output, config=CHOICES, listen=lambda event: None, **more):
        return api.train(**{"base": llama, "data": data, "config": config, "output": output, "listen": listen, **more})

    return call


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory):
    """The run without any interruption."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    start(folder)
    return folder


def check_same(folder, straight):
    assert adapter_bytes(folder) == adapter_bytes(straight)
    assert untimed(folder / "metrics.jsonl") == untimed(straight / "metrics.jsonl")
    assert manifest(folder) == manifest(straight)
    assert not run_folder(folder).exists()


@pytest.mark.parametrize("step", [3, 4], ids=lambda step: f"after-{step}")
def test_a_terminated_and_resumed_run_ends_in_the_same_bytes(start, straight, tmp_path, step):
    with pytest.raises(Interrupted, match=f"step {step} of {STEPS}"):
        start(tmp_path / "out", listen=at_step(step, terminated))
    assert not (tmp_path / "out").exists()
    start(tmp_path / "out", resume=True)
    check_same(tmp_path / "out", straight)


def test_a_run_stopped_again_and_again_ends_in_the_same_bytes(start, straight, tmp_path):
    for step in range(1, STEPS):
        with pytest.raises(Interrupted):
            start(tmp_path / "out", listen=at_step(step, terminated), resume=step > 1)
    start(tmp_path / "out", resume=True)
    check_same(tmp_path / "out", straight)


@pytest.mark.parametrize(("step", "from_step"), [(2, 0), (5, 3)])
def test_a_killed_run_goes_on_from_its_last_checkpoint(start, straight, llama, data, tmp_path, step, from_step):
    words = (llama, data, tmp_path / "out", step, signal.SIGKILL, False)
    call_in_children(RUN_AND_STOP, [words], [{}], expected=-signal.SIGKILL)
    kept = checkpoints(run_folder(tmp_path / "out"))
    assert [path.name for path in kept[-1:]] == ([f"step-{from_step:06}"] if from_step else [])
    start(tmp_path / "out", resume=True)
    check_same(tmp_path / "out", straight)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(start, straight, tmp_path, monkeypatch):
    rename = Path.rename

    def torn(self, target):
        if self.name == ".step-000006.partial":
            (self / "state.safetensors").write_bytes(b"half")
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", torn)
    with pytest.raises(Killed):
        start(tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in checkpoints(run_folder(tmp_path / "out"))] == ["step-000003"]
    start(tmp_path / "out", resume=True)
    check_same(tmp_path / "out", straight)


def test_a_run_killed_before_its_output_was_written_only_writes_it(start, straight, tmp_path, monkeypatch):
    from qlora_tools.verbs import train as verb

    monkeypatch.setattr(verb, "write_adapter", lambda *arguments: killed())
    with pytest.raises(Killed):
        start(tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    steps = []
    start(tmp_path / "out", resume=True, listen=lambda event: steps.append(event.kind))
    assert "step" not in steps
    check_same(tmp_path / "out", straight)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_format": "int8", "start_rank": None, "compute": "fp32", "clip": 0.0, "schedule": "linear"},
        {"base_format": "bf16", "start_rank": None, "dora": True, "rank_budget": 3, "rank": 12, "rslora": True},
        {"start_rank": None, "init": "pissa", "checkpointing": "on", "val_share": 0.0},
        {"start_rank": None, "init": "loftq", "pack": True, "dropout": 0.0, "keep": 1, "save_every": 1, "eval_every": 2},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_every_kind_of_run_resumes_bitwise(start, tmp_path, changes):
    config = replace(CHOICES, steps=4, **changes)
    start(tmp_path / "straight", config)
    with pytest.raises(Interrupted):
        start(tmp_path / "out", config, at_step(2, terminated))
    start(tmp_path / "out", config, resume=True)
    check_same(tmp_path / "out", tmp_path / "straight")


def test_ranks_by_need_are_not_measured_again(start, tmp_path, monkeypatch):
    config = replace(CHOICES, start_rank=None, rank_budget=3, rank=12, steps=3)
    with pytest.raises(Interrupted):
        start(tmp_path / "out", config, at_step(1, terminated))
    monkeypatch.setattr("qlora_tools.verbs.training_run.measure_need", lambda *arguments: pytest.fail("measured again"))
    start(tmp_path / "out", config, resume=True)
    assert len(set(json.loads((tmp_path / "out/adapter_config.json").read_text())["rank_pattern"].values())) > 1


def test_a_run_out_of_patience_stops_at_the_same_step_when_it_is_resumed(start, tmp_path):
    config = replace(CHOICES, lr=1.0, patience=1, eval_every=1, steps=40, schedule="constant", clip=0.0, start_rank=None)
    stopped = start(tmp_path / "straight", config).report
    assert stopped.stopped == "early"
    assert stopped.steps < 40
    with pytest.raises(Killed):
        start(tmp_path / "out", config, lambda event: killed() if event.kind == "saved" and event.step == stopped.steps else None)
    again = start(tmp_path / "out", config, resume=True).report
    assert (again.steps, again.stopped, again.best_step) == (stopped.steps, "early", stopped.best_step)
    check_same(tmp_path / "out", tmp_path / "straight")


@pytest.fixture(scope="module")
def stopped(start, tmp_path_factory):
    """A run that was stopped after 3 steps; copy it before use."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.raises(Interrupted):
        start(folder, listen=at_step(3, terminated))
    return folder


@pytest.fixture
def interrupted(stopped, tmp_path):
    shutil.copytree(run_folder(stopped), run_folder(tmp_path / "out"))
    return tmp_path / "out"


def test_other_data_are_refused_with_both_hashes(start, interrupted, tmp_path):
    with pytest.raises(IncompatibleError, match=r"the data have changed: sha256 was [0-9a-f]{16}, is [0-9a-f]{16}") as refused:
        start(interrupted, resume=True, data=write_pairs(tmp_path / "other.jsonl", shift=1))
    assert "the validation data have changed" in str(refused.value)


def test_another_base_is_refused_with_both_hashes(start, interrupted, tmp_path):
    with pytest.raises(IncompatibleError, match=r"the base has changed: sha256 was [0-9a-f]{16}, is [0-9a-f]{16}"):
        start(interrupted, resume=True, base=build_llama(tmp_path / "other", seed=5, tokenizer=True))


def test_other_choices_are_refused_with_both_values(start, interrupted):
    with pytest.raises(IncompatibleError, match=r"lr was 0.01, is 0.5; weight_decay was 0.01, is 0.0"):
        start(interrupted, replace(CHOICES, lr=0.5, weight_decay=0.0), resume=True)


def test_a_refused_resume_changes_nothing(start, interrupted, straight):
    with pytest.raises(IncompatibleError):
        start(interrupted, replace(CHOICES, seed=3), resume=True)
    start(interrupted, resume=True)
    check_same(interrupted, straight)


def test_a_damaged_checkpoint_is_named(start, interrupted):
    path = checkpoints(run_folder(interrupted))[-1] / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptError, match=r"step-000003"):
        start(interrupted, resume=True)


def test_an_interrupted_run_is_neither_overlooked_nor_overwritten(start, interrupted):
    with pytest.raises(OutputExistsError, match="interrupted run lies in"):
        start(interrupted)
    assert checkpoints(run_folder(interrupted))
    result = start(interrupted, replace(CHOICES, steps=1), force=True)
    assert result.report.steps == 1


def test_a_folder_that_is_no_run_is_not_removed_by_force(start, tmp_path):
    run_folder(tmp_path / "out").mkdir()
    (run_folder(tmp_path / "out") / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExistsError, match="something else"):
        start(tmp_path / "out", force=True)
    assert (run_folder(tmp_path / "out") / "mine.txt").exists()


def test_there_must_be_a_run_to_resume(start, tmp_path):
    with pytest.raises(MissingError, match="no interrupted run"):
        start(tmp_path / "out", resume=True)


@pytest.mark.slow
def test_two_processes_are_interrupted_and_resumed_together(start, llama, data, tmp_path):
    def both(name, stop_at=None, resume=False, expected=0):
        words = (llama, data, tmp_path / name, stop_at, signal.SIGTERM, resume)
        call_in_children(RUN_AND_STOP, [words] * 2, torchrun_environments(2), expected)

    both("straight")
    both("out", stop_at=3, expected=Interrupted.exit_code)
    assert not (tmp_path / "out").exists()
    with pytest.raises(IncompatibleError, match="it ran on 2 processes, now on 1"):
        start(tmp_path / "out", resume=True)
    both("out", resume=True)
    check_same(tmp_path / "out", tmp_path / "straight")


def background(here, *words):
    """The real command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(api.__file__).parents[1])}
    command = [sys.executable, "-m", "qlora_tools.cli", "train", *map(str, words)]
    return subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_line(path, kind, step):
    """Until the metrics file tells of ``step``."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and any(
            json.loads(line).get("step", -1) >= step for line in path.read_text().splitlines() if f'"{kind}"' in line and line.endswith("}")
        ):
            return
        time.sleep(0.005)
    raise AssertionError(f"no {kind} {step} in {path}")


@pytest.mark.slow
def test_the_terminated_command_goes_on_by_resume_alone(qlt, here, llama, data):
    words = ["--base", llama, "--data", data, "--rank", 4, "--dropout", 0.2, "--batch", 4, "--steps", 40, "--val-share", 0.2, "--eval-every", 20]
    process = background(here, *words, "-o", "stopped")
    wait_for_line(here / "stopped.run/metrics.jsonl", "step", 10)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "everything is saved in stopped.run" in err
    assert "hint: to go on: qlt train --resume" in err
    assert not (here / "stopped").exists()
    assert qlt("train", "--resume").code == 0
    assert qlt("train", *words, "-o", "straight").code == 0
    assert adapter_bytes(here / "stopped") == adapter_bytes(here / "straight")
    assert untimed(here / "stopped/metrics.jsonl") == untimed(here / "straight/metrics.jsonl")
