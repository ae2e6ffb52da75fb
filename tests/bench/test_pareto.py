from dataclasses import replace

import pytest
from bench_records import figures, make_record
from page_records import CASES, make_forward, make_swept

from qlora_tools.bench.charts_pareto import tip
from qlora_tools.bench.pareto import cost, frontier, loss, loss_of, offered, points, views


def test_the_frontier_holds_what_nothing_dominates():
    assert frontier([(1, 5), (2, 3), (3, 3), (4, 1), (2, 6)]) == [True, True, False, True, False]


def test_equal_points_do_not_dominate_each_other():
    assert frontier([(1, 1), (1, 1)]) == [True, True]


def test_points_come_by_cost_and_without_the_failed():
    found = points(make_record(), cost("file"), loss("kl"))
    assert [(point.name, point.x, point.on_frontier) for point in found] == [
        ("int8 <fast> & |small|", 11.0, True),
        ("slow", 20.0, False),
        ("ONNX fp32", 40.0, True),
    ]
    assert len(points(make_record(), cost("decode"), loss("kl"))) == 3


def test_a_divergence_of_rounding_size_is_as_good_as_none():
    record = make_record()
    quality = [replace(record.quality[0], figures=figures(1e-12, 1.0)), record.quality[1], replace(record.quality[2], figures=figures(0.0, 1.0))]
    found = points(replace(record, quality=tuple(quality)), cost("file"), loss("kl"))
    assert [(point.name, point.on_frontier) for point in found] == [("int8 <fast> & |small|", True), ("slow", True), ("ONNX fp32", False)]


def test_a_cost_that_follows_the_case_is_read_at_it_and_any_other_wherever_the_setting_ran():
    record = make_swept()
    names = {point.name for point in points(record, cost("vram"), loss("kl"), CASES[-1])}
    assert "torch bf16" not in names
    assert "torch bf16" in {point.name for point in points(record, cost("file"), loss("kl"), CASES[-1])}


def test_losses_turn_shares_into_what_is_lost_with_their_intervals():
    record = make_record()
    changed = figures(0.01, 0.9)
    changed["ci95"] = {"top1_agreement": [0.88, 0.93]}
    record = replace(record, quality=(record.quality[0], replace(record.quality[1], figures=changed), *record.quality[2:]))
    value, interval = loss_of(record, "int8", loss("top1"))
    assert (value, *interval) == pytest.approx((10.0, 7.0, 12.0))
    assert loss_of(record, "int8", loss("lost"))[0] == pytest.approx(1.0)


def test_only_what_two_settings_have_is_offered():
    costs, losses = offered(make_record())
    assert [item.key for item in costs] == ["file", "weights", "rss", "decode", "prefill"]
    assert [item.key for item in losses] == ["kl", "ppl", "top1", "lost"]
    assert offered(make_record(quality=()))[1] == []
    assert [(a.key, b.key) for a, b in views(make_swept())] == [("file", "kl"), ("decode", "kl"), ("vram", "kl")]
    assert [(a.key, b.key) for a, b in views(make_forward())] == [("file", "error"), ("prefill", "error")]
    assert [item.key for item in offered(make_forward())[1]] == ["error", "cosine", "wrong"]
    assert views(make_record(quality=())) == []


def test_a_mark_says_both_figures_with_their_units():
    found = points(make_swept(), cost("file"), loss("kl"))
    assert (
        tip(found[0], cost("file"), loss("kl")) == "ONNX nf4, searched: file size 910 MB, KL to the reference 0.0310 nats [0.0279 to 0.0341], on the frontier"
    )
    assert tip(points(make_forward(), cost("file"), loss("cosine"))[1], cost("file"), loss("cosine")) == "w8a8: file size 10 MB, 1 - cosine 0.0010"
