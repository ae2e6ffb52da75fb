"""A benchmark against an older one: what is worse, better, a tie, or cannot be told."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import geometric_mean

import pytest
from bench_records import attempt, figures, make_record

from qlora_tools.bench.compare import compare_records, ratio_of_rounds
from qlora_tools.bench.record import Case, DeviceMemory, Quality, Row, Setting, Workload
from qlora_tools.bench.rows import summarise_row
from qlora_tools.errors import IncompatibleError, UsageError


def timed(name, steps_s, *, peak=60_000_000, file_bytes=10**7, case=None):
    """A row whose rounds have these decode times."""
    attempts = []
    for number, step_s in enumerate(steps_s):
        found = attempt(number, step_s)
        attempts.append(replace(found, memory={**found.memory, "loaded": {"peak_bytes": peak}, "steady": {"peak_bytes": peak // 2}}))
    return replace(summarise_row(Setting(name, "e:load"), case or Case(), attempts), file_bytes=file_bytes)


def record_of(*rows, quality=(), **changes):
    cases = tuple(dict.fromkeys(row.case for row in rows))
    settings = tuple(Setting(name, "e:load") for name in dict.fromkeys(row.setting for row in rows))
    return make_record(settings=settings, rows=rows, quality=quality, workload=Workload(cases), comparisons=(), layers=(), **changes)


def change(found, metric, setting="a"):
    return next(item for item in found.changes if item.metric == metric and item.setting == setting)


def same_windows(new, old):
    return new["kl_mean"] / old["kl_mean"], (0.9 * new["kl_mean"] / old["kl_mean"], 1.1 * new["kl_mean"] / old["kl_mean"])


def test_a_record_against_itself_is_a_tie_in_everything():
    found = compare_records(make_record(), make_record(), paired=lambda new, old: (1.0, (1.0, 1.0)))
    assert {item.verdict for item in found.changes} == {"tie"} and not found.worse
    assert not found.differences and not found.missing and not found.added


def test_slower_beyond_the_margin_is_worse_and_faster_is_better():
    before = record_of(timed("a", (2e-3, 2.01e-3, 1.99e-3)), timed("b", (4e-3, 4.01e-3, 3.99e-3)))
    after = record_of(timed("a", (2.2e-3, 2.21e-3, 2.19e-3)), timed("b", (3e-3, 3.01e-3, 2.99e-3)))
    found = compare_records(after, before)
    decode = change(found, "decode")
    assert decode.verdict == "worse" and decode.ratio == pytest.approx(1.1, rel=1e-3) and decode.ratio == pytest.approx(decode.new / decode.old)
    assert 1 < decode.ci95[0] < decode.ratio < decode.ci95[1]
    assert change(found, "decode", "b").verdict == "better"
    assert {item.metric for item in found.worse} == {"decode", "prefill"}


def test_a_change_within_the_margin_is_none():
    before, after = record_of(timed("a", (2e-3, 2.001e-3, 2e-3))), record_of(timed("a", (2.08e-3, 2.081e-3, 2.08e-3)))
    assert change(compare_records(after, before), "decode").verdict == "tie"
    assert change(compare_records(after, before, margin=0.03), "decode").verdict == "worse"


def test_a_large_ratio_that_scatters_is_no_verdict():
    before, after = record_of(timed("a", (1e-3, 2e-3, 4e-3))), record_of(timed("a", (2e-3, 3e-3, 6e-3)))
    found = change(compare_records(after, before), "decode")
    assert found.ratio > 1.5 and found.ci95[0] < 1 and found.verdict == "tie"


def test_one_round_has_no_interval_and_is_judged_by_its_ratio():
    found = change(compare_records(record_of(timed("a", (3e-3,))), record_of(timed("a", (2e-3,)))), "decode")
    assert (found.ci95, found.verdict, found.reason) == (None, "worse", "one round has no interval")


def test_files_and_memory_are_compared_too():
    before, after = record_of(timed("a", (2e-3, 2e-3))), record_of(timed("a", (2e-3, 2e-3), peak=90_000_000, file_bytes=5 * 10**6))
    found = compare_records(after, before)
    assert change(found, "peak memory").verdict == "worse" and change(found, "peak memory").ratio == pytest.approx(1.5)
    assert change(found, "file").verdict == "better" and change(found, "file").case is None


def test_memory_of_a_gpu_is_compared_where_both_know_it():
    row = timed("a", (2e-3, 2e-3))
    small, large = (replace(row, device_memory=DeviceMemory(as_deployed_peak_bytes=size)) for size in (10**9, 2 * 10**9))
    assert change(compare_records(record_of(large), record_of(small)), "device memory").verdict == "worse"
    unknown = change(compare_records(record_of(large), record_of(row)), "device memory")
    assert (unknown.verdict, unknown.reason) == ("unknown", "not known in the baseline")


def test_kl_is_compared_on_the_same_text_alone():
    row = timed("a", (2e-3, 2e-3))

    def judged(kl, sha="ab" * 32):
        return record_of(row, quality=(Quality("a", "r", "ok", None, {**figures(kl, 1.0), "corpus": {"name": "t", "sha256": sha}}),))

    assert change(compare_records(judged(0.02), judged(0.01), paired=same_windows), "KL").verdict == "worse"
    assert change(compare_records(judged(0.01), judged(0.01), paired=same_windows), "KL").verdict == "tie"
    other = change(compare_records(judged(0.02), judged(0.01, "cd" * 32), paired=same_windows), "KL")
    assert (other.verdict, other.reason) == ("unknown", "judged on another text")
    assert change(compare_records(judged(0.02), judged(0.01)), "KL").reason == "not judged on the same windows"


def test_divergences_of_rounding_alone_are_never_a_change():
    row = timed("a", (2e-3, 2e-3))
    old, new = (record_of(row, quality=(Quality("a", "r", "ok", None, figures(kl, 1.0)),)) for kl in (1e-13, 9e-13))
    assert change(compare_records(new, old, paired=same_windows), "KL").verdict == "tie"


def test_a_setting_that_runs_no_more_is_worse_and_says_why():
    fine, broken = timed("a", (2e-3, 2e-3)), Row("a", Case(), "oom", "no room", (replace(attempt(0, 1e-3), status="oom", reason="no room"),))
    found = compare_records(record_of(broken), record_of(fine))
    assert [(item.metric, item.verdict, item.reason) for item in found.changes] == [("runs", "worse", "was ok, is oom: no room")]
    assert [item.verdict for item in compare_records(record_of(fine), record_of(broken)).changes if item.metric == "runs"] == ["better"]
    assert not compare_records(record_of(broken), record_of(broken)).worse


def test_what_only_one_side_has_is_named_and_not_judged():
    long = Case(512, 65)
    before = record_of(timed("a", (2e-3, 2e-3)), timed("gone", (2e-3, 2e-3)))
    after = record_of(timed("a", (2e-3, 2e-3)), timed("new", (2e-3, 2e-3)), timed("a", (2e-3, 2e-3), case=long), timed("new", (2e-3, 2e-3), case=long))
    found = compare_records(after, before)
    assert found.missing == ("gone",) and found.added == ("new", long.name)
    assert {item.setting for item in found.changes} == {"a"} and long not in {item.case for item in found.changes}


def test_settings_are_matched_by_what_tables_call_them_where_ids_differ():
    def named(name):
        record = record_of(timed(name, (2e-3, 2e-3)))
        return replace(record, settings=(replace(record.settings[0], label="int8"),))

    assert compare_records(named("y-int8"), named("x-int8")).changes


def test_nothing_in_common_is_refused():
    one, other = record_of(timed("a", (2e-3,))), record_of(timed("b", (2e-3,)))
    with pytest.raises(IncompatibleError, match="has no setting of this benchmark"):
        compare_records(one, other)
    with pytest.raises(IncompatibleError, match="has no case"):
        compare_records(one, record_of(timed("a", (2e-3,), case=Case(7, 7))))
    with pytest.raises(UsageError, match="margin"):
        compare_records(one, one, margin=-0.1)


def test_other_machines_versions_and_work_are_named():
    row = timed("a", (2e-3, 2e-3))
    before, after = record_of(row), record_of(row, machine={"cpu": "B", "gpu": {"name": "G"}, "load_average": [1, 2, 3]}, versions={"torch": "3"}, threads=8)
    found = {item.what: (item.old, item.new) for item in compare_records(after, before).differences}
    assert found["version: torch"] == ("2.13.0", "3") and found["threads"] == ("1", "8") and found["machine: gpu.name"] == ("not known", "G")
    assert found["machine: cpu"] == ("A <CPU>", "B") and "machine: load_average" not in found


def test_an_engine_with_other_options_is_named():
    record = record_of(timed("a", (2e-3, 2e-3)))
    other = replace(record, settings=(replace(record.settings[0], options={"device": "cuda"}),))
    assert [(item.what, item.new) for item in compare_records(other, record).differences] == [("a: options", "device=cuda")]


def test_the_interval_of_a_ratio_is_welchs_on_logarithms():
    from scipy.stats import ttest_ind

    new, old = (1.0, 1.2, 1.1, 1.4), (0.9, 1.3, 1.0)
    ratio, interval = ratio_of_rounds(new, old)
    expected = ttest_ind([math.log(x) for x in new], [math.log(x) for x in old], equal_var=False).confidence_interval(0.95)
    assert ratio == pytest.approx(geometric_mean(new) / geometric_mean(old))
    assert interval == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
