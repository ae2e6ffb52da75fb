"""The stored merge equals one rounding of base plus delta, and the survival of the adapter is measured, not assumed."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.engine.run import run
from qlora_tools.models.family import family_of
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import spec_of
from qlora_tools.stages.merge import merge_reports, plan_merge, summarize

FAMILY = family_of({"model_type": "llama"})
NAME = "model.layers.0.self_attn.q_proj.weight"


class Memory:
    def __init__(self, tensors, specs=None):
        self.tensors = tensors
        self.specs = specs or {name: spec_of(name, tensor) for name, tensor in tensors.items()}

    def read(self, name, rows=None):
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]


class Sink(dict):
    def write(self, name, tensor, row=0):
        self[name] = tensor if name not in self else torch.cat([self[name], tensor])


def merge(weight, delta, codec):
    base = Memory({NAME: weight, "model.norm.weight": torch.ones(4, dtype=torch.bfloat16)})
    merged = Memory({**base.tensors, NAME: weight.float() + delta}, base.specs)
    sink = Sink()
    reports = run(plan_merge(merged, base, {NAME}, FAMILY, codec), {"model": merged, "base": base}, sink, workers=1)
    return sink, summarize(merge_reports(reports))


@pytest.fixture
def weight():
    return torch.randn(256, 192, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)


def low_rank(weight, share):
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(weight.shape[0], 8, generator=generator) @ torch.randn(8, weight.shape[1], generator=generator)
    return delta * (share * weight.float().norm() / delta.norm())


def test_the_dense_merge_is_rounded_once(weight):
    delta = low_rank(weight, 0.05)
    sink, _ = merge(weight, delta, None)
    assert torch.equal(sink[NAME], (weight.float() + delta).to(torch.bfloat16))
    assert torch.equal(sink["model.norm.weight"], torch.ones(4, dtype=torch.bfloat16))


def test_a_large_change_survives_bf16_and_a_tiny_one_does_not_whole(weight):
    _, large = merge(weight, low_rank(weight, 0.05), None)
    _, tiny = merge(weight, low_rank(weight, 0.0005), None)
    assert large.retention == pytest.approx(1, abs=0.01) and large.delta_ratio == pytest.approx(0.05, rel=1e-3)
    assert tiny.retention < 0.9 and tiny.noise > large.noise


def test_merging_onto_the_grid_erases_a_realistic_adapter(weight):
    codec = NF4()
    spec = spec_of(NAME, weight)
    on_grid = codec.decode(spec, codec.encode(spec, weight))
    _, erased = merge(on_grid, low_rank(weight, 0.01), codec)
    _, kept = merge(weight, low_rank(weight, 0.01), codec)
    assert erased.retention < 0.1
    assert kept.retention > 0.8


def test_retention_equals_its_float64_definition(weight):
    delta = low_rank(weight, 0.03)
    codec = NF4()
    sink, found = merge(weight, delta, codec)
    spec = spec_of(NAME, weight)
    stored = codec.decode(spec, {part.name: sink[part.name] for part in codec.part_specs(spec)}).double()
    exact_delta = (weight.float() + delta).double() - weight.double()
    change = stored - weight.double()
    assert found.retention == pytest.approx(float((change * exact_delta).sum() / (exact_delta**2).sum()), rel=1e-5)
    assert found.noise == pytest.approx(float((change - exact_delta).norm() / exact_delta.norm()), rel=1e-5)


def test_nothing_changed_has_no_retention(weight):
    _, found = merge(weight, torch.zeros(weight.shape), None)
    assert found is None


def test_tiles_add_up_to_the_whole(weight, monkeypatch):
    from qlora_tools.stages import merge as stage

    delta = low_rank(weight, 0.02)
    _, whole = merge(weight, delta, None)
    monkeypatch.setattr(stage, "row_tiles", lambda spec: iter([(0, 100), (100, spec.shape[0])]) if len(spec.shape) == 2 else iter([None]))
    sink, tiled = merge(weight, delta, None)
    assert tiled.retention == pytest.approx(whole.retention, rel=1e-6) and sink[NAME].shape == weight.shape
