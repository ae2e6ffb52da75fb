"""Whole benchmarks in real processes."""

from pathlib import Path

from qlora_tools.bench.record import Case, Setting, Workload
from qlora_tools.bench.run import run_bench

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}
WORK = Workload((Case(4, 4),), repeats=3, warmup=1, most_warmup=2)


def setting(name, engine="load", **options):
    return Setting(name, f"fake_engine:{engine}", options, environment=ENVIRONMENT)


def test_each_way_to_die_at_one_case_leaves_its_row_and_all_others_intact():
    dying = {"memory": "oom", "SIGKILL": "error", "SIGSEGV": "error", "time": "timeout"}
    listed = [
        setting("good"),
        *(setting(how, "fails_at", batch=2, how=how) for how in dying),
        Setting("unexported", "fake_engine:load", unavailable="no kernel for int4 here"),
        setting("no device", device="cuda:7"),
    ]
    record = run_bench(listed, Workload((Case(4, 3, 1), Case(4, 3, 2)), repeats=1, warmup=1, most_warmup=1), rounds=1, timeout_s=4.0, stall_limit=1.0)
    one, two = record.workload.cases
    assert {row.setting: row.status for row in record.rows_at(one)} == {
        "good": "ok",
        **dict.fromkeys(dying, "ok"),
        "unexported": "error",
        "no device": "unsupported",
    }
    assert {row.setting: row.status for row in record.rows_at(two)} == {"good": "ok", **dying, "unexported": "error", "no device": "unsupported"}
    reasons = {row.setting: row.reason for row in record.rows_at(two)}
    assert "Unable to allocate" in reasons["memory"]
    assert reasons["SIGKILL"] == "the process died of SIGKILL"
    assert reasons["SIGSEGV"].startswith("the process died of SIGSEGV")
    assert reasons["time"] == "no result within 4 s"
    assert reasons["unexported"] == "no kernel for int4 here"
    assert "cuda:7" in reasons["no device"]
    assert all(row.decode.n == 2 for row in record.rows if row.status == "ok")
    assert {tuple(found["case"]) for found in record.comparisons if found["a"] in dying} == {(1, 4, 3)}


def test_one_setting_under_two_names_is_a_tie_and_a_slower_one_is_slower():
    listed = [setting("a", step_s=0.004), setting("b", step_s=0.004), setting("slow", step_s=0.008)]
    record = run_bench(listed, WORK, rounds=5, stall_limit=1.0)
    found = {(item["a"], item["metric"]): item for item in record.comparisons}
    assert found["slow", "decode"]["verdict"] == "b"
    assert found["slow", "decode"]["effect"] > 1.4
    assert found["b", "decode"]["verdict"] == "tie" or abs(found["b", "decode"]["effect"] - 1) < 0.05
    assert found["b", "decode"]["n_pairs"] == 5
