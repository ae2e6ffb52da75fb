"""Masters, groups, schedules and the optimizer's state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from qlora_tools.errors import UnsupportedError
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.optimizers import Masters, export_state, import_state, make_optimizer, rate_factor, set_rate, warmup_steps

A, B, BIAS, MAGNITUDE, HEAD = (
    "base_model.model.q.lora_A.weight",
    "base_model.model.q.lora_B.weight",
    "base_model.model.score.bias",
    "base_model.model.q.lora_magnitude_vector",
    "base_model.model.score.weight",
)


def parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {B: (6, 3), A: (3, 5), BIAS: (4,), MAGNITUDE: (6,), HEAD: (4, 6)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def push(masters: Masters, seed: int, scale: float = 1.0) -> None:
    """Gradients in the model, as after a backward pass, and then in the masters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in masters.parameters.values():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)
    masters.gather()


def test_masters_keep_the_steps_that_bf16_would_lose() -> None:
    parameter = nn.Parameter(torch.ones(2, 2).bfloat16())
    masters = Masters({A: parameter})
    optimizer = make_optimizer(masters, TrainConfig(lr=1e-4))
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        masters.gather()
        optimizer.step()
        masters.publish()
        masters.clear()
    torch.testing.assert_close(masters.values[A], torch.full((2, 2), 0.99), rtol=0, atol=1e-5)
    assert torch.equal(parameter, torch.full((2, 2), 0.99).bfloat16())
    lost = torch.ones(2, 2).bfloat16()
    for _ in range(100):
        lost -= 1e-4
    assert torch.equal(lost, torch.ones(2, 2).bfloat16())  # what the model alone would have learned


def test_gradients_of_micro_batches_are_summed_in_fp32() -> None:
    parameter = nn.Parameter(torch.zeros(1).bfloat16())
    masters = Masters({A: parameter})
    for _ in range(600):
        parameter.grad = torch.ones_like(parameter)
        masters.gather()
        assert parameter.grad is None
    assert float(masters.values[A].grad) == 600.0  # type: ignore[arg-type]
    parameter.grad = torch.ones_like(parameter)
    masters.clear()
    assert parameter.grad is None and float(masters.values[A].grad) == 0.0  # type: ignore[arg-type]


def test_masters_are_copies_even_of_fp32_parameters() -> None:
    made = parameters(torch.float32)
    masters = Masters(made)
    masters.values[A].add_(1.0)
    assert not torch.equal(made[A], masters.values[A])
    masters.publish()
    assert torch.equal(made[A], masters.values[A]) and made[A].requires_grad


@pytest.mark.parametrize("largest", [0.5, 1e9])
def test_clipping_is_torchs(largest: float) -> None:
    masters = Masters(parameters())
    push(masters, 1, 10.0)
    twins = [nn.Parameter(value.clone()) for value in masters.values.values()]
    for twin, value in zip(twins, masters.values.values(), strict=True):
        twin.grad = value.grad.clone()  # type: ignore[union-attr]
    reference = math.sqrt(sum(float(twin.grad.double().square().sum()) for twin in twins))  # type: ignore[union-attr]
    norm = masters.clip(largest)
    assert norm == float(torch.nn.utils.clip_grad_norm_(twins, largest)) == pytest.approx(reference, rel=1e-5)
    for twin, value in zip(twins, masters.values.values(), strict=True):
        assert torch.equal(twin.grad, value.grad)  # type: ignore[arg-type]


def test_a_clip_of_zero_only_measures() -> None:
    masters = Masters(parameters())
    push(masters, 1)
    before = masters.flat_gradients()
    assert masters.clip(0.0) == pytest.approx(float(before.norm()), rel=1e-6)
    assert torch.equal(masters.flat_gradients(), before)


def test_flat_gradients_come_back_in_place() -> None:
    masters, others = Masters(parameters()), Masters(dict(reversed(parameters().items())))  # another order of the same names
    push(masters, 1)
    flat = masters.flat_gradients()
    assert flat.numel() == sum(value.numel() for value in masters.values.values())
    others.set_flat_gradients(flat)
    for name, value in masters.values.items():
        assert torch.equal(others.values[name].grad, value.grad)  # type: ignore[arg-type]


def test_schedules_have_the_values_of_their_formulas() -> None:
    def rates(**choices: Any) -> list[float]:
        return [rate_factor(TrainConfig(**choices), step, 10) for step in range(10)]

    assert rates(warmup=0, schedule="constant") == [1.0] * 10
    assert rates(warmup=4, schedule="constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(warmup=0, schedule="linear") == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates(warmup=2, schedule="linear") == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = rates(warmup=2, schedule="cosine")
    assert cosine[:3] == [0.5, 1.0, 1.0] and cosine[6] == pytest.approx(0.5)
    assert cosine == sorted(cosine[:2]) + sorted(cosine[2:], reverse=True) and cosine[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_warmup_is_steps_or_a_share() -> None:
    assert [warmup_steps(TrainConfig(warmup=warmup), 200) for warmup in (0, 0.03, 0.5, 1, 7)] == [0, 6, 100, 1, 7]
    assert rate_factor(TrainConfig(warmup=30), 9, 10) == pytest.approx(10 / 30)  # longer than the run


def by_name(masters: Masters, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    names = {id(value): name for name, value in masters.values.items()}
    return {names[id(value)]: group for group in optimizer.param_groups for value in group["params"]}


def test_lora_plus_speeds_up_b_alone() -> None:
    masters = Masters(parameters())
    optimizer = make_optimizer(masters, TrainConfig(lr=1e-3, loraplus=16.0))
    assert set_rate(optimizer, 0.5) == pytest.approx(5e-4)  # A's
    rates = {name: group["lr"] for name, group in by_name(masters, optimizer).items()}
    assert rates == pytest.approx({name: 8e-3 if name == B else 5e-4 for name in rates})


def test_weight_decay_is_for_matrices() -> None:
    masters = Masters({**parameters(), "base_model.model.norm.weight": nn.Parameter(torch.ones(6))})
    decays = {name: group["weight_decay"] for name, group in by_name(masters, make_optimizer(masters, TrainConfig(weight_decay=0.1))).items()}
    assert {name for name, decay in decays.items() if decay} == {A, B, HEAD}


def test_steps_are_those_of_adamw_on_fp32_parameters() -> None:
    masters = Masters(parameters())
    twins = {name: nn.Parameter(value.double()) for name, value in masters.values.items()}
    config = TrainConfig(lr=1e-2, weight_decay=0.1, loraplus=4.0)
    optimizer = make_optimizer(masters, config)
    groups = [{"params": [twin], "lr": config.lr * (4.0 if name == B else 1.0), "weight_decay": 0.1 if twin.ndim > 1 else 0.0} for name, twin in twins.items()]
    reference = torch.optim.AdamW(groups)
    for step in range(5):
        masters.clear()
        push(masters, step)
        for name, twin in twins.items():
            twin.grad = masters.values[name].grad.double()  # type: ignore[union-attr]
        optimizer.step()
        reference.step()
    for name, twin in twins.items():
        torch.testing.assert_close(masters.values[name].double(), twin.detach(), rtol=1e-5, atol=1e-6)


def test_a_restored_state_continues_bit_for_bit() -> None:
    config = TrainConfig(lr=1e-2, weight_decay=0.05, loraplus=2.0)

    def run(masters: Masters, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            masters.clear()
            push(masters, step)
            set_rate(optimizer, rate_factor(config, step, 10))
            optimizer.step()
            masters.publish()

    straight = Masters(parameters())
    optimizer = make_optimizer(straight, config)
    run(straight, optimizer, range(3))
    values = {name: value.clone() for name, value in straight.values.items()}
    tensors, plain = export_state(optimizer, straight.values, straight)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    run(straight, optimizer, range(3, 6))

    resumed = Masters(parameters())
    with torch.no_grad():
        for name, value in resumed.values.items():
            value.copy_(values[name])
    fresh = make_optimizer(resumed, config)
    import_state(fresh, tensors, plain, resumed)
    run(resumed, fresh, range(3, 6))
    for name, value in straight.values.items():
        assert torch.equal(value, resumed.values[name]) and torch.equal(straight.parameters[name], resumed.parameters[name])
    assert float(tensors[f"{A}/step"]) == 3.0  # the state that was handed over is not shared with the one that goes on


def test_a_new_optimizer_has_no_state() -> None:
    masters = Masters(parameters())
    optimizer = make_optimizer(masters, TrainConfig())
    assert export_state(optimizer, masters.values, masters) == ({}, {})
    import_state(optimizer, {}, {}, masters)
    assert not optimizer.state


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device they run")
@pytest.mark.parametrize("optim", ["adamw8bit", "paged-adamw8bit", "paged-adamw"])
def test_optimizers_of_bitsandbytes_are_refused_by_name_without_cuda(optim: str) -> None:
    with pytest.raises(UnsupportedError, match=f"--optim {optim} .* no CUDA device") as raised:
        make_optimizer(Masters(parameters()), TrainConfig(optim=optim))
    assert "adamw" in str(raised.value.hint)


@pytest.mark.gpu
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit", "paged-adamw8bit", "paged-adamw"])
def test_every_optimizer_continues_on_a_gpu(optim: str) -> None:
    def made() -> tuple[Masters, torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        masters = Masters({A: nn.Parameter(torch.randn(64, 128, generator=generator).cuda().bfloat16())})
        return masters, make_optimizer(masters, TrainConfig(lr=1e-2, optim=optim))

    def step(masters: Masters, optimizer: torch.optim.Optimizer, seed: int) -> None:
        masters.clear()
        masters.parameters[A].grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)).cuda().bfloat16()
        masters.gather()
        optimizer.step()

    straight, optimizer = made()
    step(straight, optimizer, 1)
    resumed, fresh = made()
    tensors, plain = export_state(optimizer, straight.values, straight)
    import_state(fresh, {key: tensor.cpu() for key, tensor in tensors.items()}, plain, resumed)
    with torch.no_grad():
        resumed.values[A].copy_(straight.values[A])
    for masters, its in ((straight, optimizer), (resumed, fresh)):
        step(masters, its, 2)
    assert torch.equal(straight.values[A], resumed.values[A])
