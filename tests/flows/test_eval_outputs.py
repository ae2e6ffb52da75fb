"""``qlt eval`` of models that do not write: classifiers of text and images, encoders, masked words; and of several references."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from qlora_tools.verbs import engines
from qlora_tools.verbs.export import export
from tests.flows.looking_material import BODY, MEAN, WORDS, bert, saved


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(engines, "allowed_cores", lambda: 1)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("bert") / "reviews")


@pytest.fixture(scope="module")
def exported(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "reviews-int8"
    export(model=classifier, scheme="int8", output=folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A classifier of images with its processor, and pictures in folders of what it itself takes them for."""
    root = tmp_path_factory.mktemp("vit")
    classes = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    folder = saved(root / "vit", transformers.ViTConfig(**BODY, image_size=16, patch_size=8, **classes), transformers.ViTForImageClassification)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, **MEAN}))
    for number in range(16):
        place = root / "pictures" / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(values).resize((20, 18)).save(place / f"{number:02}.png")
    return folder, root / "pictures"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 60)
    return path


@torch.inference_mode()
def right_answers(folder, lines):
    """What transformers' own model and tokenizer say of each line."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [model.config.id2label[int(model(**tokenizer(line, return_tensors="pt")).logits.argmax())] for line in lines]


def test_a_classifier_is_right_as_often_as_transformers_says_and_its_export_ties(qlt, here, classifier, exported):
    lines = [f"{WORDS[: number + 5]} {number}" for number in range(24)]
    answers = right_answers(classifier, lines)
    wrong = ["good" if answer == "bad" else "bad" if number % 3 == 0 else answer for number, answer in enumerate(answers)]
    (here / "labels.jsonl").write_text("".join(json.dumps({"text": line, "label": label}) + "\n" for line, label in zip(lines, wrong, strict=True)))
    done = qlt("eval", exported, "--against", classifier, "--labels", "labels.jsonl", "--json")
    assert done.code == 0, done.err
    figures = done.json["models"][0]["figures"]
    share = sum(a == b for a, b in zip(answers, wrong, strict=True)) / 24
    assert figures["accuracy_reference"] == pytest.approx(share) and figures["method"]["n_targets"] == 24
    assert figures["top1_agreement"] > 0.9 and 0.99 < figures["cosine_mean"] <= 1 and figures["kl_mean"] < 0.05
    assert done.json["models"][0]["verdict"] == "tie" and done.json["reference"] == str(classifier)
    said = qlt("eval", exported, classifier, "--labels", "labels.jsonl")
    assert said.code == 0 and f"{share:.2%}" in said.out and "cannot be told apart in accuracy" in said.out + said.err


def test_an_encoder_is_judged_on_a_text_between_its_special_tokens(qlt, here, tmp_path, text):
    folder = bert(tmp_path / "embed", transformers.BertModel)
    assert qlt("export", folder, "--int4", "-o", "q").code == 0
    done = qlt("eval", folder, "q", "--against", folder, "--text", text, "--tokens", 480, "--context", 32, "--json")
    assert done.code == 0, done.err
    exact, small = (model["figures"] for model in done.json["models"])
    assert exact["cosine_min"] == 1 and exact["relative_error_max"] == 0 and "kl_mean" not in exact
    assert exact["cosine_mean"] > small["cosine_mean"] > 0.5 and exact["method"]["outputs"] == ["last_hidden_state"]
    assert exact["method"]["n_inputs"] == 15 and [pair["verdict"] for pair in done.json["comparisons"]] == ["a"]


def test_masked_words_are_the_same_for_all_and_need_no_reference(qlt, here, tmp_path, text):
    folder = bert(tmp_path / "mlm", transformers.BertForMaskedLM)
    alone = qlt("eval", folder, "--text", text, "--tokens", 320, "--context", 32, "--json")
    assert alone.code == 0, alone.err
    figures = alone.json["models"][0]["figures"]
    assert figures["method"]["n_targets"] == 10 * 5 and "masked" in figures["method"]["name"] and 0 <= figures["accuracy"] < 0.5
    both = qlt("eval", folder, "--against", folder, "--text", text, "--tokens", 320, "--context", 32, "--json").json["models"][0]["figures"]
    assert both["kl_max"] == 0 and both["inputs"]["right"] == figures["inputs"]["right"] and both["top1_agreement"] == 1


def test_images_are_judged_by_their_folders_or_drawn(qlt, here, images):
    folder, pictures = images
    labelled = qlt("eval", folder, "--against", folder, "--labels", pictures, "--json")
    assert labelled.code == 0, labelled.err
    figures = labelled.json["models"][0]["figures"]
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    right = []
    for path in sorted(pictures.glob("*/*.png")):
        with torch.inference_mode():
            found = int(model(**processor(Image.open(path).convert("RGB"), return_tensors="pt")).logits.argmax())
        right.append(model.config.id2label[found] == path.parent.name)
    assert figures["accuracy_reference"] == pytest.approx(np.mean(right)) and figures["n"] == 16
    drawn = qlt("eval", folder, "--against", folder)
    assert drawn.code == 0 and "drawn from seeds" in drawn.out + drawn.err


def test_wrong_questions_are_refused(qlt, here, classifier, images, llama, text):
    folder, pictures = images
    (here / "texts.jsonl").write_text('{"text": "a"}\n')
    (here / "labels.jsonl").write_text('{"text": "a", "label": "bad"}\n{"text": "b", "label": "ugly"}\n')
    for words, code, said in [
        ((classifier, llama), 3, "write text and some do not"),
        ((classifier,), 2, "right answers"),
        ((llama, "--labels", "labels.jsonl"), 2, "writes text"),
        ((classifier, "--labels", "texts.jsonl"), 2, "without labels"),
        ((classifier, "--labels", "labels.jsonl"), 3, "ugly"),
        ((classifier, "--labels", pictures), 2, "holds images"),
        ((folder, "--against", folder, "--text", text), 2, "reads `pixel_values`"),
        ((llama, "--task", "python-syntax", "--labels", "labels.jsonl"), 2, "--task takes no"),
    ]:
        done = qlt("eval", *words)
        assert done.code == code and said in done.err, (words, done.code, done.err)


def test_several_references_have_their_own_figures(qlt, here, llama, tuned, text):
    words = ("--text", text, "--tokens", 256, "--context", 32)
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "-o", "a").code == 0
    assert qlt("merge", "--base", llama, "--adapter", "a", "-o", "m").code == 0
    unmerged = f"{llama} + a"
    done = qlt("eval", "m", "--against", llama, "--against", unmerged, *words, "--json")
    assert done.code == 0, done.err
    judged = done.json["models"][0]
    assert done.json["references"] == [str(llama), unmerged] and list(judged["further"]) == [unmerged]
    assert judged["further"][unmerged]["kl_mean"] < 0.01 * judged["figures"]["kl_mean"]
    alone = qlt("eval", "m", "--against", llama, *words, "--json").json["models"][0]
    assert alone["figures"] == judged["figures"] and alone["further"] == {}
    table = qlt("eval", "m", "--against", llama, "--against", unmerged, *words)
    assert "against" in table.out
