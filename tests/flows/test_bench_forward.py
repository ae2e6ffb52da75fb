"""Models that look once, timed and judged in processes of their own."""

from __future__ import annotations

from qlora_tools.bench.attempts import QualityTask
from qlora_tools.bench.record import Case, Setting, Workload
from qlora_tools.bench.record_file import parse_record, read_record
from qlora_tools.bench.run import run_bench
from qlora_tools.quality.outputs import PROBE
from qlora_tools.quality.ranking import comparisons
from qlora_tools.verbs.engines import engine_of
from qlora_tools.verbs.evaluate_outputs import inputs_for
from tests.flows.looking_material import linear_graph


def setting(name, folder):
    engine, options = engine_of(folder)
    return Setting(name, engine, options, path=str(folder))


def test_graphs_are_timed_by_their_one_pass_and_judged_by_their_classes(tmp_path):
    exact, near, far = (linear_graph(tmp_path / name, noise) for name, noise in (("exact", 0), ("near", 0.01), ("far", 1.0)))
    settings = [setting("near", near), setting("far", far)]
    work = Workload((Case(12, 1, 3), Case(999, 1, 1)), repeats=2, warmup=3, most_warmup=3)
    record = run_bench(settings, work, rounds=1, quality=QualityTask(PROBE, setting("exact", exact), inputs_for(exact)))
    assert [(row.status, row.reason) for row in record.rows] == [("ok", None)] * 4
    for row in record.rows:
        attempt = next(each for each in row.attempts if each.status == "ok")
        assert attempt.info["work"] == "forward" and attempt.info["prompt"] == "ignored" and len(attempt.prefill_s) == 2 and not any(attempt.decode_s)
        assert row.prefill is not None and row.decode is None and "looks once" in row.unknown["decode"]
    quality = {found.setting: found for found in record.quality}
    assert [found.reason for found in record.quality] == [None, None]
    assert quality["near"].figures["top1_agreement"] > quality["far"].figures["top1_agreement"] and quality["near"].figures["n"] == 16
    pairs = comparisons({name: found.figures for name, found in quality.items()})
    assert [(pair["a"], pair["metric"], pair["verdict"]) for pair in pairs] == [("near", "kl", "a")]
    assert parse_record(record.to_json()).quality == record.quality


def test_what_a_graph_cannot_take_becomes_its_rows_reason(tmp_path):
    folder = linear_graph(tmp_path / "g")
    (folder / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 9}')
    row = run_bench([setting("g", folder)], Workload((Case(1, 1, 1),), repeats=1), rounds=1).rows[0]
    assert row.status == "unsupported" and "[1, 3, 9, 9] was to be fed" in row.reason


def test_exports_are_benched_from_the_command_line(qlt, here):
    for name, noise in (("exact", 0.0), ("near", 0.01)):
        linear_graph(here / name, noise)
    words = ("--rounds", 1, "--prompt", 4, "--new", 1, "--batch", "1,2", "--threads", 1)
    done = qlt("bench", "exact", "near", "--reference", "exact", *words, "-o", "run")
    assert done.code == 0, done.err
    assert "Forward" in done.out and "Prefill" not in done.out and "16 inputs" in done.out + done.err + (here / "run/report.md").read_text()
    record = read_record(here / "run")
    assert [row.status for row in record.rows] == ["ok"] * 4
    assert {found.setting: found.figures["kl_max"] == 0 for found in record.quality} == {"exact": True, "near": False}
    assert any(found["metric"] == "kl" and found["a"] == "exact" and found["verdict"] == "a" for found in record.comparisons)
