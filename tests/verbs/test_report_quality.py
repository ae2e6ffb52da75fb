"""Two stored records held against each other by their real figures: text window by window, outputs input by input."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_tools.verbs.report import compared, quality_ratio
from tests.bench.bench_records import make_record
from tests.quality.looked_records import looked


def changes(new, old):
    record = make_record()
    records = [replace(record, quality=(replace(record.quality[1], figures=found),)) for found in (new, old)]
    return {item.metric: item for item in compared(*records, 0.05).changes if item.metric in ("KL", "error")}


def test_a_model_without_classes_that_errs_more_is_worse():
    (found,) = changes(looked(0.2), looked(0.1)).values()
    assert (found.metric, found.verdict) == ("error", "worse") and found.ratio == pytest.approx(2) and found.ci95 == pytest.approx((2, 2))
    assert changes(looked(0.1), looked(0.2))["error"].verdict == "better" and changes(looked(0.1), looked(0.1))["error"].verdict == "tie"


def test_a_model_with_classes_is_compared_by_its_divergence():
    (found,) = changes(looked(0.1, rows=3, kl=0.4), looked(0.2, rows=3, kl=0.1)).values()
    assert (found.metric, found.verdict) == ("KL", "worse") and found.ratio == pytest.approx(4)


def test_a_first_error_is_worse_though_it_has_no_ratio():
    assert (found := changes(looked(0.2), looked(0.0))["error"]).verdict == "worse" and found.reason == "there was no error before"
    assert (found := changes(looked(0.0), looked(0.2))["error"]).verdict == "better" and found.reason == "there is no error now"


def test_other_inputs_and_too_few_are_no_verdict():
    assert changes(looked(0.2, count=11), looked(0.1))["error"].reason == "not judged on the same inputs"
    assert changes(looked(0.2, count=3), looked(0.1, count=3))["error"].reason == "too few inputs for an interval"
    assert quality_ratio(looked(0.2), make_record().quality[1].figures) is None
