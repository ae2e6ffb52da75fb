"""``cuda.py`` ends in time, keeps what it had, and runs as it is where there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cuda_matrix as cuda
import pytest

from qlora_tools.bench.record import Attempt, Case, DeviceMemory, Row
from qlora_tools.bench.record_file import parse_record

BENCHMARKS = Path(cuda.__file__).parent
SMALL = ["--device", "cpu", "--shapes", "tiny", "--prompt", "6", "--new", "3", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cuda.py"])


def stored(results):
    return json.loads((results / "cuda_cpu.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_group_runs_through_the_benchmark_and_leaves_ratios(results, tmp_path):
    """Real models, real workers: made, run, deleted. The group in floats, which is made fastest."""
    cuda.main([*SMALL, "--only", "tiny 16 bits", "--work", str(tmp_path)])
    part = stored(results)["parts"]["tiny 16 bits"]
    assert {"fp32", "torch bf16"} == part["rows"].keys() and "failed" not in json.dumps(part["rows"])
    assert {(item["figure"], item["theirs"]) for item in part["ratios"]} == {("prefill", "torch bf16"), ("decode", "torch bf16")}
    record = parse_record(json.dumps(part["record"]).encode())
    assert record.settings[0].id == "torch bf16" and str(tmp_path) not in json.dumps(part)
    assert not list(tmp_path.glob("tmp*"))


def test_what_does_not_fit_says_so_and_an_earlier_figure_stays(results):
    earlier = {"rows": {"int4": {"decode_ms": 1.0}}, "ratios": []}
    (results / "cuda_cpu.json").write_text(json.dumps({"parts": {"tiny 8 bits": earlier}}))
    cuda.main([*SMALL, "--budget", "12", "--skip", "checks"])
    parts = stored(results)["parts"]
    assert {name for name, part in parts.items() if part.get("reason") == cuda.BUDGET} == {"tiny 4 bits", "tiny 16 bits", "tests", "train", "estimate"}
    assert parts["tiny 8 bits"] == earlier


def test_one_part_that_fails_leaves_the_others(results, monkeypatch):
    monkeypatch.setattr(cuda, "ask", lambda job, timeout_s: (_ for _ in ()).throw(RuntimeError("no such device")))
    monkeypatch.setattr(cuda, "gpu_tests", lambda clock: [{"said": "7 passed"}])
    cuda.main([*SMALL, "--only", "checks,tests"])
    parts = stored(results)["parts"]
    assert "no such device" in parts["checks"]["failed"] and parts["tests"]["said"] == "7 passed"


def test_rounds_measured_before_a_failure_stay(results, monkeypatch):
    def one_round_then_nothing(*arguments):
        yield {"rows": {"int4": {"decode_ms": 1.0}}, "ratios": []}
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(cuda, "measured_group", one_round_then_nothing)
    cuda.main([*SMALL, "--only", "tiny 4 bits"])
    part = stored(results)["parts"]["tiny 4 bits"]
    assert part["rows"] and "fell off" in part["stopped"] and "failed" not in part


def test_missing_goes_on_where_the_last_run_ended(results, monkeypatch):
    done = {"rows": {"int4": {"decode_ms": 1.0}}, "ratios": []}
    (results / "cuda_cpu.json").write_text(json.dumps({"parts": {"tiny 4 bits": done, "tiny 8 bits": {"reason": cuda.BUDGET}, "checks": {"failed": "x"}}}))
    asked = []
    monkeypatch.setattr(cuda, "measured_group", lambda work, shape, group, *others: asked.append(group) or [])
    monkeypatch.setattr(cuda, "checks", lambda *others: asked.append("checks") or [{"said": "well"}])
    cuda.main([*SMALL, "--missing", "--skip", "tests,train,estimate"])
    assert asked == ["checks", "8 bits", "16 bits"]


def made(**failed):
    return {name: {"folder": f"/somewhere/{name}", **({"failed": failed[name]} if name in failed else {})} for name in ("int4", "torch nf4")}


def test_a_model_that_could_not_be_made_keeps_its_row(results, monkeypatch):
    monkeypatch.setattr(cuda, "ask", lambda job, timeout_s: made(int4="UnsupportedError: not here"))
    first, second = cuda.settings_of(cuda.ask({}, 1.0), "cpu")
    assert first.id == "torch nf4" and first.unavailable is None
    assert second.unavailable == "UnsupportedError: not here" and second.options == {"folder": "/somewhere/int4", "device": "cpu"}


def test_rounds_stop_when_the_next_would_not_fit(results, monkeypatch, tmp_path):
    """A clock that every round takes 100 seconds of; the first, which measures memory too, counts half."""
    now, asked = [0.0], []

    def run_bench(settings, workload, *, rounds, journal, **options):
        asked.append((rounds, journal))
        now[0] += 100
        return rounds

    monkeypatch.setattr(cuda.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cuda, "run_bench", run_bench)
    options = cuda.parser_of().parse_args(["--rounds", "9"])
    assert list(cuda.rounds_of([], "1b", tmp_path / "journal", options, cuda.Clock(360.0))) == [1, 2, 3]
    assert {journal for _, journal in asked} == {tmp_path / "journal"}
    clock = cuda.Clock(360.0)
    clock.later_s = 250.0
    assert list(cuda.rounds_of([], "1b", tmp_path / "journal", options, clock)) == [1], "another group's first round comes before"


def row(setting, step_s, memory_bytes, rounds=5):
    attempts = tuple(Attempt(number, "ok", None, 1.0, None, None, prefill_s=(step_s,), decode_s=((step_s,),), total_s=(step_s,)) for number in range(rounds))
    return Row(setting, Case(), "ok", None, attempts, device_memory=DeviceMemory(process_peak_bytes=memory_bytes, as_deployed_peak_bytes=memory_bytes))


def test_every_figure_is_held_against_every_rival_and_losses_stay():
    ours, torch_row, builder = row("int4", 0.02, 3 << 30), row("torch nf4", 0.04, 2 << 30), row("builder int4", 0.01, 4 << 30)
    found = {(item["theirs"], item["figure"]): item for other in (ours, torch_row, builder) for item in cuda.beside(ours, other)}
    assert len(found) == 8
    assert found["torch nf4", "decode"]["times_better"] == 2 and found["torch nf4", "decode"]["ci95"] == [2.0, 2.0]
    assert {key for key, item in found.items() if item["times_better"] < 1} == {
        ("torch nf4", "process_peak"),
        ("torch nf4", "as_deployed_peak"),
        ("builder int4", "prefill"),
        ("builder int4", "decode"),
    }
    assert next(cuda.beside(ours, row("torch nf4", 0.04, 0, rounds=3)))["ci95"] is None


def test_a_rival_that_failed_leaves_no_ratio():
    assert not list(cuda.beside(row("int4", 0.02, 1), Row("torch nf4", Case(), "oom", "out of memory", ())))


def test_figures_of_two_devices_are_not_mixed(results):
    options = cuda.parser_of().parse_args(["--device", "cuda"])
    kept = cuda.Results(options, {"name": "NVIDIA One"})
    kept.put("1b 4 bits", {"gpu": {"name": "NVIDIA One"}, "rows": {"int4": {"decode_ms": 1.0}}})
    assert cuda.Results(options, {"name": "NVIDIA One"}).has("1b 4 bits")
    again = cuda.Results(options, {"name": "Other"})
    assert not again.has("1b 4 bits"), "--missing measures it on this device"
    again.put("1b 8 bits", {"rows": {}})
    assert json.loads((results / "cuda.json").read_text())["parts"].keys() == {"1b 8 bits"}
    assert json.loads((results / "cuda_nvidia-one.json").read_text())["parts"].keys() == {"1b 4 bits"}


@pytest.mark.parametrize(
    "found", [{"rows": {"int4": {"failed": "no onnxruntime"}, "torch nf4": {"failed": "no bitsandbytes"}}}, {"said": "1 failed", "passed": False}]
)
def test_a_part_of_which_nothing_ran_is_missing(results, found):
    (results / "cuda_cpu.json").write_text(json.dumps({"parts": {"x": found}}))
    assert not cuda.Results(cuda.parser_of().parse_args(["--device", "cpu"])).has("x")


def test_guesses_come_to_what_was_taken():
    clock = cuda.Clock(100.0)
    for _ in range(20):
        clock.learn(10.0, 20.0)
    assert clock.pace == pytest.approx(2, rel=1e-3)


def test_a_builder_that_dies_without_a_word_leaves_its_status(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "measure", lambda *words, **options: {"wall_s": 1.0, "stderr": "", "returncode": -9})
    options = cuda.parser_of().parse_args(["--genai-python", "python"])
    assert cuda.build(tmp_path, tmp_path, "int4", options, 5.0)["failed"] == "the builder: exit status -9"


@pytest.mark.parametrize(("value", "ci95", "verdict"), [(2.0, [1.5, 2.5], "held"), (1.1, [0.9, 1.3], "open"), (0.8, None, "missed")])
def test_a_bar_is_judged_as_the_tables_judge_it(results, value, ci95, verdict):
    kept = cuda.Results(cuda.parser_of().parse_args(["--device", "cuda"]))
    kept.put("1b 4 bits", {"ratios": [{"ours": "int4", "theirs": "torch nf4", "figure": "decode", "times_better": value, "ci95": ci95}]})
    assert [line.rpartition(": ")[2] for line in kept.verdicts()] == [verdict]


def test_the_script_does_not_hide_the_bindings_of_its_name(tmp_path):
    """torch imports ``cuda.bindings``; the scripts' folder comes first on the path of every script in it."""
    (tmp_path / "cuda" / "bindings").mkdir(parents=True)
    (tmp_path / "cuda" / "bindings" / "runtime.py").write_text("answer = 42")
    code = "import sys; sys.path[:0] = sys.argv[1:]; from cuda.bindings import runtime; print(runtime.answer)"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(BENCHMARKS), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "42\n", done.stderr


def test_an_unknown_part_is_named(results):
    with pytest.raises(SystemExit, match="no part `8b 3 bits`"):
        cuda.main([*SMALL, "--only", "8b 3 bits"])


def test_models_of_8b_fit_the_disk_it_asks_for():
    """60 GB hold the base and any one group of ours beside torch's."""
    for ours, theirs, _ in cuda.GROUPS["cuda"].values():
        of_torch = 0 if theirs == "bf16" else cuda.weights_gb("8b", theirs)
        assert cuda.weights_gb("8b", "bf16") + of_torch + sum(cuda.weights_gb("8b", scheme) for scheme in ours) < 60
