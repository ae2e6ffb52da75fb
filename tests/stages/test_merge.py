"""The stored merge equals one rounding of base plus delta, and the survival of the adapter is measured, not assumed."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.engine.run import run
from qlora_tools.models.family import family_of
from qlora_tools.quant.int8 import Int8
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import spec_of
from qlora_tools.stages.merge import Storing, branches, merge_reports, plan_merge
from qlora_tools.stages.merge_sums import measured, summarize
from qlora_tools.stages.merge_units import Given, OnGrid, Requantized, lost_branch, stored_as

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
    reports = run(plan_merge(merged, base, {NAME}, FAMILY, Storing(codec)), {"model": merged, "base": base}, sink, workers=1)
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


# --- on the grid ---------------------------------------------------------------------------------------------------------------

CODECS = [NF4(), Int8()]


def on_the_grid(weight, codec, *, rounding=None, share=0.01, moments=None, simulated=False, healed=None, branch_rank=0):
    """(what was written, the stored form, base, change, sums, branch) of a merge that keeps the grid of ``weight`` in ``codec``."""
    spec = spec_of(NAME, weight)
    form = stored_as(codec, spec)
    parts = codec.encode(spec, weight)
    base = codec.decode(spec, parts)
    delta = low_rank(weight, share)
    a_RI = torch.linalg.svd(delta, full_matrices=False)[2][:8]
    rounding = rounding or OnGrid(simulated=simulated, moments_of=lambda name: "input" if moments is not None else None)
    storing = Storing(
        codec,
        held={} if simulated else {NAME: form},
        held_specs={name: spec_of(name, part) for name, part in parts.items()},
        rounding=rounding,
        judged_by=lambda name: "input" if moments is not None else None,
        branch_rank=branch_rank,
        healed=frozenset({NAME} if healed is not None else ()),
    )
    sources = {
        "model": Memory({NAME: base.float() + delta}, {NAME: spec}), "base": Memory({NAME: base}), "parts": Memory(parts),
        "directions": Memory({NAME: a_RI}), "original": Memory({NAME: weight}), "stats": Memory({"input": moments}) if moments is not None else Memory({}),
        "healed": Memory({NAME: healed} if healed is not None else {}),
    }  # fmt: skip
    sink = Sink()
    reports = run(plan_merge(sources["model"], sources["base"], {NAME}, FAMILY, storing), sources, sink, workers=1)
    return sink, form, base, delta, summarize(merge_reports(reports)), branches(reports)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("simulated", [False, True])
def test_keeping_the_grid_keeps_the_adapter_where_rounding_erases_it(weight, codec, simulated):
    share = 0.01 if codec.name == "nf4" else 0.002
    sink, form, base, delta, found, _ = on_the_grid(weight, codec, share=share, simulated=simulated)
    _, _, _, _, erased, _ = on_the_grid(weight, codec, share=share, rounding=Requantized())
    parts = codec.encode(form.spec, weight)
    assert 0.9 < found.retention < 1.05 and erased.retention < 0.5
    assert found.dead_zone < 0.5
    assert all(torch.equal(sink[name], parts[name]) for name in parts if name != NAME)
    change = codec.decode(form.spec, sink).double() - base.double()
    assert found.retention == pytest.approx(float((change * delta.double()).sum() / delta.double().square().sum()), rel=1e-2)


def test_losses_of_output_equal_their_float64_definition(weight):
    rows = torch.randn(300, weight.shape[1], generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -1, weight.shape[1])
    moments = rows.T @ rows / 300
    sink, form, base, delta, found, _ = on_the_grid(weight, NF4(), moments=moments)
    exact = (base.float() + delta).double() - base.double()
    change, wide = NF4().decode(form.spec, sink).double() - base.double(), moments.double()
    whole = float(((exact @ wide) * exact).sum())
    assert found.output_retention == pytest.approx(float(((exact @ wide) * change).sum()) / whole, rel=1e-6)
    assert found.output_noise == pytest.approx((float((((change - exact) @ wide) * (change - exact)).sum()) / whole) ** 0.5, rel=1e-6)


def test_an_unchanged_quantized_weight_keeps_its_bytes(weight):
    codec, spec = NF4(), spec_of(NAME, weight)
    parts = codec.encode(spec, weight)
    storing = Storing(codec, held={NAME: stored_as(codec, spec)}, held_specs={name: spec_of(name, part) for name, part in parts.items()}, rounding=OnGrid())
    base = Memory({NAME: codec.decode(spec, parts)})
    sink = Sink()
    run(plan_merge(base, base, set(), FAMILY, storing), {"model": base, "base": base, "parts": Memory(parts)}, sink, workers=1)
    assert sink.keys() == parts.keys() and all(torch.equal(sink[name], parts[name]) for name in parts)


@pytest.mark.parametrize("moments", [None, torch.diag(torch.logspace(0, -2, 192))])
def test_the_branch_is_the_best_of_its_rank_for_what_was_lost(weight, moments):
    sink, form, base, delta, _, found = on_the_grid(weight, NF4(), moments=moments, branch_rank=6)
    lost = base.double() + delta.double() - NF4().decode(form.spec, sink).double()
    root = torch.eye(192, dtype=torch.float64) if moments is None else moments.double().sqrt()
    optimum = float(torch.linalg.svdvals(lost @ root)[6:].square().sum().sqrt())
    left = float(((lost - found[NAME].dense().double()) @ root).norm())
    assert found[NAME].rank == 6 and optimum <= left * (1 + 1e-9) and left <= optimum * 1.005


def test_a_branch_can_be_no_wider_than_its_weight():
    assert lost_branch(NAME, torch.randn(3, 5), 8, None).rank == 3


@pytest.mark.parametrize("onto", [None, OnGrid()], ids=["fresh", "grid"])
def test_healed_weights_are_rounded_to_the_nearest_point(weight, onto):
    healed = weight.float() + low_rank(weight, 0.05)
    sink, form, *_ = on_the_grid(weight, NF4(), healed=healed, rounding=onto or Requantized())
    assert isinstance(Storing(NF4(), healed=frozenset({NAME})).rounding_of(NAME), Given)
    found = NF4().decode(form.spec, sink)
    assert (found.float() - healed).norm() < 0.12 * healed.norm()
    if onto is None:
        assert all(torch.equal(sink[name], part) for name, part in NF4().encode(form.spec, healed).items())
    else:
        assert torch.equal(sink[f"{NAME}.absmax"], NF4().encode(form.spec, weight)[f"{NAME}.absmax"])


def test_a_weight_that_nothing_changes_is_the_simulated_bases_own(weight):
    codec, spec = NF4(), spec_of(NAME, weight)
    base = Memory({NAME: codec.decode(spec, codec.encode(spec, weight))})
    sink = Sink()
    plan = plan_merge(base, base, set(), FAMILY, Storing(codec, rounding=OnGrid(simulated=True)))
    run(plan, {"model": base, "base": base, "original": Memory({NAME: weight})}, sink, workers=1)
    assert all(torch.equal(sink[name], part) for name, part in codec.encode(spec, weight).items())


def test_calibration_disturbs_outputs_less(weight):
    rows = torch.randn(400, weight.shape[1], generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -1, weight.shape[1])
    moments = rows.T @ rows / 400
    plain = on_the_grid(weight, NF4(), rounding=Requantized(), moments=moments, share=0.05)[4]
    calibrated = on_the_grid(weight, NF4(), rounding=Requantized(lambda name: "input"), moments=moments, share=0.05)[4]
    assert calibrated.output_noise < 0.9 * plain.output_noise


def test_a_change_of_zeros_has_no_relative_size():
    torch.manual_seed(0)
    change = torch.randn(8)
    found = summarize([measured("classifier.bias", change, change, torch.zeros(8))])
    assert found.delta_ratio is None and found.retention == pytest.approx(1)
