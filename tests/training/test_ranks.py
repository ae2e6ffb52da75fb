"""Ranks that grow without a jump, and ranks by need within a budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_tools.errors import NonFiniteError, UsageError
from qlora_tools.models.family import family_of
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.lora import adapter_state, choose_modules, inject, lora_layers, rank_of, sides, trainable_parameters
from qlora_tools.training.ranks import by_need, growth, measure_need, pad_state, widen
from tests.adapters.tiny_models import gpt2, llama
from tests.training.test_lora import freeze, loaded_by_peft, logits, moved, ready, resnet


@pytest.mark.parametrize(
    ("start", "final", "steps", "expected"),
    [
        (2, 16, 600, [(0, 2), (100, 4), (200, 8), (300, 16)]),
        (3, 16, 60, [(0, 3), (10, 6), (20, 12), (30, 16)]),
        (8, 8, 10, [(0, 8)]),
        (2, 16, 4, [(0, 4), (1, 8), (2, 16)]),
        (1, 64, 1, [(0, 64)]),
        (None, 16, 100, []),
    ],
)
def test_ranks_double_up_to_the_middle_of_the_run(start: int | None, final: int, steps: int, expected: list[tuple[int, int]]) -> None:
    assert growth(TrainConfig(rank=final, start_rank=start), steps) == expected


@given(final=st.integers(1, 300), steps=st.integers(1, 5000), data=st.data())
def test_growth_ends_at_the_final_rank_by_the_middle(final: int, steps: int, data: Any) -> None:
    found = growth(TrainConfig(rank=final, start_rank=data.draw(st.integers(1, final))), steps)
    assert found[0][0] == 0 and found[-1][1] == final and found[-1][0] <= steps // 2
    assert all(early[0] < late[0] and early[1] < late[1] for early, late in pairwise(found))


@pytest.mark.parametrize("build", [llama, gpt2, resnet])
@pytest.mark.parametrize("rslora", [False, True])
def test_widening_changes_nothing_yet_and_gives_the_new_directions_a_gradient(build: Any, rslora: bool) -> None:
    config = TrainConfig(rank=6, start_rank=2, rslora=rslora, rank_pattern=(("q_proj|c_proj|layer.0", 4),))
    ours = moved(ready(build, config))
    before, scales = logits(ours), {path: layer.scaling["default"] for path, layer in lora_layers(ours).items()}
    old = dict(trainable_parameters(ours))
    new = widen(ours, 6, config.seed)
    torch.testing.assert_close(logits(ours), before, atol=1e-6, rtol=1e-5)
    assert new.keys() == old.keys() and all(new[key] is parameter for key, parameter in trainable_parameters(ours).items())
    assert {path: layer.scaling["default"] for path, layer in lora_layers(ours).items()} == scales
    for key, value in new.items():
        known = tuple(slice(0, extent) for extent in old[key].shape)
        assert torch.equal(value[known], old[key])
        if "lora_B" in key:
            assert not value[:, old[key].shape[1] :].any()
        else:
            assert value[old[key].shape[0] :].abs().min() > 0
    ranks = {path: layer.r["default"] for path, layer in lora_layers(ours).items()}
    assert ranks == {path: layer.final_rank for path, layer in lora_layers(ours).items()}
    loss = ours(pixel_values=torch.randn(2, 3, 32, 32)) if build is resnet else ours(input_ids=torch.tensor([[1, 2, 3, 4]]))
    loss.logits.square().sum().backward()
    assert all(value.grad is not None and value.grad[:, 2:].any() for key, value in new.items() if "lora_B" in key)


def test_steps_of_growth_do_not_matter_to_what_is_drawn() -> None:
    config = TrainConfig(rank=8, start_rank=2)
    at_once, by_steps = ready(llama, config), ready(llama, config)
    widen(at_once, 8, 0)
    for rank in (3, 5, 8):
        widen(by_steps, rank, 0)
    assert all(torch.equal(value, trainable_parameters(by_steps)[key]) for key, value in trainable_parameters(at_once).items())
    other = ready(llama, config)
    assert not torch.equal(next(iter(widen(other, 8, 1).values())), next(iter(trainable_parameters(at_once).values())))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("grown", [False, True])
def test_an_adapter_saved_while_growing_means_the_same_in_stock_peft(rslora: bool, grown: bool, tmp_path: Any) -> None:
    ours = ready(llama, TrainConfig(rank=7, start_rank=3, alpha=5.0, rslora=rslora), "CAUSAL_LM")
    if grown:
        widen(ours, 6, 0)
    moved(ours)
    torch.testing.assert_close(logits(loaded_by_peft(llama(), ours, tmp_path / "adapter")), logits(ours), atol=3e-5, rtol=1e-4)
    assert adapter_state(ours)[0]["r"] == (6 if grown else 3)


def test_padded_adamw_moves_old_directions_as_before_and_new_ones_no_further() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.nn.Parameter(torch.randn(6, 2, generator=generator))
    optimizer = torch.optim.AdamW([old], lr=0.1, weight_decay=0.0)
    gradients = [torch.randn(6, 5, generator=generator) for _ in range(4)]
    for gradient in gradients[:3]:
        old.grad = gradient[:, :2].clone()
        optimizer.step()
    state = dict(optimizer.state[old])
    new = torch.nn.Parameter(torch.cat([old.detach(), torch.zeros(6, 3)], dim=1))
    start = new.detach().clone()
    wide = torch.optim.AdamW([new], lr=0.1, weight_decay=0.0)
    wide.state[new] = pad_state(state, new.shape)
    assert wide.state[new]["step"] == state["step"] and not wide.state[new]["exp_avg"][:, 2:].any()
    assert torch.allclose(wide.state[new]["exp_avg_sq"][:, 2:], state["exp_avg_sq"].mean())
    old.grad, new.grad = gradients[3][:, :2].clone(), gradients[3].clone()
    optimizer.step()
    wide.step()
    assert torch.equal(new[:, :2], old)
    assert float((new - start)[:, 2:].detach().abs().max()) < 0.1


def test_an_8_bit_state_is_decoded_padded_and_encoded() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    state: dict[str, Any] = {"step": 5}
    dense = {"1": torch.randn(64, 40), "2": torch.rand(64, 40) * 1e-3}
    for number, value in dense.items():
        code = functional.create_dynamic_map(signed=number == "1")
        stored, scales = functional.quantize_blockwise(value, code=code, blocksize=256)
        state |= {f"state{number}": stored, f"qmap{number}": code, f"absmax{number}": scales.absmax}
    padded = pad_state(state, (64, 80))
    for number, value in dense.items():
        decoded = functional.dequantize_blockwise(padded[f"state{number}"], absmax=padded[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256)
        assert decoded.shape == (64, 80)
        assert float((decoded[:, :40] - value).norm() / value.norm()) < 0.05
        filling = 0.0 if number == "1" else float(value.mean())
        assert torch.allclose(decoded[:, 40:].mean(), torch.tensor(filling), rtol=0.05, atol=2e-4)
    assert padded["step"] == 5 and padded["absmax1"].numel() == 64 * 80 // 256


def test_a_state_of_the_same_size_stays_as_it_is() -> None:
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 2)}
    assert pad_state(state, (4, 2))["exp_avg"] is state["exp_avg"]


NORMS = st.lists(st.tuples(st.floats(0, 1e6), st.integers(2, 300), st.integers(2, 300)), min_size=1, max_size=25)


@given(modules=NORMS, mean_rank=st.integers(1, 20), extra=st.integers(0, 60))
def test_ranks_by_need_spend_the_budget_of_one_rank_for_all(modules: list[tuple[float, int, int]], mean_rank: int, extra: int) -> None:
    norms = {f"layers.{number}": norm for number, (norm, _, _) in enumerate(modules)}
    dims = {f"layers.{number}": (outputs, inputs) for number, (_, outputs, inputs) in enumerate(modules)}
    ranks = by_need(norms, dims, mean_rank, mean_rank + extra)
    caps = {path: min(mean_rank + extra, *dims[path]) for path in dims}
    assert ranks.keys() == dims.keys() and all(1 <= ranks[path] <= caps[path] for path in dims)
    left = sum((mean_rank - ranks[path]) * sum(dims[path]) for path in dims)
    assert left >= 0
    assert all(sum(dims[path]) > left for path in dims if ranks[path] < caps[path])  # no further rank fits anywhere
    shuffled = dict(reversed(norms.items()))
    assert by_need(shuffled, dims, mean_rank, mean_rank + extra) == ranks


def test_equal_modules_share_in_proportion_and_exactly() -> None:
    dims = dict.fromkeys("abcd", (512, 512))
    assert by_need({"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}, dims, 8, 64) == {"a": 4, "b": 4, "c": 8, "d": 16}
    assert by_need(dict.fromkeys("abcd", 3.0), dims, 8, 64) == dict.fromkeys("abcd", 8)
    assert by_need(dict.fromkeys("abcd", 0.0), dims, 8, 64) == dict.fromkeys("abcd", 8)


def test_ranks_by_need_refuse_what_they_cannot_order() -> None:
    with pytest.raises(NonFiniteError, match="b"):
        by_need({"a": 1.0, "b": float("nan")}, {"a": (4, 4), "b": (4, 4)}, 2, 4)
    with pytest.raises(UsageError, match="largest rank"):
        by_need({"a": 1.0}, {"a": (4, 4)}, 8, 4)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_need_estimates_the_gradient_of_the_whole_weight(build: Any) -> None:
    model = build()
    tokens = [torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    chosen = choose_modules(model, family_of({"model_type": model.config.model_type}), "all")
    sum(model(input_ids=batch, labels=batch).loss for batch in tokens).backward()
    exact = {path: float(model.get_submodule(path).weight.grad.double().norm()) for path in chosen}
    config = TrainConfig(rank=16, alpha=24.0)
    ours = inject(freeze(build()), rank_of(model, chosen, config), config, dtype=torch.float32)
    before = {key: value.detach().clone() for key, value in trainable_parameters(ours).items()}
    found = measure_need(ours, tokens, lambda model, batch: model(input_ids=batch, labels=batch).loss)
    assert found.keys() == exact.keys()
    ratios = torch.tensor([found[path] / exact[path] for path in exact])
    assert float(ratios.min()) > 0.5 and float(ratios.max()) < 2.0 and abs(float(ratios.log().mean())) < 0.2
    assert all(torch.equal(before[key], value) and value.grad is None for key, value in trainable_parameters(ours).items())
    layers = lora_layers(ours)
    spread = by_need(found, {path: sides(layers[path].base_layer) for path in layers}, 4, 16)
    again = inject(ours.unload(), spread, config)
    assert {path: layer.r["default"] for path, layer in lora_layers(again).items()} == spread
