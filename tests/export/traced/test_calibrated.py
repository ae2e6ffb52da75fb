"""Traced graphs whose weights are rounded for what their layers read."""

import numpy as np
import pytest
import torch

from qlora_tools.calibrate.collect import collect
from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.errors import IncompatibleError, UnsupportedError
from qlora_tools.export.schemes import scheme_of
from qlora_tools.export.traced.export import draw, fill, plan_traced, write_traced
from qlora_tools.export.traced.inputs import subject_of
from qlora_tools.export.traced.parity import check_traced
from qlora_tools.live.text import TextWindows
from qlora_tools.verbs.export_traced import check_calibration
from tests.export.traced.tiny_models import relative_error, tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("calibrated") / "bert"
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=3, initializer_range=0.2))
    model.save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def statistics(checkpoint, tmp_path_factory):
    """Of a text of few letters: its layers read little of what they could."""
    torch.manual_seed(1)
    windows = TextWindows(torch.randint(5, 12, (48, 32)), torch.randint(5, 12, (12, 32)), "few", "0" * 64)
    return collect(checkpoint, windows, tmp_path_factory.mktemp("statistics") / "s.safetensors")


@pytest.fixture(scope="module")
def drawn(checkpoint):
    return draw(subject_of(checkpoint.config), checkpoint, checkpoint.config)


def test_a_classifier_is_calibrated_by_its_own_layers(statistics):
    assert "input.classifier.weight" in statistics.specs and "input.bert.encoder.layer.0.attention.self.query.weight" in statistics.specs


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_calibrated_codes_lose_less_of_what_the_layers_give(scheme, checkpoint, statistics, drawn, tmp_path):
    export = fill(drawn, checkpoint, scheme_of(scheme), statistics=statistics)
    gain = write_traced(export, checkpoint, tmp_path)
    assert gain.weights == 7 and gain.share < (0.8 if scheme == "int4" else 1.0)
    assert check_traced(export, checkpoint, tmp_path).error_carried < 0.05
    plain = fill(drawn, checkpoint, scheme_of(scheme))
    assert check_traced(plain, checkpoint, tmp_path, from_file=True).error_carried < 0.05
    answers = {}
    for name, one in (("calibrated", export), ("plain", plain)):
        folder = tmp_path / name
        folder.mkdir()
        write_traced(one, checkpoint, folder)
        answers[name] = lost(checkpoint, folder)
    assert answers["calibrated"] < (0.9 if scheme == "int4" else 1.2) * answers["plain"]


def lost(checkpoint, folder):
    """Relative error of the logits on other text of the same kind."""
    import onnxruntime
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(2)
    ids = torch.randint(5, 12, (32, 32))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in feeds.items()})[0]
    with torch.inference_mode():
        wanted = AutoModelForSequenceClassification.from_pretrained(checkpoint.folder)(**feeds).logits.numpy()
    assert np.isfinite(found).all()
    return relative_error(found, wanted)


def test_linears_that_the_statistics_do_not_hold_are_named(checkpoint, statistics, drawn, monkeypatch):
    whole = fill(drawn, checkpoint, scheme_of("int8"), statistics=statistics).note
    found = statistics.name_of
    monkeypatch.setattr(statistics, "name_of", lambda kind, weight: None if "intermediate" in weight else found(kind, weight))
    less = fill(drawn, checkpoint, scheme_of("int8"), statistics=statistics).note
    assert "without calibration" not in (whole or "") and "rounded without calibration: dense (" in less
    assert fill(drawn, checkpoint, scheme_of("int8")).note == whole


def test_statistics_of_no_layer_are_refused(statistics, tmp_path):
    made = tiny("vit")
    with pytest.raises(IncompatibleError, match="describes no layer of this model"):
        fill(made.drawn, made.source, scheme_of("int8"), statistics=statistics)


def test_models_that_read_no_text_are_not_calibrated():
    made = tiny("vit")
    with pytest.raises(UnsupportedError, match="reads no text"):
        check_calibration(fill(made.drawn, made.source, scheme_of("int8")))


def test_the_plan_can_be_made_in_one_call(checkpoint, statistics):
    export = plan_traced(checkpoint, checkpoint.config, "int4", statistics=statistics)
    assert any(read.source == "statistics" for unit in export.plan.units for read in unit.reads)
