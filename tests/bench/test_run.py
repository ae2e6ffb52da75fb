from pathlib import Path

import pytest

from qlora_tools.bench import run
from qlora_tools.bench.attempts import QualityTask
from qlora_tools.bench.record import Attempt, Case, Setting, Workload
from qlora_tools.bench.rows import summarise_memory, summarise_row, weight_file_bytes
from qlora_tools.errors import UsageError

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}
WORK = Workload((Case(4, 4),), repeats=2, warmup=1, most_warmup=3)


def run_bench(*args, **options):
    """Without second attempts: the machine that runs the tests may be busy."""
    return run.run_bench(*args, **{"stall_limit": 1.0, **options})


def setting(name, engine="load", **options):
    return Setting(name, f"fake_engine:{engine}", options, environment=ENVIRONMENT)


def test_a_failing_setting_leaves_its_row_and_the_others_intact(tmp_path):
    quality = QualityTask("fake_engine:mean_probe", setting("good"), {"ids": [1, 2, 3]})
    listed = [setting("good"), setting("bad", "out_of_memory"), setting("gone", "crash"), setting("noisy", noise=0.5)]
    record = run_bench(listed, WORK, rounds=1, quality=quality)
    assert [(row.setting, row.status) for row in record.rows] == [("good", "ok"), ("bad", "oom"), ("gone", "error"), ("noisy", "ok")]
    assert record.row("bad").reason == "MemoryError: no room for 12 GB"
    assert record.row("bad").load is None
    good = record.row("good")
    assert good.decode.n == 6
    assert good.decode.p95_s is None
    assert good.decode.unknown["p95_s"] == "6 samples, 59 needed"
    assert good.decode_tokens_per_s == pytest.approx(1 / good.tpot_s)
    assert good.weights_bytes == 8192
    assert (good.file_bytes, good.unknown["file_bytes"]) == (None, "the setting names no path")
    assert record.quality_of("good").figures["difference"] == 0.0
    assert record.quality_of("noisy").figures["difference"] > 0.1
    assert record.quality_of("gone").reason.startswith("not judged: the process died of SIGSEGV")


def test_a_setting_that_fails_in_one_round_keeps_the_others_and_says_so(tmp_path):
    record = run_bench([setting("shaky", "fails_once", flag_file=str(tmp_path / "flag"))], WORK, rounds=2)
    row = record.rows[0]
    assert row.status == "ok"
    assert row.reason == "1 of 2 rounds failed: ValueError: first time"
    assert [attempt.status for attempt in row.attempts] == ["error", "ok"]
    assert row.load.n == 1


def test_a_busy_machine_is_noted_and_what_it_disturbed_taken_once_more(monkeypatch):
    calls = []

    def fake(config, *, timeout_s, environment):
        calls.append(config["options"]["tag"])
        stall = 0.9 if calls[-1] == "b" else 0.3 if calls[-1] == "c" and len(calls) == 3 else 0.0
        return {"status": "ok", "reason": None, "wall_s": 0.0, "cpu_s": None, "cpu_stall": stall}

    monkeypatch.setattr("qlora_tools.bench.attempts.run_worker", fake)
    record = run_bench([setting(name, tag=name) for name in "abc"], WORK, rounds=2, stall_limit=0.2)
    assert "".join(calls) == "abcbc" + "cbab"
    assert record.stall_limit == 0.2
    assert record.notes[0] == "3 attempts were made again since the machine was busy; both are kept, and the calmer counts."
    assert "more than 20% of the time beside b" in record.notes[1]


def test_a_model_that_looks_once_is_timed_as_one_forward():
    row = run_bench([setting("once", "looks_once")], WORK, rounds=1).row("once")
    assert (row.status, row.prefill.n, row.decode, row.unknown["decode"]) == ("ok", 2, None, "this model looks once")


def test_the_record_names_no_folder(monkeypatch, tmp_path):
    (tmp_path / "secret" / "model").mkdir(parents=True)
    (tmp_path / "secret" / "model" / "m.onnx").write_bytes(b"123")
    path = str(tmp_path / "secret" / "model")
    outcome = {"status": "error", "reason": f"{path} holds no graph", "wall_s": 0.0, "cpu_s": None, "cpu_stall": None}
    monkeypatch.setattr("qlora_tools.bench.attempts.run_worker", lambda *a, **k: outcome)
    record = run_bench([Setting("a", "x:y", {"folder": path, "n": 3}, path=path)], WORK, rounds=1)
    assert b"secret" not in record.to_json()
    assert record.settings[0].options == {"folder": "model", "n": 3}
    assert record.rows[0].file_bytes == 3
    assert record.rows[0].reason == "model holds no graph"


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ([], {}, "no setting"),
        ([setting("a"), setting("a")], {}, "two settings are called a"),
        ([setting("a")], {"rounds": 0}, "rounds is 0"),
        ([setting("a")], {"threads": 0}, "threads"),
    ],
)
def test_impossible_benchmarks_are_refused(settings, options, message):
    with pytest.raises(UsageError, match=message):
        run_bench(settings, WORK, **options)


def test_only_weights_and_graphs_count_as_the_model(tmp_path):
    for name, size in (("model.onnx", 10), ("model.onnx.data", 100), ("w.safetensors", 1000), ("tokenizer.json", 5)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert weight_file_bytes(str(tmp_path)) == 1110
    assert weight_file_bytes(str(tmp_path / "tokenizer.json")) == 5
    assert weight_file_bytes(None) is None
    assert weight_file_bytes(str(tmp_path / "none")) is None


def attempt(memory, status="ok", number=0):
    return Attempt(
        number,
        status,
        None if status == "ok" else status,
        1.0,
        1.0,
        0.0,
        load_s=1.0,
        prefill_s=(0.5,),
        decode_s=((0.1, 0.3),),
        memory=memory,
        info={"vocab_size": 3},
    )


def test_memory_is_the_largest_of_the_rounds():
    def memory(scale):
        reading = {"rss_bytes": scale, "anon_bytes": 2 * scale, "file_bytes": 3 * scale, "pss_bytes": None}
        return {"imported": reading, "loaded": {"peak_bytes": 9 * scale}, "steady": {**reading, "peak_bytes": 7 * scale}, "peak_was_reset": True}

    found, unknown = summarise_memory([attempt(memory(1)), attempt(memory(2))])
    assert (found.peak_bytes, found.load_peak_bytes, found.steady_peak_bytes, found.runtime_bytes) == (18, 18, 14, 2)
    assert (found.anon_bytes, found.file_bytes, found.pss_bytes, unknown) == (4, 6, None, {})


def test_a_peak_that_could_not_be_reset_is_not_called_steady():
    memory = {"loaded": {"peak_bytes": 5}, "steady": {"peak_bytes": 6}, "peak_was_reset": False}
    found, unknown = summarise_memory([attempt(memory)])
    assert (found.peak_bytes, found.steady_peak_bytes) == (6, None)
    assert "includes loading" in unknown["memory.steady_peak_bytes"]


def test_the_worst_reason_stands_for_a_setting_that_never_ran():
    row = summarise_row(setting("a"), WORK, [attempt({}, "error"), attempt({}, "oom", 1), attempt({}, "timeout", 2)])
    assert (row.status, row.reason, len(row.attempts)) == ("oom", "oom", 3)


def test_rates_follow_from_medians():
    row = summarise_row(setting("a"), Case(100, 3, 2), [attempt({})])
    assert row.prefill_tokens_per_s == 400.0
    assert row.tpot_s == pytest.approx(0.2)
    assert row.decode_tokens_per_s == pytest.approx(10.0)
    assert row.unknown["weights_bytes"] == "the engine does not tell"
