"""Weights, spread ranks and objectives of extraction, against dense float64 arithmetic on what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.engine.run import run
from qlora_tools.errors import UsageError
from qlora_tools.quant.nf4 import NF4
from qlora_tools.specs import TensorSpec, spec_of
from qlora_tools.stages.extract import ExtractConfig, plan_extract
from qlora_tools.stages.extract_objective import Task, factor_for
from qlora_tools.stages.extract_result import Extracted, finish
from tests.adapters.tiny_models import Convolutions, gpt2, llama
from tests.stages.test_extract import Pair, both, low_rank, pair, shifted


class Stats:
    """Statistics of every weight of a model, made up: loud and quiet inputs and outputs. ``lacking``: weights that have none."""

    def __init__(self, folder: Path, lacking: str = "nothing") -> None:
        checkpoint = open_checkpoint(folder)
        self._tensors = {}
        for name, spec in checkpoint.specs.items():
            if len(spec.shape) < 2 or lacking in name:
                continue
            outputs, inputs = spec.shape[0], spec.numel // spec.shape[0]
            if checkpoint.family.stores_inputs_first(name, spec.shape):
                outputs, inputs = inputs, outputs
            loudness = 9.0 if "layers.1" in name else 1.0
            for kind, side in (("input", inputs), ("output", outputs)):
                generator = torch.Generator().manual_seed(len(name) + side)
                x = torch.randn(4 * side, side, generator=generator) * torch.linspace(0.05, 4.0, side) * loudness
                self._tensors[f"{kind}.{name}"] = x.T @ x / len(x)
        self.specs = {name: spec_of(name, tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        return self._tensors[name]

    def name_of(self, kind: str, weight: str) -> str | None:
        name = f"{kind}.{weight}"
        return name if name in self._tensors else None


def extract(made: Pair, stats: Stats | None, codec: Any = None, **options: Any) -> Extracted:
    base, tuned = open_checkpoint(made.base), open_checkpoint(made.tuned)
    extraction = plan_extract(base, tuned, base.family, ExtractConfig(**options), moments=stats, codec=codec)
    sources = {"base": base, "tuned": tuned, **({"stats": stats} if stats else {})}
    return finish(extraction, run(extraction.plan, sources, workers=1), tuned.specs, base_config=base.config)


CHANGED = both(low_rank("q_proj.weight", "up_proj.weight", rank=4), shifted("q_proj.weight", "up_proj.weight"))


def weighted_error(row: Any) -> float:
    assert row.weighted is not None
    return float(row.weighted.error)


def test_weighted_factors_lose_less_of_what_counts_and_more_of_the_rest(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, CHANGED)
    stats = Stats(made.base)
    plain = extract(made, stats, weight="fisher", factors="plain", rank=4, spread=True, max_rank=4).report
    found = extract(made, stats, weight="fisher", rank=4, spread=False).report
    assert plain.weighted_total is not None and found.weighted_total is not None
    assert found.weighted_total.error < 0.9 * plain.weighted_total.error and found.total.error > plain.total.error
    assert found.weighted_total.error == pytest.approx(found.weighted_total.optimum, rel=1e-3)
    assert plain.total.error == pytest.approx(plain.total.optimum, rel=1e-3)


def test_rank_asked_for_with_weights_is_a_mean_and_costs_no_more(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, CHANGED)
    stats = Stats(made.base)
    even, spread = (extract(made, stats, weight="fisher", rank=4, spread=spread, factors="weighted") for spread in (False, None))
    assert {row.certificate.rank for row in even.report.rows} == {4} and len({row.certificate.rank for row in spread.report.rows}) > 1
    assert spread.report.adapter_bytes <= even.report.adapter_bytes
    assert spread.report.weighted_total.error < even.report.weighted_total.error  # type: ignore[union-attr]
    assert spread.config["rank_pattern"] and spread.config["alpha_pattern"] == spread.config["rank_pattern"]


def test_ranks_that_follow_weights_are_of_plain_factors_unless_asked(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, CHANGED)
    for row in extract(made, Stats(made.base), weight="fisher", rank=4).report.rows:
        assert row.certificate.error == pytest.approx(row.certificate.optimum, rel=1e-3)
    assert not ExtractConfig(weight="fisher", spread=False).plain_factors and ExtractConfig(weight="input", max_bytes=10**6).plain_factors


def test_budget_in_bytes_goes_by_weighted_values(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, CHANGED)
    size = extract(made, None, rank=4).report.adapter_bytes
    plain = extract(made, Stats(made.base), weight="fisher", rank="auto", max_bytes=size).report
    blind = extract(made, None, rank="auto", max_bytes=size).report
    assert plain.adapter_bytes <= size and blind.adapter_bytes <= size
    assert [row.certificate.rank for row in plain.rows] != [row.certificate.rank for row in blind.rows]


def test_gpt2_weighs_its_inputs_though_it_stores_them_first(tmp_path: Path) -> None:
    made = pair(tmp_path, gpt2, both(low_rank("c_fc.weight", rank=3), shifted("c_fc.weight")))
    stats = Stats(made.base)
    name = next(name for name in open_checkpoint(made.base).specs if "c_fc.weight" in name)
    report = extract(made, stats, weight="input", rank=3, spread=False, targets="c_fc").report
    row = next(row for row in report.rows if row.name == name)
    base, tuned = open_checkpoint(made.base).read(name).double(), open_checkpoint(made.tuned).read(name).double()
    delta = (tuned - base).T
    assert weighted_error(row) == pytest.approx(optimum(delta, stats.read(f"input.{name}"), 3), rel=1e-4)


def test_convolutions_weigh_flattened_kernels(tmp_path: Path) -> None:
    made = pair(tmp_path, Convolutions, both(low_rank("weight", rank=2), shifted("weight")))
    stats = Stats(made.base)
    row = next(row for row in extract(made, stats, weight="input", rank=2, spread=False).report.rows if len(row.shape) == 4)
    base, tuned = open_checkpoint(made.base).read(row.name).double(), open_checkpoint(made.tuned).read(row.name).double()
    assert weighted_error(row) == pytest.approx(optimum((tuned - base).flatten(1), stats.read(f"input.{row.name}"), 2), rel=1e-4)


def optimum(delta: torch.Tensor, moments: torch.Tensor, rank: int) -> float:
    """Relative weighted error of the best of ``rank``, by a symmetric root in float64."""
    values, vectors = torch.linalg.eigh(moments.double())
    s = torch.linalg.svdvals(delta @ (vectors * values.clamp(min=0).sqrt()))
    return float(s[rank:].norm() / s.norm())


def test_tensors_without_statistics_are_extracted_plainly(tmp_path: Path) -> None:
    made = pair(tmp_path, llama, CHANGED)
    report = extract(made, Stats(made.base, lacking="up_proj"), weight="fisher", rank=4, spread=False).report
    assert {row.name.split(".")[-2] for row in report.rows if row.weighted is None} == {"up_proj"}


def one(objective: str, rank: int = 6, rest: int = 2) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """(report, delta, tuned - Q(base)) of one tensor."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(64, 64, generator=generator)
    tuned = base + 0.02 * torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    spec = TensorSpec("x.weight", "F32", (64, 64))
    codec = NF4()
    apply = factor_for(Task(spec, rank, torch.float32, False, None, True, objective=objective, rest_rank=rest, codec=codec))
    return apply(base, tuned).report, tuned - base, tuned - codec.decode(spec, codec.encode(spec, base))


def test_total_is_the_best_of_its_rank_for_what_differs_from_the_quantized_base() -> None:
    report, _, total = one("total")
    s = torch.linalg.svdvals(total.double())
    assert report.certificate.error == pytest.approx(float(s[6:].norm() / s.norm()), rel=1e-3)
    assert float((total - report.factors.dense()).norm() / total.norm()) == pytest.approx(report.certificate.error, rel=1e-4)


def test_split_keeps_the_change_first_and_then_mends_the_base() -> None:
    delta_only, delta, total = one("delta")
    split, *_ = one("split")
    whole, *_ = one("total")
    assert float((delta - split.factors.cut(4).dense()).norm()) < 1e-3 * float(delta.norm())
    errors = [float((total - found.factors.dense()).norm()) for found in (delta_only, split, whole)]
    assert errors[0] > errors[1] >= errors[2] * (1 - 1e-4)
    assert split.kept_change == pytest.approx(1.0, abs=0.05) and delta_only.kept_change is None


def test_total_mends_a_tensor_that_did_not_change() -> None:
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    spec = TensorSpec("x.weight", "F32", (64, 64))
    made = {objective: factor_for(Task(spec, 4, torch.float32, False, None, True, objective=objective, codec=NF4())) for objective in ("delta", "total")}
    assert made["delta"](base, base).report.factors is None and made["total"](base, base).report.factors.rank == 4


@pytest.mark.parametrize(
    "options",
    [
        {"weight": "output"},
        {"factors": "plain"},
        {"weight": "fisher", "factors": "plain", "spread": False},
        {"objective": "total"},
        {"objective": "best", "base_format": "nf4"},
        {"base_format": "fp4"},
        {"objective": "split", "base_format": "nf4", "energy": 0.9},
        {"objective": "split", "base_format": "nf4", "rank": 1},
        {"objective": "split", "base_format": "nf4", "rank": 8, "rest_rank": 8},
        {"rest_rank": 2},
        {"spread": True, "energy": 0.9},
    ],
)
def test_weights_and_objectives_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExtractConfig(**options)
