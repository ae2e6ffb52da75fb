"""Judging models that look once, beside scipy's and numpy's own arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax, rel_entr, softmax

from qlora_tools.errors import IncompatibleError, MissingError, NonFiniteError, UsageError
from qlora_tools.quality.outputs import best_metric, compare_outputs, compared, is_outputs, measure, probe_options, sums_of
from qlora_tools.quality.ranking import comparisons, with_retention


class Answers:
    """An engine whose outputs are a function of the seed, or of what was given; notes how it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def feed(self, case, seed, given=None):
        self.asked.append((dict(case), seed, dict(given or {})))
        return seed, given or {}

    def forward(self, feed):
        return feed

    def read(self, outputs):
        found = self.answer(*outputs)
        return found if isinstance(found, dict) else {"logits": found}


def logits(seed, shape=(1, 5), noise=0.0):
    made = np.random.default_rng(seed).standard_normal(shape)
    return made + noise * np.random.default_rng(1000 + seed).standard_normal(shape)


def options(count=12, **more):
    return probe_options([{"seed": seed} for seed in range(count)], corpus={"name": "drawn"}, method={"name": "drawn from seeds"}, **more)


def classifier(noise):
    return Answers(lambda seed, given: logits(seed, noise=noise))


def test_figures_are_those_of_numpy_and_scipy():
    found = measure(classifier(0.8), classifier(0), options())
    pairs = [(logits(seed, noise=0.8)[0], logits(seed)[0]) for seed in range(12)]
    kl = [rel_entr(softmax(y), softmax(x)).sum() for x, y in pairs]
    cosine = [x @ y / np.sqrt(x @ x * (y @ y)) for x, y in pairs]
    error = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in pairs]
    assert found["kl_mean"] == pytest.approx(np.mean(kl)) and found["kl_max"] == pytest.approx(max(kl))
    assert found["cosine_mean"] == pytest.approx(np.mean(cosine)) and found["cosine_min"] == pytest.approx(min(cosine))
    assert found["relative_error"] == pytest.approx(np.mean(error)) and found["relative_error_max"] == pytest.approx(max(error))
    assert found["top1_agreement"] == pytest.approx(np.mean([x.argmax() == y.argmax() for x, y in pairs]))
    assert all(low <= found[name] <= high for name, (low, high) in found["ci95"].items())
    assert (found["n"], found["method"]["outputs"], found["method"]["n_classified"]) == (12, ["logits"], 12) and "accuracy" not in found
    json.dumps(found)


def test_a_model_against_itself_differs_by_exactly_nothing():
    found = measure(classifier(0.3), classifier(0.3), options())
    assert (found["cosine_min"], found["relative_error_max"], found["kl_max"], found["top1_agreement"]) == (1.0, 0.0, 0.0, 1.0)
    assert found["ci95"]["kl_mean"] == [0.0, 0.0] and found["ci95"]["cosine_mean"] == [1.0, 1.0]


def test_embeddings_have_no_classes_to_agree_on():
    def answer(noise):
        return Answers(lambda seed, given: {"last_hidden_state": logits(seed, (1, 4, 8), noise), "pooler_output": logits(seed, (1, 8))})

    found = measure(answer(0.1), answer(0), options())
    assert found["method"]["outputs"] == ["last_hidden_state"] and 0.9 < found["cosine_mean"] < 1 and "kl_mean" not in found
    assert best_metric([found]) == "error"


def test_only_the_masked_words_count_and_their_recall_is_the_score():
    truth = [1, 4]

    def answer(seed, given):
        scores = logits(int(given["input_ids"].sum()), (1, 6, 5))
        scores[0, [2, 4]] = np.eye(5)[truth] * 9
        return scores

    inputs = [{"ids": [number, 2, 9, 3, 9, 5], "scored": [2, 4], "targets": truth} for number in range(9)]
    reading = probe_options(inputs, corpus={"name": "t", "sha256": "0"}, method={"name": "masked", "n_tokens": 54})
    noisy = Answers(lambda seed, given: answer(seed, given) + 100 * (np.arange(6) % 2)[None, :, None] * logits(3, (1, 6, 5)))
    engine, reference = noisy, Answers(answer)
    found = measure(engine, reference, reading)
    assert found["accuracy"] == found["accuracy_reference"] == found["top1_agreement"] == 1.0 and found["kl_mean"] == 0  # noise lay on other places
    assert found["method"]["n_targets"] == found["method"]["n_classified"] == 18 and found["cosine_mean"] < 0.9
    assert engine.asked[4][2]["input_ids"].tolist() == [[4, 2, 9, 3, 9, 5]] and engine.asked[0][0]["batch"] == 1


def test_accuracy_is_paired_and_stands_without_a_reference():
    inputs = [{"seed": seed, "targets": [int(logits(seed).argmax()) if seed % 4 else 0]} for seed in range(40)]
    labelled = probe_options(inputs, corpus={"name": "labelled"}, method={"name": "labelled"})
    good, bad = measure(classifier(0), None, labelled), measure(classifier(3), classifier(0), labelled)
    truth = np.array([one["targets"][0] for one in inputs])
    right = np.array([logits(seed).argmax() for seed in range(40)]) == truth
    wrong = np.array([logits(seed, noise=3).argmax() for seed in range(40)]) == truth
    assert good["accuracy"] == pytest.approx(right.mean()) and "cosine_mean" not in good and "kl_mean" not in good
    assert bad["accuracy_difference"] == pytest.approx(wrong.mean() - right.mean()) and bad["ci95"]["accuracy_difference"][1] < 0
    pair = compare_outputs("good", good, "bad", bad, "accuracy")
    assert (pair.verdict, pair.n_pairs) == ("a", 40) and pair.effect.value == pytest.approx(right.mean() - wrong.mean())
    assert compare_outputs("x", good, "y", good, "accuracy").verdict == "tie"
    assert comparisons({"bad": bad, "good": good}, "accuracy")[0]["a"] == "good"
    with pytest.raises(UsageError, match="right answers"):
        measure(classifier(0), None, options())


@pytest.mark.parametrize("metric", ["kl", "error", "top1"])
def test_the_nearer_of_two_wins_and_equals_tie(metric):
    near, far = (measure(classifier(noise), classifier(0), options(30)) for noise in (0.05, 2.0))
    assert compare_outputs("near", near, "far", far, metric).verdict == "a" and compare_outputs("far", far, "near", near, metric).verdict == "b"
    assert compare_outputs("near", near, "again", near, metric).verdict == "tie"
    few = measure(classifier(0.1), classifier(0), options(4))
    assert few["ci95"]["kl_mean"] is None and compare_outputs("x", few, "y", few, "error").verdict == "unknown"


def test_settings_are_ranked_by_what_all_of_them_have():
    records = {name: measure(classifier(noise), classifier(0), options(20)) for name, noise in (("c", 2.0), ("a", 0.01), ("b", 0.3))}
    pairs = comparisons(records)
    assert [(pair["a"], pair["b"], pair["metric"], pair["verdict"]) for pair in pairs] == [("a", "b", "kl", "a"), ("a", "c", "kl", "a"), ("b", "c", "kl", "a")]
    assert with_retention(records, "c") == records and all(map(is_outputs, records.values()))

    def plain(noise):
        return Answers(lambda seed, given: {"out_sample": logits(seed, (1, 3, 4, 4), noise)})

    images = {name: measure(plain(noise), plain(0), options(20)) for name, noise in (("x", 0.5), ("y", 0.1))}
    assert [(pair["a"], pair["metric"]) for pair in comparisons(images)] == [("y", "error")]
    for metric in ("kl", "top1", "accuracy"):
        with pytest.raises(IncompatibleError, match=f"cannot be compared by {metric}"):
            compare_outputs("x", images["x"], "y", images["y"], metric)


def test_records_of_other_inputs_are_not_compared():
    one, other = measure(classifier(0.1), classifier(0), options(10)), measure(classifier(0.1), classifier(0), options(11))
    with pytest.raises(IncompatibleError, match="same inputs"):
        compare_outputs("one", one, "other", other, "kl")
    assert sums_of(json.loads(json.dumps(one))) == sums_of(one)


def test_maps_of_classes_have_them_before_rows_and_columns():
    def answer(noise):
        return Answers(lambda seed, given: logits(seed, (1, 3, 4, 5), noise))

    found = measure(answer(0.5), answer(0), options())
    pairs = [(logits(seed, (1, 3, 4, 5), 0.5), logits(seed, (1, 3, 4, 5))) for seed in range(12)]
    assert found["method"]["n_classified"] == 12 * 20
    assert found["kl_mean"] == pytest.approx(np.mean([(np.exp(log_softmax(y, 1)) * (log_softmax(y, 1) - log_softmax(x, 1))).sum(1).mean() for x, y in pairs]))


def test_one_score_is_no_class():
    assert "kl_mean" not in measure(Answers(lambda s, g: logits(s, (1, 1), 0.1)), Answers(lambda s, g: logits(s, (1, 1))), options())


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(IncompatibleError, match="nothing to compare"):
        compared({"logits": np.zeros((1, 2))}, {"last_hidden_state": np.zeros((1, 2))})
    with pytest.raises(IncompatibleError, match=r"\[1, 2\] from the candidate, \[1, 3\]"):
        compared({"logits": np.zeros((1, 2))}, {"logits": np.zeros((1, 3))})
    with pytest.raises(NonFiniteError, match="the candidate gave"):
        measure(Answers(lambda s, g: np.array([[np.nan, 1]])), Answers(lambda s, g: np.ones((1, 2))), options())
    with pytest.raises(NonFiniteError, match="the reference gave"):
        measure(Answers(lambda s, g: np.ones((1, 2))), Answers(lambda s, g: np.array([[np.inf, 1]])), options())
    with pytest.raises(UsageError, match="no inputs"):
        measure(classifier(0), classifier(0), options(0))
    labelled = probe_options([{"seed": 0, "targets": [1]}], corpus={"name": "x"}, method={"name": "x"})
    with pytest.raises(IncompatibleError, match="1 right answers"):
        measure(Answers(lambda s, g: logits(s, (1, 4, 3))), None, labelled)


def test_images_are_prepared_as_the_processor_says(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 6, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    Image.fromarray(np.full((9, 9, 3), 255, np.uint8)).save(tmp_path / "white.png")
    engine = Answers(lambda seed, given: given["pixel_values"].mean((2, 3)))
    reading = probe_options([{"image": str(tmp_path / "white.png")}], corpus={"name": "i"}, method={"name": "i"}, processor=tmp_path)
    measure(engine, engine, reading)
    assert engine.asked[0][2]["pixel_values"].shape == (1, 3, 6, 8) and np.allclose(engine.asked[0][2]["pixel_values"], 1)
    with pytest.raises(MissingError):
        measure(engine, engine, {**reading, "processor": str(tmp_path / "none")})
