import json

import fake_engine
import numpy as np
import pytest

from qlora_tools.bench import worker
from qlora_tools.bench.record import Case, Workload
from qlora_tools.errors import UsageError


def test_every_setting_is_fed_the_same_tokens():
    work = Workload(seed=3).job(Case(7, 4, 2))
    prompt, continuation = worker.workload_tokens(work, 32)
    assert (prompt.shape, continuation.shape) == ((2, 7), (3, 2))
    again = worker.workload_tokens(work, 32)
    assert (prompt == again[0]).all()
    assert (continuation == again[1]).all()
    assert prompt.max() < 32


def test_given_tokens_are_repeated_to_the_length_asked_for():
    prompt, continuation = worker.workload_tokens(Workload(ids=(1, 2, 3)).job(Case(4, 3, 1)), 32)
    assert prompt.tolist() == [[1, 2, 3, 1]]
    assert continuation.tolist() == [[2], [3]]


def test_a_run_has_one_decode_step_fewer_than_new_tokens_and_starts_afresh():
    engine = fake_engine.TableEngine()
    work = Workload(repeats=2, warmup=3, most_warmup=3).job(Case(5, 6))
    found = worker.measure_latency(engine, work, {"vocab_size": 32})
    assert [len(run["decode_s"]) for run in found["runs"]] == [5, 5]
    assert len(found["warmup_s"]) == 3
    assert len(engine.fed) == 6
    run = found["runs"][0]
    assert run["prefill_s"] <= run["ttft_s"] <= run["total_s"]
    assert run["ttft_s"] + sum(run["decode_s"]) == pytest.approx(run["total_s"], rel=1e-6)


def test_warm_up_goes_on_until_three_runs_agree_or_its_limit(monkeypatch):
    times = iter([9.0, 5.0, 1.0, 1.01, 1.02] + [1.0] * 9)
    monkeypatch.setattr(worker, "time_generation", lambda *a: {"total_s": next(times)})
    work = Workload(repeats=1, warmup=2, most_warmup=8).job(Case(1, 1))
    found = worker.measure_latency(fake_engine.TableEngine(), work, {"vocab_size": 32})
    assert (len(found["warmup_s"]), found["is_steady"]) == (5, True)
    times = iter(float(i) for i in range(1, 99))
    found = worker.measure_latency(fake_engine.TableEngine(), work, {"vocab_size": 32})
    assert (len(found["warmup_s"]), found["is_steady"]) == (8, False)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom"),
        (RuntimeError("CUDA out of memory. Tried"), "oom"),
        (RuntimeError("std::bad_alloc"), "oom"),
        (ValueError("room"), "error"),
        (KeyError("x"), "error"),
    ],
)
def test_allocators_are_known_by_their_words(error, status):
    assert worker.status_of(error) == status


def test_a_reason_names_the_way_out_where_the_error_knows_one():
    assert worker.reason_of(UsageError("no such dtype", hint="write fp32")) == "no such dtype; write fp32"
    assert worker.reason_of(UsageError("no such dtype")) == "no such dtype"


def test_a_limit_of_the_runtimes_arena_is_out_of_memory():
    assert worker.status_of(RuntimeError("BFCArena: Available memory of 5 is smaller than requested bytes of 9")) == "oom"


def test_a_reason_is_one_line():
    assert worker.reason_of(ValueError("first\nsecond")) == "ValueError: first"
    assert worker.reason_of(MemoryError()) == "MemoryError"


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    worker.write_result(tmp_path / "r.json", {"status": "ok"})
    with pytest.raises(TypeError):
        worker.write_result(tmp_path / "r.json", {"status": object()})
    assert json.loads((tmp_path / "r.json").read_text()) == {"status": "ok"}


def test_a_probe_gets_both_engines_and_its_options(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = {
        "job": "fake_engine:mean_probe",
        "engine": "fake_engine:load",
        "options": {"noise": 0.0},
        "threads": 1,
        "reference": {"engine": "fake_engine:load", "options": {"noise": 0.5}},
        "probe_options": {"ids": [1, 2]},
    }
    shift = np.abs(fake_engine.TableEngine(0.5).table[[1, 2]] - fake_engine.TableEngine().table[[1, 2]]).mean()
    assert worker.run_job(config)["figures"] == {"difference": shift}
