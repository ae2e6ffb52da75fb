"""Distillation: the divergence and its gradient, and what a run promises."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import UsageError
from qlora_tools.live.base import load_base
from qlora_tools.quant.nf4 import NF4
from qlora_tools.training import events
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.distill import DivergenceLoss, RefineConfig, WindowRows, distill
from qlora_tools.training.loop import Run, evaluate
from qlora_tools.training.lora import inject, trainable_parameters
from qlora_tools.training.optimizers import Masters
from qlora_tools.training.state import checkpoints
from tests.conftest import build_llama, nudge

CONFIG = RefineConfig(steps=12, batch=2, length=16, lr=3e-3, eval_every=3, compute="fp32", patience=None)
LAYERS = {f"model.layers.{layer}.{part}": 4 for layer in (0, 1) for part in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model that predicts something: its weights are ten times those of a fresh one."""
    return build_llama(tmp_path_factory.mktemp("lively") / "base", initializer_range=0.2)


@pytest.fixture(scope="module")
def tuned(llama, tmp_path_factory):
    """Another one, a low-rank change of it."""
    return nudge(llama, tmp_path_factory.mktemp("lively-tuned") / "tuned", scale=0.3)


def windows(count=12, length=16, seed=0):
    return torch.randint(3, 160, (count, length), generator=torch.Generator().manual_seed(seed))


def make_run(llama, tuned, config=CONFIG, **more):
    base = load_base(open_checkpoint(llama), "language", NF4(), dtype=torch.float32)
    teacher = load_base(open_checkpoint(tuned), "language", None, dtype=torch.float32).model
    model = inject(base.model, LAYERS, TrainConfig(rank=4), "CAUSAL_LM", dtype=torch.float32)
    return Run(
        model=model,
        masters=Masters(trainable_parameters(model)),
        rows=WindowRows(windows()),
        loss=DivergenceLoss(base.model, teacher, temperature=config.temperature),
        config=config.train_config(),
        steps=config.steps,
        held_out=WindowRows(windows(4, seed=9)),
        **more,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tie", [False, True], ids=["head", "no-split"])
def test_divergence_and_gradients_are_those_of_whole_logits_in_float64(llama, tuned, temperature, tie, monkeypatch):
    monkeypatch.setattr("qlora_tools.training.loss.CHUNK_ELEMENTS", 160 * 16)  # several chunks
    if tie:  # a model whose head the split does not know
        monkeypatch.setattr("qlora_tools.training.loss._split_agrees", lambda causal, head: False)
    run = make_run(llama, tuned, replace(CONFIG, temperature=temperature))
    batch = run.rows.batch([0, 3, 5])
    total, correct = run.loss(run.model, batch)
    assert correct is None
    total.backward()
    found = {name: parameter.grad.clone() for name, parameter in run.masters.parameters.items()}
    run.masters.clear()
    student = run.model(**batch.inputs).logits[:, :-1].double() / temperature
    with torch.no_grad():
        teacher = run.loss._teacher(**batch.inputs).logits[:, :-1].double() / temperature
    expected = functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True) * temperature**2
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-4)  # fp32 sums of differences that nearly cancel
    for name, parameter in run.masters.parameters.items():
        assert torch.allclose(found[name], parameter.grad, rtol=2e-3, atol=1e-4 * float(parameter.grad.norm()) + 1e-7), name


def test_the_teacher_after_itself_diverges_by_nothing(llama):
    model = load_base(open_checkpoint(llama), "language", None, dtype=torch.float32).model
    total, _ = DivergenceLoss(model, model)(model, WindowRows(windows()).batch([0, 1]))
    assert abs(float(total.detach())) < 1e-4


def test_a_run_ends_no_worse_than_it_began_and_measures_what_it_hands_back(llama, tuned):
    run = make_run(llama, tuned)
    heard = []
    run.listen = heard.append
    made = distill(run, stored=lambda name, value: value.bfloat16().float())
    assert made.end_kl < made.start_kl
    assert not made.kept_start
    assert all(torch.equal(value, value.bfloat16().float()) for value in made.values.values())
    assert evaluate(run, run.held_out)[0] == pytest.approx(made.end_kl)
    evaluations = [event for event in heard if isinstance(event, events.Evaluation)]
    assert evaluations[0].step == 0
    assert evaluations[0].loss == pytest.approx(made.start_kl)
    assert min(event.loss for event in evaluations) == pytest.approx(made.end_kl, rel=0.05)  # bf16 rounding apart


def test_a_run_that_finds_nothing_better_gives_its_start_back(llama, tuned):
    run = make_run(llama, tuned, replace(CONFIG, lr=3.0, schedule="constant", clip=0.0, warmup=0.0))
    before = {name: value.clone() for name, value in run.masters.values.items()}
    made = distill(run)
    assert made.kept_start
    assert made.end_kl == made.start_kl
    assert made.best_step == 0
    assert all(torch.equal(made.values[name], value) for name, value in before.items())


def test_rounding_that_undoes_the_gain_gives_the_start_back(llama, tuned):
    run = make_run(llama, tuned)
    made = distill(run, stored=lambda name, value: torch.full_like(value, 0.3))
    assert made.kept_start
    assert made.end_kl == made.start_kl


def test_the_best_evaluation_is_taken_in_memory_and_from_a_folder_alike(llama, tuned, tmp_path):
    rough = replace(CONFIG, lr=0.05, schedule="constant", steps=8, eval_every=1)
    first = distill(make_run(llama, tuned, rough))
    second = distill(make_run(llama, tuned, rough, folder=tmp_path))
    assert first.best_step == second.best_step
    assert all(torch.equal(value, second.values[name]) for name, value in first.values.items())


def test_an_interrupted_run_resumed_is_the_run(llama, tuned, tmp_path):
    whole = distill(make_run(llama, tuned, folder=tmp_path / "a"))
    run = make_run(llama, tuned, folder=tmp_path / "b")

    def stop(event):
        if isinstance(event, events.Step) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    run.listen = stop
    first = distill(run)
    assert first.stopped == "interrupted"
    again = distill(make_run(llama, tuned, folder=tmp_path / "b"), resume_from=checkpoints(tmp_path / "b")[-1])
    assert (again.end_kl, again.best_step, again.start_kl) == (whole.end_kl, whole.best_step, whole.start_kl)
    assert all(torch.equal(value, again.values[name]) for name, value in whole.values.items())


def test_rows_predict_the_next_token_everywhere_but_at_the_end():
    rows = WindowRows(windows(3, 5))
    batch = rows.batch([2, 0])
    assert torch.equal(batch.targets[:, :-1], batch.inputs["input_ids"][:, 1:])
    assert (batch.targets[:, -1] == -100).all()
    assert (batch.count, batch.tokens, rows.tokens_per_epoch, len(rows)) == (8, 10, 15, 3)
    assert rows.sha256 != WindowRows(windows(3, 5, seed=1)).sha256


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": math.nan}, {"base_format": "fp4"}, {"length": 1}, {"schedule": "steps"}, {"held_out": 0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        RefineConfig(**wrong)
