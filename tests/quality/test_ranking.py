"""Pairs of judged settings where some have no figure to be ranked by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlora_tools.bench.plain import to_plain
from qlora_tools.quality.corpus import Window
from qlora_tools.quality.divergence import divergence
from qlora_tools.quality.probe import quality_record
from qlora_tools.quality.ranking import comparisons
from tests.quality.looked_records import looked

WINDOWS = [Window(np.arange(9, dtype=np.int64) % 7, 1) for _ in range(8)]


def judged(noise, *, forbids=False):
    """A record of text. ``forbids``: a token that the reference allows is given no chance, which is an infinite divergence."""
    right = np.random.default_rng(1).normal(size=(9, 7))
    mine = right + noise * np.random.default_rng(2).normal(size=right.shape)
    mine[3, 4] = -np.inf if forbids else mine[3, 4]
    return quality_record(divergence(lambda ids: right, lambda ids: mine, WINDOWS), corpus={"name": "t", "sha256": "0"}, method={"name": "m"})


@pytest.mark.parametrize("stored", [lambda record: record, to_plain], ids=["measured", "stored"])
def test_an_infinite_divergence_is_in_no_pair_and_the_others_are_ranked(stored):
    records = {"far": stored(judged(1.0)), "broken": stored(judged(0.5, forbids=True)), "near": stored(judged(0.1))}
    assert records["broken"]["kl_mean"] in (None, math.inf)
    assert [(pair["a"], pair["b"], pair["verdict"]) for pair in comparisons(records)] == [("near", "far", "a")]
    assert len(comparisons(records, "top1")) == 3  # of this the broken one has a figure
    assert comparisons({"broken": records["broken"], "near": records["near"]}) == []


@pytest.mark.parametrize("value", [None, math.inf, math.nan])
def test_an_error_that_is_no_number_is_in_no_pair(value):
    records = {"far": looked(0.2), "broken": {**looked(0.3), "relative_error": value}, "near": looked(0.1)}
    assert [(pair["a"], pair["b"], pair["metric"]) for pair in comparisons(records)] == [("near", "far", "error")]
