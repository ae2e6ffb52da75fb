"""``qlt bench`` and ``qlt report`` as typed, with a stand-in for the processes that would be measured."""

from __future__ import annotations

import json

import pytest

from qlora_tools.verbs import bench as verb
from tests.flows.conftest import files
from tests.verbs.bench_stand_in import StandIn

WORK = ("--prompt", 8, "--new", 4, "--tokens", 300)
PAGES = {"bench.json", "report.html", "report.md", "qlt-manifest.json"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    return path


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(verb, "run_bench", found)
    monkeypatch.setattr("qlora_tools.verbs.report.write_plots", lambda record, folder: None)
    return found


@pytest.fixture
def two_runs(qlt, here, llama, tuned, text, stand_in):
    """A run, and one in which the second model is slower and further away."""
    words = ("bench", llama, tuned, "--reference", llama, "--text", text, *WORK)
    assert qlt(*words, "-o", "old").code == 0
    stand_in.step_s, stand_in.noise = {tuned.name: 5e-3}, {tuned.name: 0.5}
    assert qlt(*words, "-o", "new").code == 0
    return here


def test_a_checkpoint_with_settings_is_exported_and_measured(qlt, here, llama, text, stand_in):
    stand_in.step_s = {"int8": 1e-3}
    done = qlt("bench", llama, "--settings", "int8,fp16,torch-fp32", "--device", "cpu", "--text", text, *WORK, "--pick", "kl<9", "--json")
    assert done.code == 0, done.err
    rows = {row["setting"]: row for row in done.json["record"]["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {"base-int8": "ok", "base-fp16": "error", "base-torch-fp32": "ok"}
    assert "do not compute in fp16" in rows["base-fp16"]["reason"] and done.json["reference"] == "base-fp32"
    assert (here / "exports/base-int8/model.onnx").exists() and (here / "exports/base-fp32/model.onnx").exists()
    assert done.json["picked"]["export"] == f"qlt export {llama} --int8 --device cpu -o exports/base-int8"
    remembered = json.loads((here / ".qlt/last.json").read_text())["exports"]
    assert [(item["path"], item["scheme"], item["model"]) for item in remembered] == [(f"exports/base-{name}", name, str(llama)) for name in ("fp32", "int8")]
    bare = qlt("bench", "--text", text, *WORK, "--dry-run", "--json")  # what was made is what the next one measures
    assert bare.code == 0 and set(bare.json["settings"]) == {"base-fp32", "base-int8"}
    again = qlt("bench", llama, "--settings", "int8", "--device", "cpu", "--text", text, *WORK, "--dry-run", "--json")
    assert {step["name"]: step["action"] for step in again.json["plan"]["steps"]} == {"int8": "found", "fp32": "found"}


def test_an_adapter_is_measured_merged_beside_its_base(qlt, here, llama, tuned, text, stand_in):
    qlt("extract", "--base", llama, "--tuned", tuned, "--rank", 4, "-o", "ad")
    stand_in.noise = {"untuned": 3.0}
    done = qlt("bench", llama, "--adapter", "ad", "--settings", "fp32,int8", "--device", "cpu", "--text", text, *WORK)
    assert done.code == 0, done.err
    assert "untuned" in done.out
    record = json.loads((here / "runs/bench-001/bench.json").read_text())
    kept = {item["setting"]: item["figures"]["retention"] for item in record["quality"]}
    assert kept["base-ad-fp32"] == pytest.approx(1) and kept["base-ad-untuned"] == 0
    assert len(record["layers"]) == 14 and all(len(layer["singular_values"]) == 4 for layer in record["layers"])


def test_one_checkpoint_alone_is_measured_in_the_default_settings(qlt, here, llama, stand_in):
    done = qlt("bench", llama, "--device", "cpu", *WORK, "--dry-run", "--json")
    assert done.code == 0 and done.json["settings"] == ["base-fp32", "base-int8", "base-int4"] and done.json["plan"]["new_bytes"] > 0
    assert files(here) == set() and not stand_in.calls
    said = qlt("bench", llama, "--device", "cuda", *WORK, "--dry-run")
    assert said.code == 0 and "torch-nf4" in said.out and "qlt export" in said.out and "exports to make" in said.out
    heads, row = (next(line for line in said.out.splitlines() if word in line) for word in ("Setting", "--fp16"))
    assert heads.index("Command") < row.index("qlt export") + 1 < heads.index("Size") and row.rstrip().endswith("B")  # a size below its heading


def test_lists_of_lengths_and_batches_make_the_cases(qlt, here, llama, tuned, stand_in):
    words = ("bench", llama, tuned, "--reference", llama, "--no-quality", "--prompt", "8,16", "--new", 4, "--batch", "1,2")
    assert qlt(*words, "--json").code == 0
    (call,) = stand_in.calls
    assert [(case.batch, case.prompt_tokens) for case in call["workload"].cases] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    long = qlt("bench", llama, "--prompt", "8,128", "--new", 4)
    assert long.code == 2 and "128 positions" in long.err and "(128 + 4)" in long.err and "hint:" in long.err


@pytest.mark.parametrize("words", [("--prompt", "8,x"), ("--batch", "0"), ("--settings", "int9"), ("--pick", "vram<6"), ("--margin", "5"), ("--timeout", "0")])
def test_words_that_mean_nothing_are_usage_errors(qlt, here, llama, stand_in, words):
    done = qlt("bench", llama, *words)
    assert done.code == 2 and not stand_in.calls and files(here) == set()


def test_exports_by_a_glob_leave_out_what_is_none(qlt, here, llama, text, stand_in):
    for scheme in ("fp32", "int8"):
        qlt("export", llama, f"--{scheme}", "--no-verify")
    (here / "exports/README.md").write_text("words")
    done = qlt("bench", *sorted((here / "exports").iterdir()), "--text", text, *WORK, "--json")
    assert done.code == 0 and done.json["settings"] == ["base-fp32", "base-int8"] and done.json["reference"] == "base-fp32"
    assert "README.md is not a model" in done.err


def test_without_quality_no_reference_is_made(qlt, here, llama, stand_in):
    qlt("export", llama, "--int8", "--no-verify")
    done = qlt("bench", "--no-quality", *WORK, "--json")
    assert done.code == 0 and done.json["settings"] == ["base-int8"] and not (here / "exports/base-fp32").exists()


def test_an_interruption_says_how_to_go_on(qlt, here, llama, tuned, stand_in):
    stand_in.interrupted = True
    stopped = qlt("bench", llama, tuned, "--reference", llama, "--no-quality", *WORK)
    assert stopped.code == 130 and "--resume" in stopped.err
    stand_in.interrupted = False
    assert qlt("bench", llama, tuned, "--reference", llama, "--no-quality", *WORK, "--resume").code == 0
    assert files(here) == {f"runs/bench-001/{name}" for name in PAGES}
    assert qlt("bench", llama, tuned, "--reference", llama, "--no-quality", *WORK, "--resume").code == 9


def test_worse_than_the_baseline_exits_with_one_after_saying_what(two_runs, qlt):
    done = qlt("report", "new", "--compare", "old")
    assert done.code == 1 and "worse" in done.out and "wrote new/report.html" in done.out
    as_json = qlt("report", "new", "--compare", "old/bench.json", "--json")
    worse = {(change["name"], change["metric"]) for change in as_json.json["reports"][0]["compared"]["worse"]}
    assert as_json.code == 1 and {metric for _, metric in worse} == {"prefill", "decode", "KL"}
    assert qlt("report", "new", "--compare", "new").code == 0 and qlt("report", "old", "--compare", "new").code == 0
    assert qlt("report", "new", "--compare", "old", "--margin", "0.9").code == 1


def test_a_benchmark_can_be_held_against_a_baseline_at_once(two_runs, qlt, llama, tuned, text):
    done = qlt("bench", llama, tuned, "--reference", llama, "--text", text, *WORK, "--compare", "old", "-o", "again")
    assert done.code == 1 and "figures are worse" in done.out and files(two_runs / "again") >= PAGES


def test_a_pick_names_the_best_setting_or_what_is_in_the_way(two_runs, qlt):
    done = qlt("report", "new", "--pick", "kl<0.01")
    assert done.code == 0 and "picked" in done.out and "nothing has to be exported" in done.out
    none = qlt("report", "new", "--pick", "vram<6GB,kl<0.01")
    assert none.code == 1 and "nobody meets vram<6GB" in none.out and "no accelerator was measured" in none.out
    assert qlt("report", "new", "--pick", "kl").code == 2


def test_reports_of_several_runs_are_listed(two_runs, qlt):
    done = qlt("report", "old", "new", "--dry-run")
    assert done.code == 0 and done.out.count("would write") == 2 and "measured" in done.out
    many = qlt("report", "old", "new", "-o", "pages", "--json")
    assert [item["output"] for item in many.json["reports"]] == ["pages/old", "pages/new"] and files(two_runs / "pages/new") >= PAGES


def test_a_report_without_runs_is_a_missing_input(qlt, here):
    done = qlt("report")
    assert done.code == 9 and "qlt bench" in done.err
