import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_tools.bench import attempts
from qlora_tools.bench.attempts import QualityTask
from qlora_tools.bench.journal import Journal, plan_of
from qlora_tools.bench.record import Case, Setting, Workload
from qlora_tools.bench.run import run_bench
from qlora_tools.errors import CorruptError, IncompatibleError, StorageError

WORK = Workload((Case(4, 4), Case(4, 4, 2)), repeats=1, warmup=1)
ALL = 2 * 2 * 3 + 2


def answer(job):
    if job["job"] != "latency":
        return {"status": "ok", "reason": None, "figures": {"kl_mean": 0.1}, "wall_s": 1.0, "cpu_s": 1.0, "cpu_stall": 0.0}
    step_s = 1e-3 * len(job["options"]["name"]) * job["workload"]["batch"]
    run = {"prefill_s": 5 * step_s, "ttft_s": 5 * step_s, "decode_s": [step_s] * 3, "total_s": 8 * step_s}
    return {"status": "ok", "reason": None, "runs": [run], "warmup_s": [1.0], "is_steady": False, "wall_s": 1.0, "cpu_s": 1.0, "cpu_stall": 0.0, "info": {}}


@pytest.fixture
def workers(monkeypatch):
    """Counts the processes; ends the benchmark after ``stop`` of them, as Ctrl-C does."""

    class Workers:
        started, stop = 0, None

        def run(self, job, *, timeout_s, environment):
            if self.started == self.stop:
                raise KeyboardInterrupt
            self.started += 1
            return answer(job)

    workers = Workers()
    monkeypatch.setattr(attempts, "run_worker", workers.run)
    return workers


def bench(path, rounds=3, workload=WORK, judge=None, **changes):
    settings = [Setting(name, "x:y", {"name": name}, **changes) for name in ("a", "bb")]
    return run_bench(settings, workload, rounds=rounds, quality=QualityTask("p:q", judge or settings[0]), journal=path)


@pytest.mark.parametrize("stop", [0, 1, 5, ALL - 1])
def test_an_interrupted_benchmark_goes_on_where_it_was(workers, tmp_path, stop):
    whole = bench(None)
    workers.started, workers.stop = 0, stop
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path / "run" / "journal.jsonl")
    assert workers.started == stop
    workers.stop = None
    again = bench(tmp_path / "run" / "journal.jsonl")
    assert workers.started == ALL
    assert again.rows == whole.rows
    assert (again.quality, again.comparisons) == (whole.quality, whole.comparisons)
    assert any("interrupted" in note for note in again.notes) == (stop > 0)


def test_a_line_that_was_cut_off_costs_one_process(workers, tmp_path):
    path = tmp_path / "j"
    bench(path)
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    bench(path)
    assert workers.started == ALL + 1
    assert len(path.read_bytes().splitlines()) == ALL + 1
    assert path.read_bytes() == content


def test_a_finished_journal_measures_nothing_again_and_more_rounds_only_themselves(workers, tmp_path):
    bench(tmp_path / "j")
    bench(tmp_path / "j")
    assert workers.started == ALL
    assert len(bench(tmp_path / "j", rounds=4).rows[0].attempts) == 4
    assert workers.started == ALL + 4


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"workload": replace(WORK, repeats=2)}, "workload"),
        ({"environment": {"A": "1"}}, "setting `a`, setting `bb`"),
        ({"threads": 2}, "setting `a`"),
    ],
)
def test_another_benchmark_is_refused_and_says_what_changed(workers, tmp_path, changes, what):
    bench(tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(IncompatibleError, match=f"{what}.* changed since") as caught:
        bench(tmp_path / "j", **changes)
    assert "start anew" in caught.value.hint
    assert (tmp_path / "j").read_bytes() == before


def test_a_model_made_again_is_another_plan_wherever_its_bytes_differ(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x" * (3 << 20))
    setting = Setting("a", "x:y", path=str(tmp_path))
    plan = plan_of([setting])
    os.utime(file, (0, 0))
    assert plan_of([setting]) == plan
    for at in (5, (3 << 20) // 2 + 5, (3 << 20) - 5):  # embeddings, what lies between, and the head
        changed = bytearray(b"x" * (3 << 20))
        changed[at] = 0
        file.write_bytes(changed)
        assert plan_of([setting]) != plan


def test_pieces_are_taken_from_all_over_a_large_file(tmp_path):
    plain = bytes(8 << 20)
    plans = []
    for at in (None, 2 << 20, 4 << 20, 6 << 20):
        content = bytearray(plain)
        if at is not None:
            content[at + 100] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        plans.append(json.dumps(plan_of([Setting("a", "x:y", path=str(tmp_path))])))
    assert len(set(plans)) == 4


def test_a_manifest_tells_of_every_byte(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    setting = Setting("a", "x:y", path=str(tmp_path))
    without = plan_of([setting])
    plans = []
    for sha in ("ab", "cd", "ab"):
        (tmp_path / "qlt-manifest.json").write_text(json.dumps({"files": {"model.onnx": {"sha256": sha}}}))
        plans.append(plan_of([setting]))
    assert plans[0] == plans[2] != plans[1] and without not in plans
    assert plan_of([replace(setting, path=str(tmp_path / "model.onnx"))])["setting `a`"]["files"] == without["setting `a`"]["files"]


def test_a_reference_that_is_not_measured_belongs_to_the_plan_with_its_files(workers, tmp_path):
    weights = tmp_path / "ref" / "model.onnx"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    judge = Setting("ref", "x:y", path=str(weights.parent))
    bench(tmp_path / "j", judge=judge)
    bench(tmp_path / "j", judge=judge)
    assert workers.started == ALL
    weights.write_bytes(b"two")
    with pytest.raises(IncompatibleError, match="reference `ref` changed since"):
        bench(tmp_path / "j", judge=judge)
    measured = Setting("a", "x:y")
    assert plan_of([measured], judge)["order of settings"] == ["a"] and plan_of([measured], measured) == plan_of([measured])


def test_why_a_setting_cannot_run_may_be_worded_anew():
    plans = [plan_of([Setting("a", "x:y", unavailable=words)]) for words in ("its export failed: 3 MB free", "its export failed: 4 MB free", None)]
    assert plans[0] == plans[1] != plans[2]


def lines(*values):
    return b"".join(value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n" for value in values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lines(b"hello\n"), "is no benchmark's journal"),
        (lines([]), "is no benchmark's journal"),
        (lines({"schema": "qlt.bench-journal/9", "plan": {}}), "schema is"),
        (lines({"schema": "qlt.bench-journal/1", "plan": {}}, b"{\n"), "no result"),
        (lines({"schema": "qlt.bench-journal/1", "plan": {}}, {"key": [1]}), "no result"),
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path, content, message):
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(CorruptError, match=message):
        Journal(tmp_path / "j", {})
    assert (tmp_path / "j").read_bytes() == content


def test_an_entry_of_another_kind_is_refused(tmp_path):
    (tmp_path / "j").write_bytes(lines({"schema": "qlt.bench-journal/1", "plan": {}}, {"key": [1], "value": {"cases": 3}}))
    with closing(Journal(tmp_path / "j", {})) as journal, pytest.raises(CorruptError, match="is no result"):
        journal.once([1], Workload, Workload)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(workers, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        bench(tmp_path / "file" / "journal")
    assert workers.started == 0


def test_without_a_path_nothing_is_kept(tmp_path):
    journal = Journal(None, {})
    assert [journal.once([1], Workload, Workload), journal.recalled] == [Workload(), 0]
    assert list(Path(tmp_path).iterdir()) == []
