"""Which layers stay in 16 bits: greedy by KL saved per byte, under a size or a KL."""

from __future__ import annotations

import pytest

from qlora_tools.stages.mixed_precision import Sensitivity, by_benefit, fewest_for, frontier, within_bytes

LAYERS = [Sensitivity("big", 4000, 1000, 0.3), Sensitivity("small", 400, 100, 0.06), Sensitivity("dull", 400, 100, 0.0), Sensitivity("keen", 800, 200, 0.3)]


def test_layers_come_by_kl_saved_per_byte():
    assert [layer.name for layer in by_benefit(LAYERS)] == ["keen", "small", "big", "dull"]


@pytest.mark.parametrize(
    ("spare", "kept"), [(0, []), (299, []), (300, ["small"]), (899, ["keen", "dull"][:1]), (900, ["keen", "small"]), (10_000, ["keen", "small", "big", "dull"])]
)
def test_bytes_are_never_overspent_and_what_does_not_fit_is_passed_over(spare, kept):
    assert within_bytes(by_benefit(LAYERS), spare) == kept


@pytest.mark.parametrize(("limit", "fewest"), [(0.7, 0), (0.36, 1), (0.31, 2), (0.2, 3), (-1.0, 4)])
def test_the_fewest_layers_for_a_kl_are_found_in_few_measurements(limit, fewest):
    asked = []

    def measure(kept):
        asked.append(kept)
        return sum(layer.kl for layer in by_benefit(LAYERS)[kept:])

    assert fewest_for(limit, len(LAYERS), measure) == fewest
    assert len(asked) == len(set(asked)) <= 4


def test_the_frontier_runs_from_everything_stored_to_everything_dense():
    points = list(frontier(by_benefit(LAYERS), 1400))
    assert [(point.kept, point.total_bytes) for point in points] == [(0, 1400), (1, 2000), (2, 2300), (3, 5300), (4, 5600)]
    assert points[0].predicted_kl == pytest.approx(0.66) and points[-1].predicted_kl == pytest.approx(0, abs=1e-12)
