"""``qlt export --calib``: a text, statistics, the model's own words; and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_tools.manifest import read_manifest
from tests.conftest import build_llama
from tests.flows.conftest import files
from tests.flows.test_export_and_bench import distance, expected, logits


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 400)
    return path


@pytest.fixture
def ids():
    letters = "the quick brown fox jumps over the lazy dog"
    return np.array([[97 if letter == " " else 3 + ord(letter) - 33 for letter in letters]])


def test_int4_codes_chosen_for_a_text_compute_that_text_more_exactly(qlt, here, llama, text, ids):
    assert qlt("export", llama, "--int4", "-o", "plain").code == 0
    done = qlt("export", llama, "--int4", "--calib", text, "-o", "calibrated")
    assert done.code == 0, done.err
    assert "calibrated: output error of" in done.out and "parity: " in done.out
    wanted = expected(llama, ids)
    assert distance(logits(here / "calibrated", ids), wanted) < 0.8 * distance(logits(here / "plain", ids), wanted)
    assert files(here / "calibrated") == files(here / "plain")
    assert all((here / name / "model.onnx.data").stat().st_size == (here / "plain/model.onnx.data").stat().st_size for name in ("plain", "calibrated"))
    recorded = read_manifest(here / "calibrated").report["calibration"]
    assert recorded["text"] == "text.txt" and recorded["share"] < 0.6 and recorded["tokens"] > 0


def test_statistics_of_a_file_give_the_bytes_that_the_text_gives(qlt, here, llama, text):
    assert qlt("calibrate", llama, "--data", text, "-o", "s.safetensors").code == 0
    for name, calib in (("a", "s.safetensors"), ("b", text)):
        assert qlt("export", llama, "--int8", "--calib", calib, "-o", name).code == 0
    assert (here / "a/model.onnx.data").read_bytes() == (here / "b/model.onnx.data").read_bytes()
    assert qlt("export", llama, "--int8", "-o", "c").code == 0
    assert (here / "c/model.onnx.data").read_bytes() != (here / "a/model.onnx.data").read_bytes()


def test_adapters_are_merged_in_under_the_statistics_of_the_base(qlt, here, llama, tuned, text, ids):
    assert qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 16, "-o", "x").code == 0
    done = qlt("export", "--base", llama, "--adapter", "x", "--merge", "--int4", "--calib", text, "-o", "e", "--json")
    assert done.code == 0, done.err
    assert done.json["calibration"]["weights"] >= 14
    assert distance(logits(here / "e", ids), expected(tuned, ids)) < distance(logits(here / "e", ids), expected(llama, ids))


def test_what_calibration_cannot_serve_is_refused_before_anything_is_written(qlt, here, llama, text, tmp_path):
    for words, code, said in (
        (("--fp32", "--calib", text), 2, "nothing to calibrate"),
        (("--int4", "--calib", "nowhere.txt"), None, "no such text"),
    ):
        done = qlt("export", llama, *words, "-o", "e")
        assert done.code != 0 and (code is None or done.code == code) and said in done.err and "hint:" in done.err
    assert qlt("calibrate", build_llama(tmp_path / "other", seed=9, tokenizer=True), "--data", text, "-o", "s.safetensors").code == 0
    done = qlt("export", llama, "--int4", "--calib", "s.safetensors", "-o", "e")
    assert done.code != 0 and "taken from" in done.err
    assert files(here) == {"s.safetensors"}


def test_a_dry_run_takes_no_statistics(qlt, here, llama, text):
    done = qlt("export", llama, "--int4", "--calib", text, "--dry-run", "--json")
    assert done.code == 0 and done.json["calibration"] is None and files(here) == set()
