import json

import numpy as np
import pytest

from qlora_tools.quality.corpus import Corpus, Method, windows
from qlora_tools.quality.divergence import divergence
from qlora_tools.quality.probe import divergence_of, measure, probe_options
from qlora_tools.quality.ranking import comparisons, with_retention

METHOD = Method(context=16)
WINDOWS = windows(np.random.default_rng(4).integers(0, 30, 400), METHOD)
OPTIONS = json.loads(json.dumps(probe_options(Corpus("text", "abc"), METHOD, WINDOWS)))


class TableEngine:
    def __init__(self, noise, seed=1):
        self.table = np.random.default_rng(0).standard_normal((30, 30)) + noise * np.random.default_rng(seed).standard_normal((30, 30))

    def score(self, ids_BT):
        return self.table[ids_BT]


def test_a_probe_through_json_gives_the_figures_of_a_direct_call():
    direct = divergence(lambda x: TableEngine(0).table[x], lambda x: TableEngine(0.3).table[x], WINDOWS)
    record = json.loads(json.dumps(measure(TableEngine(0.3), TableEngine(0), OPTIONS)))
    assert divergence_of(record) == direct
    assert record["ci95"]["kl_mean"][0] < record["kl_mean"] < record["ci95"]["kl_mean"][1]
    assert record["method"] == {"name": "disjoint windows of 16 tokens", "context": 16, "stride": 16, "bos": None, "n_tokens": 375, "n_windows": 25}
    assert record["corpus"] == {"name": "text", "sha256": Corpus("text", "abc").sha256}


def test_settings_are_ordered_and_equals_tie():
    records = {name: measure(TableEngine(noise), TableEngine(0), OPTIONS) for name, noise in (("b", 0.5), ("a", 0.1), ("b-again", 0.5), ("same", 0.0))}
    found = {(c["a"], c["b"]): c["verdict"] for c in comparisons(records)}
    assert found[("same", "a")] == found[("a", "b")] == "a"
    assert found[("b", "b-again")] == "tie"
    assert len(found) == 6


@pytest.mark.parametrize("metric", ["ppl", "top1"])
def test_other_metrics_put_the_better_first(metric):
    records = {name: measure(TableEngine(noise), TableEngine(0), OPTIONS) for name, noise in (("far", 3.0), ("near", 0.1))}
    found = comparisons(records, metric)[0]
    assert (found["a"], found["verdict"]) == ("near", "a")


def test_retention_is_one_for_the_tuned_and_nothing_for_the_base():
    drawn = np.random.default_rng(0)
    tuned = TableEngine(0)
    ids = [0]
    for _ in range(2000):
        p = np.exp(tuned.table[ids[-1]])
        ids.append(int(drawn.choice(30, p=p / p.sum())))
    options = probe_options(Corpus("own", "own"), METHOD, windows(ids, METHOD))
    records = {name: measure(TableEngine(noise), tuned, options) for name, noise in (("tuned", 0.0), ("quarter", 0.3), ("base", 1.0))}
    kept = with_retention(records, "base")
    assert kept["tuned"]["retention"] == 1.0
    assert kept["base"]["retention"] == 0.0
    low, high = kept["quarter"]["ci95"]["retention"]
    assert 0 < low < kept["quarter"]["retention"] < high < 1.05
    beyond = with_retention({**records, "broken": {**records["quarter"], "ppl_candidate": None}}, "base")
    assert beyond["broken"]["retention"] is None and beyond["quarter"] == kept["quarter"]
