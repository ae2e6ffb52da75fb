"""The training loop: a step does not depend on how its rows are divided, over micro-batches or over processes."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import NonFiniteError
from qlora_tools.live.base import load_base
from qlora_tools.training import loop
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.loop import Run, evaluate, grow, interruptions, micro_batches, neftune, restore, train, train_mode
from qlora_tools.training.lora import choose_modules, inject, rank_of, trainable_parameters
from qlora_tools.training.loss import LanguageLoss
from qlora_tools.training.masks import Example
from qlora_tools.training.optimizers import Masters
from qlora_tools.training.rows import LanguageRows
from qlora_tools.training.state import checkpoints
from qlora_tools.training.world import World, processes
from tests.children import call_in_children, torchrun_environments

CONFIG = TrainConfig(base_format="bf16", rank=4, steps=3, lr=1e-2, batch=8, compute="fp32")


def rows_of_unequal_lengths(count=16, seed=0):
    """1 to 40 targets a row, so that a mean of means would be far from the mean."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        length = 3 + (37 if number % 4 == 0 else number % 5)
        trained = torch.ones(length, dtype=torch.bool).numpy()
        trained[: 2 if number % 3 else 1] = False
        examples.append(Example(torch.randint(3, 160, (length,), generator=generator).int().numpy(), trained, number))
    return LanguageRows(examples, max_len=64)


def make_run(model_folder, config=CONFIG, world=None, **more):
    checkpoint = open_checkpoint(Path(model_folder))
    base = load_base(checkpoint, "language", None, dtype=torch.float32)
    modules = choose_modules(base.model, checkpoint.family, config.targets)
    model = inject(base.model, rank_of(base.model, modules, config), config, "CAUSAL_LM", dtype=torch.float32)
    masters = Masters(trainable_parameters(model))
    return Run(
        model=model,
        masters=masters,
        rows=rows_of_unequal_lengths(),
        loss=LanguageLoss(base.model),
        config=config,
        steps=config.steps,
        world=world or World(),
        **more,
    )


def trained(run):
    losses = []
    run.listen = lambda event: losses.append(event.loss) if event.kind == "step" else None
    train(run)
    return losses, {name: value.detach().clone() for name, value in run.masters.values.items()}


def check_equal(found, expected, tolerance=1e-5):
    (losses, values), (expected_losses, expected_values) = found, expected
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    assert values.keys() == expected_values.keys()
    for name, value in values.items():
        assert (value - expected_values[name]).abs().max() <= tolerance * max(1.0, float(expected_values[name].abs().max())), name


@pytest.fixture(scope="module")
def whole(llama):
    """Three steps of eight rows at once."""
    return trained(make_run(llama))


@pytest.mark.parametrize(("batch", "accum"), [(1, 8), (2, 4), (4, 2)])
def test_eight_rows_are_one_step_however_they_are_accumulated(llama, whole, batch, accum):
    check_equal(trained(make_run(llama, replace(CONFIG, batch=batch, accum=accum))), whole)


def test_the_loss_of_a_step_is_the_mean_over_all_of_its_targets(llama):
    run = make_run(llama, replace(CONFIG, batch=2, accum=4, steps=1))
    chosen = [int(row) for part in next(micro_batches(run)) for row in part]
    total = count = 0.0
    with torch.no_grad():
        for row in chosen:
            batch = run.rows.batch([row])
            logits = run.model(**batch.inputs).logits.double()
            total += float(torch.nn.functional.cross_entropy(logits[0], batch.targets[0], ignore_index=-100, reduction="sum"))
            count += batch.count
    losses, _ = trained(run)
    assert losses == pytest.approx([total / count], rel=1e-5)


def test_a_step_takes_rows_from_where_the_last_one_stopped(llama):
    run = make_run(llama, replace(CONFIG, batch=3, accum=2))
    source = micro_batches(run)
    steps = [[row for part in next(source) for row in part.tolist()] for _ in range(8)]
    assert sorted(row for rows in steps for row in rows) == sorted(list(range(16)) * 3)
    run.progressed.step = 5
    assert [row for part in next(micro_batches(run)) for row in part.tolist()] == steps[5]


def test_processes_share_the_rows_of_a_step(llama):
    run = make_run(llama, replace(CONFIG, batch=4))
    taken = []
    for rank in range(2):
        run.world = World(rank, 2)
        taken.append([row for part in next(micro_batches(run)) for row in part.tolist()])
    run.world, run.config = World(), replace(CONFIG, batch=8)
    assert sorted(taken[0] + taken[1]) == sorted(row for part in next(micro_batches(run)) for row in part.tolist())
    assert len(taken[0]) == len(taken[1]) == 4


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_accumulation(llama, tmp_path):
    """Also: the second process writes nothing, both see one evaluation, and a signal to one of them stops both."""
    environments = torchrun_environments(2)
    call_in_children(f"{__name__}.one_of_two", [(llama, tmp_path)] * 2, environments)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    one = make_run(llama, replace(CONFIG, batch=2, accum=4))
    losses, values = trained(one)
    check_equal((first.pop("losses").tolist(), {name: value for name, value in first.items() if name != "evaluation"}), (losses, values), 1e-4)
    assert float(first["evaluation"]) == pytest.approx(evaluate(one, one.rows)[0], rel=1e-4)
    assert (tmp_path / "run0/step-000002").is_dir()
    assert not (tmp_path / "run1").exists()


def one_of_two(base, folder):
    """What each process of the test above does: train, and be interrupted by a signal that only the second one gets."""
    torch.set_num_threads(1)
    with processes("cpu") as (world, _):
        run = make_run(base, replace(CONFIG, batch=2, accum=2), world)
        losses, values = trained(run)
        evaluation = torch.tensor(evaluate(run, run.rows)[0])
        save_file({**values, "losses": torch.tensor(losses), "evaluation": evaluation}, Path(folder) / f"rank{world.rank}.safetensors")
        stopped = make_run(base, replace(CONFIG, batch=2, accum=2, save_every=100), world, folder=Path(folder) / f"run{world.rank}")
        stopped.listen = lambda event: signal.raise_signal(signal.SIGTERM) if event.kind == "step" and event.step == 2 and world.rank == 1 else None
        assert train(stopped) == "interrupted"
        assert stopped.progressed.step == 2


def test_the_second_signal_does_not_wait_unless_it_is_an_echo_of_the_first(monkeypatch):
    with pytest.raises(KeyboardInterrupt), interruptions() as interrupted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupted()
        monkeypatch.setattr(loop, "SAME_WISH_SECONDS", 0.0)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_growing_changes_neither_the_function_nor_the_masters(llama):
    run = make_run(llama, replace(CONFIG, start_rank=1, steps=8))
    ids = torch.arange(3, 20)[None]
    assert sorted(run.growth.items()) == [(0, 1), (2, 2), (4, 4)]
    train(replace_steps(run, 2))
    run.model.eval()
    before = run.model(input_ids=ids).logits.detach()
    masters = {name: value.detach().clone() for name, value in run.masters.values.items()}
    grow(run)
    assert run.rank == 2
    torch.testing.assert_close(run.model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
    for name, value in run.masters.values.items():
        kept = value[tuple(slice(0, extent) for extent in masters[name].shape)]
        assert torch.equal(kept, masters[name])
        assert run.optimizer.state[value]["exp_avg"].shape == value.shape


def replace_steps(run, steps):
    """The same run ending after ``steps``."""
    run.steps = steps
    return run


def test_a_restored_run_holds_what_was_saved(llama, tmp_path):
    config = replace(CONFIG, start_rank=2, steps=6, save_every=1, keep=9)
    run = make_run(llama, config, folder=tmp_path)
    train(replace_steps(run, 4))
    again = make_run(llama, config)
    restore(again, checkpoints(tmp_path)[-1])
    assert (again.progressed.step, again.rank) == (4, 4)
    for name, value in run.masters.values.items():
        assert torch.equal(again.masters.values[name], value)
        for entry, found in run.optimizer.state[value].items():
            assert torch.equal(again.optimizer.state[again.masters.values[name]][entry], found)
    assert all(torch.equal(again.masters.parameters[name], parameter) for name, parameter in run.masters.parameters.items())


def test_an_evaluation_is_the_mean_over_targets_and_leaves_no_trace(llama):
    run = make_run(llama, replace(CONFIG, batch=3, dropout=0.5))
    state = torch.random.get_rng_state()
    loss, accuracy = evaluate(run, run.rows)
    assert accuracy is None
    assert torch.equal(torch.random.get_rng_state(), state)
    total = count = 0.0
    with torch.no_grad():
        for row in range(len(run.rows)):
            part, _ = run.loss(run.model.eval(), run.rows.batch([row]))
            total, count = total + float(part), count + run.rows.batch([row]).count
    assert loss == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("save_every", [1, 2])
def test_a_checkpoint_is_written_once_a_step(llama, tmp_path, save_every):
    saved = []
    config = replace(CONFIG, eval_every=1, save_every=save_every, keep=9)
    run = make_run(llama, config, folder=tmp_path, held_out=rows_of_unequal_lengths(4, seed=1))
    run.listen = lambda event: saved.append(event.step) if event.kind == "saved" else None
    train(run)
    assert saved == sorted(set(saved))
    assert {run.progressed.best_step, 2, 3} <= set(saved)


def test_a_held_out_loss_that_is_no_number_stops_the_run(llama):
    run = make_run(llama, held_out=rows_of_unequal_lengths(4, seed=1))
    loss = run.loss
    run.loss = lambda model, batch: loss(model, batch) if model.training else (torch.tensor(float("nan")), None)
    with pytest.raises(NonFiniteError, match="held-out rows is nan after step 1"):
        train(run)


def test_noise_on_embeddings_has_the_size_of_its_paper_and_stops_with_training(llama):
    run = make_run(llama)
    embedding, ids = run.model.get_input_embeddings(), torch.arange(3, 43)[None]
    clean = embedding(ids)
    with neftune(run.model, 5.0):
        train_mode(run.model)
        noise = embedding(ids) - clean
        run.model.eval()
        assert torch.equal(embedding(ids), clean)
    bound = 5.0 / (40 * 64) ** 0.5
    assert 0.95 * bound < float(noise.abs().max()) <= bound * (1 + 1e-6)
    assert torch.equal(embedding(ids), clean)
