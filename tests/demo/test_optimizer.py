from __future__ import annotations

import pytest
import torch

from qlora_tools.demo.optimizer import Muon, optimizer_jobs, orthogonalized


def polar_factor_float64(matrix):
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (64, 192), (1, 7)])
def test_singular_values_end_near_one_and_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    found = orthogonalized(matrix[None], 6)[0].double()
    reference = polar_factor_float64(matrix)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3 and values.min() > 0.5
    assert (found * reference).sum() / (found.norm() * reference.norm()) > 0.97


def test_a_batch_equals_its_matrices_one_by_one():
    batch = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0))
    for together, alone in zip(orthogonalized(batch), batch, strict=True):
        torch.testing.assert_close(together, orthogonalized(alone[None])[0])


def test_first_step_moves_tall_and_wide_matrices_against_the_polar_factor():
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.zeros(6, 4), torch.zeros(4, 6), torch.zeros(5, 5)]
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=generator)
    Muon(matrices).step(0.1)
    for matrix in matrices:
        reference = -polar_factor_float64(matrix.grad)
        assert (matrix.double() * reference).sum() / (matrix.norm() * reference.norm()) > 0.97


def test_zero_gradient_moves_nothing_and_makes_no_nan():
    matrix = torch.zeros(4, 4)
    matrix.grad = torch.zeros(4, 4)
    Muon([matrix]).step(0.1)
    assert torch.equal(matrix, torch.zeros(4, 4))


def test_agrees_with_the_optimizer_in_torch_on_a_square_matrix():
    start = torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    gradient = torch.randn(16, 16, generator=torch.Generator().manual_seed(6))
    ours, theirs = start.clone(), start.clone().requires_grad_()
    stock = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.01)
    optimizer = Muon([ours], dtype=torch.bfloat16, momentum=0.95, weight_decay=0.01)
    for _ in range(3):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step(0.02)
        stock.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=2e-3, rtol=0)


def test_factor_zero_leaves_every_weight_alone():
    named = [("model.embed_tokens.weight", torch.ones(8, 4)), ("model.layers.0.mlp.up_proj.weight", torch.ones(6, 4)), ("model.norm.weight", torch.ones(4))]
    for _, tensor in named:
        tensor.grad = torch.randn_like(tensor)
    for job in optimizer_jobs(named, kind="muon", rate=1e-2, matrix_rate=1e-2, dtype=torch.float32):
        job(0.0)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for _, tensor in named)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_jobs_together_move_every_tensor(kind):
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)} | {f"model.layers.{i}.mlp.up_proj.weight": (6, 4) for i in range(3)}
    named = [(name, torch.ones(shape)) for name, shape in shapes.items()]
    for _, tensor in named:
        tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    for job in optimizer_jobs(named, kind=kind, rate=1e-2, matrix_rate=1e-2, dtype=torch.float32):
        job(1.0)
    assert not [name for name, tensor in named if torch.equal(tensor, torch.ones_like(tensor))]
