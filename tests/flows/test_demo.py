"""``qlt demo`` runs the whole chain on a pair and ends in one table and one page."""

from __future__ import annotations

import json

import pytest

from tests.flows.conftest import files


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 120)
    return path


@pytest.mark.slow
def test_the_chain_runs_on_a_given_pair_and_again(qlt, here, llama, tuned, text, monkeypatch):
    from qlora_tools.bench.record import Case, Workload
    from qlora_tools.demo import flow

    monkeypatch.setattr(flow, "QUICK", Workload((Case(8, 4),), repeats=1, warmup=1, most_warmup=1))
    monkeypatch.setattr(flow, "EXPORTS", ("int8",))
    done = qlt("demo", "--base", llama, "--tuned", tuned, "--text", text, "--rounds", 1, "--rank", 8)
    assert done.code == 0, done.err
    for step in (
        "extract",
        "quantize",
        "merge",
        "merge to NF4",
        "merge onto the NF4 grid",
        "merge, the grid kept",
        "export int8",
        "wrote demo/bench/report.html",
    ):
        assert step in done.out
    assert {"demo/bench/report.html", "demo/bench/bench.json", "demo/adapter-r8/adapter_model.safetensors", "demo/onnx-int8/model.onnx"} <= files(here)
    record = json.loads((here / "demo/bench/bench.json").read_text())
    kept = {item["setting"]: item["figures"].get("retention") for item in record["quality"]}
    assert kept["tuned"] == pytest.approx(1) and kept["base"] == pytest.approx(0)
    assert len(record["layers"]) == 14


def test_half_a_pair_is_a_usage_error(qlt, here, llama):
    done = qlt("demo", "--base", llama)
    assert done.code == 2 and "--tuned" in done.err and files(here) == set()


def test_a_dry_run_trains_nothing(qlt, here):
    assert qlt("demo", "--dry-run").code == 0 and files(here) == set()


def test_a_folder_of_the_users_is_not_replaced(qlt, here, llama, tuned, text):
    (here / "demo/adapter-r16").mkdir(parents=True)
    (here / "demo/adapter-r16/mine.txt").write_text("mine")
    done = qlt("demo", "--base", llama, "--tuned", tuned, "--text", text)
    assert done.code == 7 and (here / "demo/adapter-r16/mine.txt").exists()
