"""Wishes in words, and which setting meets them. ``make_record`` has fp32 (40 MB, 4 ms, KL 0), int8 (11 MB, 2 ms, 0.004), slow (20 MB, 9 ms, 0.02) and one that failed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench_records import make_record

from qlora_tools.bench.pick import METRICS, OBJECTIVES, figure_of, parse_wishes, pick, write_figure
from qlora_tools.bench.record import Case, DeviceMemory, Workload
from qlora_tools.errors import UsageError


@pytest.mark.parametrize(
    ("text", "metric", "sign", "limit"),
    [
        ("kl<0.01", "kl", "<", 0.01),
        (" KL <= 1e-2 nats ", "kl", "<=", 0.01),
        ("vram<6GB", "vram", "<", 6e9),
        ("vram<6GiB", "vram", "<", 6 * 2**30),
        ("file<=500kb", "file", "<=", 5e5),
        ("peak<100B", "peak", "<", 100),
        ("decode<20ms", "decode", "<", 0.02),
        ("load<1.5s", "load", "<", 1.5),
        ("top1>=98%", "top1", ">=", 0.98),
        ("retention>.9", "retention", ">", 0.9),
        ("tok/s>30", "tok/s", ">", 30),
        ("ppl<12.5", "ppl", "<", 12.5),
    ],
)
def test_a_wish_is_read_in_base_units(text, metric, sign, limit):
    (wish,) = parse_wishes(text).wishes
    assert (wish.metric, wish.sign, wish.limit) == (metric, sign, pytest.approx(limit))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no wish"),
        ("kl", "is not a wish"),
        ("kl=0.1", "is not a wish"),
        ("kl<x", "is not a wish"),
        ("speed<3", "`speed` is not a metric"),
        ("vram<6", "vram needs a unit"),
        ("decode<20", "decode needs a unit"),
        ("vram<6ms", "`ms` is no unit of vram"),
        ("top1>98", "above all of it"),
        ("kl<0.1;best", "`best` is not an objective"),
    ],
)
def test_what_is_no_wish_is_refused_with_a_way_out(text, said):
    with pytest.raises(UsageError, match=said) as refused:
        parse_wishes(text)
    assert refused.value.hint


def test_wishes_are_joined_by_commas_and_an_objective_stands_behind_a_semicolon():
    asked = parse_wishes("kl<0.01, file<4GB ; Smallest")
    assert [wish.text for wish in asked.wishes] == ["kl<0.01", "file<4GB"] and asked.objective == "smallest"
    assert parse_wishes(";closest").wishes == () and parse_wishes("kl<1").objective == "fastest"


def test_the_fastest_that_meets_all_wishes_is_picked_with_the_command_that_makes_it():
    found = pick(make_record(), "kl<0.01,file<50MB")
    assert (found.setting, found.export) == ("int8", "qlt export --int8") and "fastest of 2" in found.remarks[0]
    assert [item.setting for item in found.candidates if item.meets_all] == ["fp32", "int8"]


@pytest.mark.parametrize(("objective", "best"), [("fastest", "int8"), ("smallest", "int8"), ("closest", "fp32")])
def test_objectives_choose_between_those_that_meet_the_wishes(objective, best):
    assert pick(make_record(), f"kl<1;{objective}").setting == best


def test_a_failed_setting_is_never_picked():
    record = make_record()
    only = replace(record, settings=record.settings[-1:], rows=record.rows[-1:], quality=record.quality[-1:])
    for text in ("file<1TB", "kl<9", ";smallest"):
        assert pick(only, text).setting is None
    assert pick(only, "file<1TB").candidates[0].checked[0].reason == "it did not run: MemoryError: no room"


def test_an_unknown_figure_satisfies_nothing():
    record = make_record()
    for text in ("vram<1TB", "vram>0B"):
        found = pick(record, text)
        assert found.setting is None and "no accelerator was measured" in found.remarks[0] and "known of no setting" in found.remarks[0]
    memory = DeviceMemory(as_deployed_peak_bytes=5 * 10**9)
    rows = tuple(replace(row, device_memory=memory) if row.setting == "slow" else row for row in record.rows)
    assert pick(replace(record, rows=rows), "vram<6GB").setting == "slow"
    why = {"device_memory.context_bytes": "it was not measured", "device_memory.as_deployed_peak_bytes": "contended"}
    hidden = tuple(replace(row, unknown=why) for row in record.rows)
    assert "contended" in pick(replace(record, rows=hidden), "vram<6GB").remarks[0]


def test_a_wish_that_nobody_meets_is_named_with_the_nearest_and_by_how_much():
    found = pick(make_record(), "file<10MB,kl<0.01")
    assert found.setting is None and found.export is None
    assert found.remarks == ("nobody meets file<10MB: int8 <fast> & |small| comes nearest with 11 MB, off by 10 %",)


def test_wishes_that_only_different_settings_meet_are_told_apart_from_impossible_ones():
    found = pick(make_record(), "kl<0.001,file<20MB")
    assert found.setting is None
    assert "each wish is met by some setting" in found.remarks[0] and "file<20MB with 40 MB, off by 100 %" in found.remarks[0]


def test_bounds_themselves_count_as_the_comparator_says():
    assert pick(make_record(), "file<=11MB").setting == "int8" and pick(make_record(), "file<11MB").setting is None
    assert pick(make_record(), "top1>=100%").setting == "fp32" and pick(make_record(), "top1>99.9%").setting == "fp32"


def test_the_worst_of_several_cases_counts():
    record = make_record()
    long = Case(512, 65)
    rows = [replace(row, case=long, decode_tokens_per_s=10.0) if row.status == "ok" else replace(row, case=long) for row in record.rows]
    swept = replace(record, workload=Workload((*record.workload.cases, long)), rows=(*record.rows, *rows))
    assert figure_of(swept, "int8", "tok/s")[0] == 10.0
    assert pick(swept, "tok/s>100").setting is None and pick(record, "tok/s>100").setting is not None


def test_models_that_look_once_are_picked_by_what_their_outputs_show():
    record = make_record()
    seen = {"fp32": {"cosine_mean": 1.0, "relative_error": 0.0, "accuracy": 0.93}, "int8": {"cosine_mean": 0.9991, "relative_error": 0.04, "accuracy": 0.92}}
    judged = tuple(replace(item, figures=seen[item.setting]) for item in record.quality if item.setting in seen)
    record = replace(record, quality=judged)
    assert pick(record, "cosine>0.999,error<5%,accuracy>=92%").setting == "int8"
    assert pick(record, "error<1%").setting == "fp32" == pick(record, ";closest").setting
    assert "int8 <fast> & |small| comes nearest" not in pick(record, "accuracy>99%").remarks[0]


def test_every_metric_and_objective_can_be_asked_of_a_record():
    record = make_record()
    for name in METRICS:
        value, reason = figure_of(record, "int8", name)
        assert (value is None) == (reason is not None) and write_figure(name, value)
    assert all(name in METRICS for names in OBJECTIVES.values() for name in names)
    assert figure_of(record, "nobody", "kl") == (None, "it was not measured")


def test_a_wish_that_is_missed_by_nothing_is_the_nearest():
    found = pick(make_record(), "kl<0.004,file<20MB")  # int8 is at 0.004; fp32 has 40 MB
    assert found.setting is None and "int8 <fast> & |small| comes nearest and misses kl<0.004 with 0.004, off by 0 %" in found.remarks[0]


def test_the_untuned_base_is_never_the_choice():
    record = make_record()
    record = replace(record, settings=tuple(replace(item, label="untuned") if item.id == "int8" else item for item in record.settings))
    found = pick(record, "kl<1")
    assert found.setting == "fp32" and "int8" not in {item.setting for item in found.candidates}
    assert pick(record, "kl<1,file<15MB").remarks == ("nobody meets file<15MB: slow comes nearest with 20 MB, off by 33.3 %",)
    alone = replace(record, settings=record.settings[1:2], rows=record.rows[1:2], quality=record.quality[1:2])
    assert pick(alone, "kl<1").setting == "int8"
