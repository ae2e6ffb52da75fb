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


def test_one_round_has_no_interval_and_no_verdict():
    old, new = timed("a", (2e-3, 2e-3, 2e-3)), timed("a", (3e-3,), peak=90_000_000, file_bytes=2 * 10**7)
    found = compare_records(record_of(new), record_of(old))
    decode = change(found, "decode")
    assert (decode.ci95, decode.verdict, decode.reason) == (None, "unknown", "one round has no interval") and decode.ratio == pytest.approx(1.5, rel=1e-3)
    assert {item.metric: item.verdict for item in found.changes} == {"prefill": "unknown", "decode": "unknown", "peak memory": "unknown", "file": "worse"}


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


def quality_of_a(*, kl=0.02, status="ok", reason=None, reference="r", **changed):
    return Quality("a", reference, status, reason, {**figures(kl, 1.0), **changed} if status == "ok" else {})


def kl_change(new, old, paired=same_windows):
    """The change of quality between two records of one setting that runs; ``None`` stands for one without quality."""
    row = timed("a", (2e-3, 2e-3))
    records = [record_of(row, quality=() if quality is None else (quality,)) for quality in (new, old)]
    found = [item for item in compare_records(*records, paired=paired).changes if item.metric in ("KL", "error")]
    return found[0] if found else None


def test_what_other_references_say_is_not_compared_and_they_are_named():
    row = timed("a", (2e-3, 2e-3))
    after, before = (record_of(row, quality=(quality_of_a(kl=kl, reference=name),)) for kl, name in ((0.02, "bf16"), (0.01, "fp32")))
    found = compare_records(after, before, paired=same_windows)
    assert (change(found, "KL").verdict, change(found, "KL").reason) == ("unknown", "judged against another reference")
    assert [(item.what, item.old, item.new) for item in found.differences] == [("reference of quality", "fp32", "bf16")]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"options": {"path": "elsewhere", "dtype": "bf16"}}, "unknown"),
        ({"engine": "f:load"}, "unknown"),
        ({"scheme": "int8"}, "unknown"),
        ({"options": {"path": "elsewhere", "dtype": "fp32"}}, "worse"),
    ],
)
def test_a_reference_of_the_same_name_is_another_where_it_computes_otherwise(changes, verdict):
    rows = [timed(name, (2e-3, 2e-3)) for name in ("a", "r")]
    after, before = (record_of(*rows, quality=(quality_of_a(kl=kl),)) for kl in (0.02, 0.01))
    judge = replace(before.settings[1], options={"path": "here", "dtype": "fp32"})
    before = replace(before, settings=(before.settings[0], judge))
    after = replace(after, settings=(after.settings[0], replace(judge, **changes)))
    assert change(compare_records(after, before, paired=same_windows), "KL").verdict == verdict


def test_a_first_divergence_is_worse_and_the_last_one_gone_is_better():
    none, some = quality_of_a(kl=0.0), quality_of_a(kl=0.3)
    found = kl_change(some, none, lambda new, old: (math.inf, None))
    assert (found.verdict, found.ratio, found.reason) == ("worse", None, "there was no divergence before")
    for interval in (None, (0.0, 0.0)):
        found = kl_change(none, some, lambda new, old, interval=interval: (0.0, interval))
        assert (found.verdict, found.reason) == ("better", "there is no divergence now")
    assert kl_change(some, none, lambda new, old: None).verdict == "unknown"  # on other windows it may always have been so


@pytest.mark.parametrize("status", ["error", "oom", "timeout"])
def test_what_can_not_be_judged_any_more_is_worse_for_that_reason(status):
    fine, broken = quality_of_a(), quality_of_a(status=status, reason="NaN in window 3")
    found = kl_change(broken, fine)
    assert (found.verdict, found.metric, found.old, found.new, found.reason) == ("worse", "KL", 0.02, None, f"was ok, is {status}: NaN in window 3")
    assert (kl_change(fine, broken).verdict, kl_change(fine, broken).reason) == ("better", f"was {status}, is ok")
    assert kl_change(broken, broken) is None


def test_what_was_not_asked_for_or_had_no_reference_is_unknown():
    fine, untried = quality_of_a(), quality_of_a(status="unsupported", reason="not judged: the reference cannot run")
    assert [kl_change(new, old).reason for new, old in ((None, fine), (fine, None))] == ["not judged now", "not judged in the baseline"]
    found = kl_change(untried, fine)
    assert (found.verdict, found.reason) == ("unknown", "was ok, is unsupported: not judged: the reference cannot run")
    assert {kl_change(new, old).verdict for new, old in ((None, fine), (fine, None), (fine, untried))} == {"unknown"} and kl_change(None, None) is None


@pytest.mark.parametrize("infinite", [None, math.inf])
def test_a_divergence_that_became_infinite_is_worse(infinite):
    fine, beyond = quality_of_a(), quality_of_a(kl_mean=infinite)
    found = kl_change(beyond, fine)
    assert (found.verdict, found.new, found.reason) == ("worse", None, "it is infinite now")
    assert (kl_change(fine, beyond).verdict, kl_change(beyond, beyond).verdict) == ("better", "tie")
    longer = {"method": {"name": "disjoint windows of 256 tokens", "n_tokens": 8192}}
    assert kl_change(quality_of_a(kl_mean=infinite, **longer), fine).reason == "not judged on the same windows"
    assert kl_change(quality_of_a(kl_mean=infinite, corpus={"sha256": "cd"}), fine).reason == "judged on another text"


def test_models_without_classes_are_compared_by_their_error():
    def judged(error, **more):
        return Quality("a", "r", "ok", None, {"relative_error": error, "cosine_mean": 0.99, "inputs": {}, "corpus": {"name": "drawn"}, **more})

    def doubled(new, old):
        return 2.0, (1.8, 2.2)

    found = kl_change(judged(0.2), judged(0.1), doubled)
    assert (found.metric, found.unit, found.old, found.new, found.verdict) == ("error", "share", 0.1, 0.2, "worse")
    assert kl_change(judged(0.2), judged(0.1), lambda new, old: None).reason == "not judged on the same inputs"
    assert kl_change(judged(0.2, kl_mean=0.1), judged(0.1), doubled).metric == "error"
    assert kl_change(judged(0.2, kl_mean=0.1), judged(0.1, kl_mean=0.1), doubled).metric == "KL"
    assert kl_change(judged(0.2), quality_of_a()).reason == "not judged now"
    assert kl_change(judged(2e-7), judged(1e-7), doubled).reason == "both are rounding noise"


def test_quality_without_an_interval_is_no_verdict():
    found = kl_change(quality_of_a(kl=0.04), quality_of_a(), lambda new, old: (2.0, None))
    assert (found.ratio, found.verdict, found.reason) == (2.0, "unknown", "too few windows for an interval")
