"""``qlt quantize --calib`` and mixed precision end to end: stock transformers loads the folders, and less is lost."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

from qlora_tools.checkpoint.logical import open_checkpoint
from qlora_tools.manifest import read_manifest
from qlora_tools.verbs import quantize_run
from tests.conftest import build_llama
from tests.flows.conftest import files
from tests.flows.test_quantize import FOLDER, distance, logits


@pytest.fixture(scope="session")
def aligned(tmp_path_factory):
    """Widths in multiples of 64, and weights large enough that quantizing them shows."""
    return build_llama(tmp_path_factory.mktemp("calibrated") / "base", tokenizer=True, intermediate_size=128, num_attention_heads=2, initializer_range=0.12)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    words = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words.choice(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]) + str(words.randrange(99)) for _ in range(1500)))
    return path


CALIB = ("--tokens", 4096, "--context", 64)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_stock_transformers_loads_a_calibrated_folder_that_loses_less(qlt, here, aligned, text, scheme):
    done = qlt("quantize", aligned, f"--{scheme}", "--calib", text, *CALIB, "-o", "out", "--json")
    assert done.code == 0 and files(here) == {f"out/{name}" for name in FOLDER}
    result = done.json
    assert result["kl"]["stored"] < 0.8 * result["kl"]["plain"] and result["kl"]["tokens"] > 500
    assert all(layer["error_stored"] <= layer["error_plain"] for layer in result["layers"]) and len(result["layers"]) == 14
    decoded = open_checkpoint(here / "out")
    assert distance(logits("out"), logits(aligned, {name: decoded.read(name) for name in decoded.specs})) < 0.06


def test_the_manifest_names_the_statistics_and_what_won(qlt, here, aligned, text):
    assert qlt("calibrate", aligned, "--data", text, *CALIB, "-o", "stats.safetensors").code == 0
    done = qlt("quantize", aligned, "--calib", "stats.safetensors", "-o", "out")
    assert done.code == 0 and "without their text" in done.err
    manifest = read_manifest(here / "out")
    assert len(manifest.inputs["statistics"]["sha256"]) == 64 and manifest.inputs["statistics"]["name"] == "text.txt"
    assert {layer["method"] for layer in manifest.report["layers"].values()} <= {"plain", "search", "gptq", "search+gptq", "search+gptq refit"}
    again = qlt("quantize", aligned, "--calib", "stats.safetensors", "-o", "again")
    assert again.code == 0 and all((here / "out" / name).read_bytes() == (here / "again" / name).read_bytes() for name in FOLDER)


def test_statistics_of_another_model_are_refused(qlt, here, aligned, llama, text):
    qlt("calibrate", llama, "--data", text, *CALIB, "-o", "stats.safetensors")
    done = qlt("quantize", aligned, "--calib", "stats.safetensors", "-o", "out")
    assert done.code == 3 and "another" not in files(here) and not (here / "out").exists()
    assert qlt("quantize", aligned, "--calib", "stats.safetensors", "-o", "out", "--dry-run").code == 3


def test_plain_is_written_where_the_whole_model_loses_more(qlt, here, aligned, text, monkeypatch):
    made = quantize_run._kl
    monkeypatch.setattr(quantize_run, "_kl", lambda plain, stored: made(stored, plain))  # as if the two had changed places
    done = qlt("quantize", aligned, "--calib", text, *CALIB, "-o", "out")
    assert done.code == 0 and "plain form is written" in done.err
    qlt("quantize", aligned, "-o", "plain")
    calibrated, plain = load_file("out/model.safetensors"), load_file("plain/model.safetensors")
    assert calibrated.keys() == plain.keys() and all(torch.equal(calibrated[name], plain[name]) for name in plain)


def test_a_searched_folder_loads_and_errs_less_without_data(qlt, here, aligned):
    for form in ("positive", "signed"):
        assert qlt("quantize", aligned, "--search", form, "-o", form).code == 0
    qlt("quantize", aligned, "-o", "plain")
    errors = {name: max(read_manifest(here / name).report["relative_error"].values()) for name in ("plain", "positive", "signed")}
    assert errors["signed"] < errors["positive"] < errors["plain"]
    assert distance(logits("signed"), logits(aligned)) < 0.5


def test_max_bytes_keeps_some_linears_dense_within_the_size_and_loads(qlt, here, aligned, text):
    from transformers import AutoModelForCausalLM

    small = qlt("quantize", aligned, "--calib", text, *CALIB, "-o", "small", "--json").json
    limit = (small["stored_bytes"] + small["dense_bytes"]) // 2
    done = qlt("quantize", aligned, "--calib", text, *CALIB, "--max-bytes", limit, "-o", "out", "--json")
    assert done.code == 0 and files(here / "out") == FOLDER
    result = done.json
    assert small["stored_bytes"] < result["stored_bytes"] <= limit and 0 < len(result["kept"]) < 14
    assert result["kl"]["stored"] < small["kl"]["stored"]
    modules = dict(AutoModelForCausalLM.from_pretrained(here / "out").named_modules())
    kinds = {name: type(modules[name.removesuffix(".weight")]).__name__ for name in small["kl"] and [layer["name"] for layer in small["layers"]]}
    assert {name for name, kind in kinds.items() if kind == "Linear"} == set(result["kept"])
    assert len(read_manifest(here / "out").source_tensors) == 14 - len(result["kept"])


def test_max_kl_is_met_with_as_few_linears_as_it_takes(qlt, here, aligned, text):
    small = qlt("quantize", aligned, "--calib", text, *CALIB, "-o", "small", "--json").json
    wanted = 0.5 * small["kl"]["stored"]
    result = qlt("quantize", aligned, "--calib", text, *CALIB, "--max-kl", wanted, "-o", "out", "--json").json
    assert result["kl"]["stored"] <= wanted and 0 < len(result["kept"]) < 14
    assert [point for point in result["frontier"] if point["measured_kl"] is not None]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--max-kl", "0.1"), 2, "--calib"),
        (("--int8", "--search", "signed"), 2, "--search"),
        (("--calib", "missing.txt"), None, "missing.txt"),
        (("--calib", "TEXT", "--tokens", "256", "--context", "64", "--max-bytes", "1kB"), 2, "bytes already"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(qlt, here, aligned, text, words, code, said):
    done = qlt("quantize", aligned, *(str(text) if word == "TEXT" else word for word in words), "-o", "out")
    assert done.code != 0 and (code is None or done.code == code) and said in done.err
    assert files(here) == set()
