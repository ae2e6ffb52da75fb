import os
from itertools import count
from pathlib import Path

import fake_device
import pytest

from qlora_tools.bench import attempts, worker
from qlora_tools.bench.accelerator import Accelerator, Accelerators, Instruments
from qlora_tools.bench.record import Case, Setting, Workload
from qlora_tools.bench.record_file import parse_record
from qlora_tools.bench.run import run_bench
from qlora_tools.errors import MissingError

MIB = 1 << 20
FAKE = Instruments("fake_device:open_meter", "fake_device:watch_arena", "fake_device:hold_context")
WORK = Workload((Case(4, 4),), repeats=2, warmup=1, most_warmup=1)
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}


def setting(name="gpu", engine="load", device="cuda"):
    return Setting(name, f"fake_device:{engine}", {"device": device}, environment=ENVIRONMENT)


def bench(*settings, workload=WORK, **options):
    return run_bench(settings, workload, rounds=1, stall_limit=1.0, energy_s=0.05, instruments=FAKE, **options)


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_DEVICE", str(tmp_path))
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    """Workers without processes: what is asked and answered is the same."""

    def run(job, *, timeout_s, environment):
        called.append({**job, "environment": environment})
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", environment.get("CUDA_VISIBLE_DEVICES", ""))
        try:
            outcome = {"status": "ok", "reason": None, **worker.run_job(job)}
        except Exception as error:
            outcome = {"status": worker.status_of(error), "reason": worker.reason_of(error)}
        called[-1]["outcome"] = outcome
        return {**outcome, "wall_s": 1.0, "cpu_s": 1.0, "cpu_stall": 0.0}

    called = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(attempts, "run_worker", run)
    return called


def test_five_numbers_come_from_processes_of_their_own():
    record = bench(setting(), setting("host", device="cpu"))
    memory = record.row("gpu").device_memory
    assert (memory.weights_bytes, memory.arena_peak_bytes) == (fake_device.ARENA // 2, fake_device.ARENA)
    assert (memory.context_bytes, memory.process_peak_bytes) == (fake_device.CONTEXT, fake_device.CONTEXT + fake_device.ARENA)
    assert (memory.as_deployed_peak_bytes, memory.method) == (fake_device.CONTEXT + fake_device.DEPLOYED, "process")
    assert [found.held for found in memory.identities] == [True] * len(memory.identities)
    assert record.machine["gpu"]["name"] == "Fake 1"
    attempt = record.row("gpu").attempts[0]
    assert attempt.info["visible"] == fake_device.UUID
    assert attempt.device["before"]["used_bytes"] == attempt.device["after"]["used_bytes"] == fake_device.OTHERS
    assert record.row("host").device_memory is None
    assert record.row("host").attempts[0].info.get("visible") is None
    assert record.row("gpu").unknown["device_memory.smallest_limit_bytes"] == "it was not asked for"


def test_where_the_driver_hides_the_process_the_device_is_bracketed(in_process, monkeypatch):
    monkeypatch.setenv("FAKE_HIDES", "1")
    memory = bench(setting()).row("gpu").device_memory
    assert (memory.method, memory.residual_bytes) == ("bracket", 0)
    assert memory.process_peak_bytes == fake_device.CONTEXT + fake_device.ARENA


def test_a_disturbed_figure_is_taken_again_and_never_guessed(in_process, monkeypatch, device):
    monkeypatch.setenv("FAKE_HIDES", "1")
    reads, plain = [], fake_device.Meter.read

    def read(self, pid=None):  # somebody takes more and more meanwhile
        reads.append(pid)
        return {**plain(self, pid), "used_bytes": plain(self, pid)["used_bytes"] + len(reads) * 50 * MIB}

    monkeypatch.setattr(fake_device.Meter, "read", read)
    row = bench(setting()).row("gpu")
    assert row.status == "ok"
    assert row.device_memory.process_peak_bytes is row.device_memory.as_deployed_peak_bytes is None
    assert row.unknown["device_memory.process_peak_bytes"].startswith("contended")
    assert [call["job"] for call in in_process].count("device-memory") == 3


def test_the_least_limit_is_found_within_a_percent(in_process):
    row = bench(setting(), limits=True).row("gpu")
    assert fake_device.ARENA <= row.device_memory.smallest_limit_bytes <= 1.01 * fake_device.ARENA
    assert {call["options"].get("memory") for call in in_process if call["job"] == "device-memory"} == {"lean"}


def test_a_runtime_that_cannot_be_limited_says_so(in_process):
    row = bench(setting(engine="load_unlimited"), limits=True).row("gpu")
    assert row.device_memory.smallest_limit_bytes is None
    assert row.unknown["device_memory.smallest_limit_bytes"] == "the memory of this runtime cannot be limited"


def test_energy_is_per_new_token_and_long_enough(in_process, monkeypatch):
    monkeypatch.setenv("FAKE_ENERGY", "1")
    row = bench(setting(), workload=Workload((Case(4, 4, 2),), repeats=1, warmup=1, most_warmup=1)).row("gpu")
    energy = in_process[0]["outcome"]["energy"]
    assert row.energy_j == pytest.approx((energy["after"]["energy_mj"] - energy["before"]["energy_mj"]) / 1000 / (energy["runs"] * 2 * 4))
    assert energy["seconds"] >= 0.05
    assert in_process[0]["workload"]["energy_s"] == 0.05


@pytest.mark.parametrize(("variable", "reason"), [(None, "does not count"), ("FAKE_OTHERS", "everybody's")])
def test_energy_that_cannot_be_told_has_its_reason(in_process, monkeypatch, variable, reason):
    if variable:
        monkeypatch.setenv("FAKE_ENERGY", "1")
        monkeypatch.setenv(variable, "1")
    row = bench(setting()).row("gpu")
    assert row.energy_j is None
    assert reason in row.unknown["energy_j"]


def test_a_missing_device_is_a_reason_in_its_row_and_no_more(in_process):
    record = bench(setting("far", device="cuda:7"), setting("host", device="cpu"))
    assert (record.row("far").status, record.row("far").reason) == ("unsupported", "device `cuda:7`: 1 GPU is visible; name cuda")
    assert record.row("host").status == "ok"
    assert "gpu" not in record.machine
    assert len(in_process) == 1


def test_auto_is_the_device_if_there_is_one():
    assert Accelerators([setting(device="auto")], FAKE).of(setting(device="auto")).uuid == fake_device.UUID
    nothing = Accelerators([setting(device="auto")], Instruments("test_device_rounds_none:open_meter"))
    assert nothing.of(setting(device="auto")) is nothing.missing(setting(device="auto")) is None


def test_a_setting_that_never_ran_has_no_memory_measured(in_process):
    row = bench(Setting("gone", "fake_device:nothing", {"device": "cuda"})).row("gone")
    assert (row.status, row.device_memory) == ("error", None)
    assert [call["job"] for call in in_process] == ["latency"]
    assert not os.listdir(fake_device.folder())  # noqa: PTH208


def reads(monkeypatch, is_lost):
    """The benchmark's own readings, of which those that ``is_lost(number)`` names fail."""
    plain, numbers = Accelerator.read, count(1)

    def read(self):
        if is_lost(next(numbers)):
            raise MissingError("GPU-fake does not tell its memory: GPU is lost", hint="run `nvidia-smi`")
        return plain(self)

    monkeypatch.setattr(Accelerator, "read", read)


def test_a_lost_accelerator_costs_its_rows_and_not_the_benchmark(in_process, monkeypatch):
    reads(monkeypatch, lambda number: True)
    record = bench(setting(), setting("host", device="cpu"))
    row = record.row("gpu")
    assert (row.status, row.reason) == ("error", "the accelerator cannot be read: GPU-fake does not tell its memory: GPU is lost")
    assert (row.attempts[0].device, row.device_memory, record.row("host").status) == ({}, None, "ok")
    assert len(in_process) == 1  # nothing was started for the lost one
    assert parse_record(record.to_json()).row("gpu").status == "error"


@pytest.mark.parametrize("hides", [False, True])
def test_a_reading_that_is_missing_afterwards_keeps_the_times_and_says_so(in_process, monkeypatch, hides):
    if hides:
        monkeypatch.setenv("FAKE_HIDES", "1")
    reads(monkeypatch, lambda number: number % 2 == 0)
    row = bench(setting(), limits=True).row("gpu")
    attempt = row.attempts[0]
    assert row.status == "ok" and row.prefill.n == 2 and set(attempt.device) >= {"before", "during", "reason"} and "after" not in attempt.device
    assert attempt.device["reason"].startswith("the accelerator could not be read afterwards: GPU-fake does not tell")
    assert (row.device_memory.process_peak_bytes, row.device_memory.arena_peak_bytes) == (
        None if hides else fake_device.CONTEXT + fake_device.ARENA,
        fake_device.ARENA,
    )
    if hides:
        assert "was not read before and after" in row.unknown["device_memory.process_peak_bytes"]
