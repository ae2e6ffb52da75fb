"""Starting points against float64 decompositions and against PEFT's own."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from qlora_tools.lowrank.initial import gaussian, loftq, olora, pissa, qera, uniform


def weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) / math.sqrt(columns)


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def product(factors, scale: float) -> torch.Tensor:
    return scale * (factors.b_OR.double() @ factors.a_RI.double())


def by_peft(w: torch.Tensor, init: str | bool, rank: int, alpha: float):
    """PEFT's lora layer over a linear with this weight."""
    base = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    base[0].weight.data = w.float().clone()
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init)).base_model.model[0]


@pytest.mark.parametrize("shape", [(33, 20), (20, 33), (150, 131)])
@pytest.mark.parametrize("scale", [2.0, 0.7, 5.656854249])
def test_pissa_times_its_scale_is_the_best_approximation_of_the_weight(shape: tuple[int, int], scale: float) -> None:
    w = weight(*shape)
    for rank in (1, 5, 12):
        found = product(pissa(w, rank, scale), scale)
        assert torch.linalg.norm(w - found) <= torch.linalg.norm(w - best(w, rank)) * (1 + 1.1e-3)


def test_pissa_factors_are_balanced() -> None:
    factors = pissa(weight(40, 64), 6, 3.0)
    assert torch.allclose(factors.a_RI.norm(dim=1), factors.b_OR.norm(dim=0), rtol=1e-5)


def test_pissa_starts_where_peft_does() -> None:
    w = weight(24, 40)
    layer = by_peft(w, "pissa", 4, 12.0)
    theirs = 3.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    assert torch.allclose(product(pissa(w, 4, 3.0), 3.0), theirs, atol=1e-5)


@pytest.mark.parametrize("shape", [(33, 20), (20, 33), (16, 16)])
def test_olora_is_the_leading_part_of_the_full_qr(shape: tuple[int, int]) -> None:
    w = weight(*shape)
    q, r = torch.linalg.qr(w)
    for rank in (1, 7, min(shape)):
        factors = olora(w, rank)
        assert torch.allclose(factors.b_OR.double(), q[:, :rank], atol=1e-6)
        assert torch.allclose(factors.a_RI.double(), r[:rank], atol=1e-6)


def test_olora_starts_where_peft_does() -> None:
    w = weight(24, 40)
    layer, factors = by_peft(w, "olora", 4, 12.0), olora(w, 4)
    assert torch.allclose(factors.a_RI, layer.lora_A["default"].weight, atol=1e-5)
    assert torch.allclose(factors.b_OR, layer.lora_B["default"].weight, atol=1e-5)


def grid(w: torch.Tensor) -> torch.Tensor:
    return (w * 8).round() / 8


@pytest.mark.parametrize("scale", [2.0, 0.25])
def test_loftq_applies_the_scale_and_is_the_best_correction(scale: float) -> None:
    w = weight(48, 36)
    correction = product(loftq(w, grid, 6, scale), scale)
    lost = w - grid(w)
    assert torch.linalg.norm(lost - correction) <= torch.linalg.norm(lost - best(lost, 6)) * (1 + 1e-3)
    assert torch.linalg.norm(lost - correction) < 0.9 * torch.linalg.norm(lost)


def test_loftq_of_an_exact_base_still_can_learn() -> None:
    w = grid(weight(12, 8))
    factors = loftq(w, grid, 3, 2.0, "layer")
    assert not factors.b_OR.any() and factors.a_RI.abs().min() > 0


def peft_loftq(w: torch.Tensor, rank: int, alpha: float, monkeypatch: pytest.MonkeyPatch):
    """PEFT's layer after its own LoftQ start. Its function asks for a GPU in its first lines; here its own decomposition runs without one."""
    from peft import LoftQConfig
    from peft.tuners.lora import layer as peft_layer
    from peft.utils import loftq_utils

    def on_the_cpu(values: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int):
        found = loftq_utils._low_rank_decomposition(values.float() - grid(values.float()), reduced_rank=reduced_rank)
        return grid(values), found["R"], found["L"]

    monkeypatch.setattr(peft_layer, "loftq_init", on_the_cpu)
    base = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
    base[0].weight.data = w.float().clone()
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))
    return get_peft_model(base, settings).base_model.model[0]


def test_pefts_loftq_forgets_the_scale_which_ours_divides_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoftQ's own settings, alpha 16 at rank 64: a quarter of the correction is applied."""
    w = weight(96, 80)
    lost = w - grid(w)
    layer = peft_loftq(w, 64, 16.0, monkeypatch)
    scale = layer.scaling["default"]
    theirs = scale * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    ours = product(loftq(w, grid, 64, scale), scale)
    assert scale == 0.25
    assert torch.allclose(theirs, 0.25 * best(lost, 64), atol=1e-5)
    assert torch.linalg.norm(ours - best(lost, 64)) <= 0.02 * torch.linalg.norm(best(lost, 64))
    assert torch.linalg.norm(lost - theirs) > 0.75 * torch.linalg.norm(lost) > 3 * torch.linalg.norm(lost - ours)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs")
def test_pefts_loftq_refuses_the_cpu() -> None:
    from peft.utils.loftq_utils import loftq_init

    with pytest.raises((AssertionError, RuntimeError)):
        loftq_init(weight(64, 64).float(), num_bits=4, reduced_rank=4)


@pytest.mark.parametrize("scale", [2.0, 0.25])
def test_qera_leaves_least_of_what_the_inputs_see(scale: float) -> None:
    w, x = weight(48, 36), weight(500, 36) * torch.linspace(0.1, 6.0, 36)
    moments = (x.T @ x / 500).float()
    lost = w - grid(w)
    values, vectors = torch.linalg.eigh(moments.double())
    root = (vectors * values.sqrt()) @ vectors.T
    optimum = best(lost @ root, 6) @ torch.linalg.inv(root)
    found, plain = product(qera(w, grid, moments, 6, scale), scale), product(loftq(w, grid, 6, scale), scale)
    seen = [float(torch.linalg.norm((lost - correction) @ root)) for correction in (optimum, found, plain)]
    assert seen[0] <= seen[1] <= seen[0] * (1 + 1e-3) < 0.95 * seen[2]


def test_qera_of_inputs_never_seen_is_loftq_and_every_component_can_learn() -> None:
    w = weight(20, 16)
    unseen = qera(w, grid, torch.zeros(16, 16), 4, 2.0, "layer")
    assert torch.equal(product(unseen, 2.0), product(loftq(w, grid, 4, 2.0, "layer"), 2.0))
    x = weight(2, 16)
    few = qera(w, grid, (x.T @ x).float(), 4, 2.0, "layer")
    assert bool(few.a_RI.any(dim=1).all()) and not few.b_OR[:, 2:].any()
    exact = qera(grid(w), grid, torch.eye(16), 4, 2.0, "layer")
    assert not exact.b_OR.any() and bool(exact.a_RI.any(dim=1).all())


@pytest.mark.parametrize("shape", [(8, 300), (4, 3, 5, 5)])
def test_uniform_has_the_bound_of_pefts_default(shape: tuple[int, ...]) -> None:
    reference = torch.empty(shape)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5), generator=torch.Generator().manual_seed(9))
    assert torch.allclose(uniform(shape, 9), reference, rtol=1e-6)


def test_gaussian_has_the_deviation_of_pefts() -> None:
    assert abs(float(gaussian((8, 5000), 1).std()) - 1 / 8) < 2e-3
    assert abs(float(by_peft(weight(16, 5000), "gaussian", 8, 16).lora_A["default"].weight.detach().std()) - 1 / 8) < 2e-3


def test_random_starts_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    alone = uniform((64, 4096), 3), gaussian((64, 4096), 3)
    torch.set_num_threads(4)
    try:
        assert torch.equal(uniform((64, 4096), 3), alone[0]) and torch.equal(gaussian((64, 4096), 3), alone[1])
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(uniform((64, 4096), 4), alone[0])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_a_gpu_finds_the_same_starting_points(shape: tuple[int, int]) -> None:
    w = weight(*shape)
    far = w.cuda()
    for here, there in ((pissa(w, 8, 2.0), pissa(far, 8, 2.0)), (loftq(w, grid, 8, 2.0), loftq(far, grid, 8, 2.0))):
        assert there.a_RI.device.type == "cuda"
        assert torch.allclose(product(here, 2.0).norm(), product(there, 2.0).norm().cpu(), rtol=1e-2)
    here, there = product(olora(w, 8), 1.0), product(olora(far, 8), 1.0).cpu()
    assert torch.allclose(here, there, atol=1e-6)
