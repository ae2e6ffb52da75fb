"""The meter over NVML: what it says, and what it must not say."""

import os

import pytest

from qlora_tools.bench.device.nvml import NvmlMeter, is_our_namespace
from qlora_tools.errors import MissingError, UsageError
from tests.bench.device.fake_nvml import GPU_A, GPU_B, MIB, MIG_A, FakeNvml, card


@pytest.fixture
def proc(tmp_path):
    """A container's view: another namespace of processes, with two of its own."""
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "self" / "ns" / "pid").symlink_to("pid:[4026532999]")
    for pid in (41, 42):
        (tmp_path / str(pid)).mkdir()
    return tmp_path


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "self" / "ns" / "pid").symlink_to("pid:[4026531836]")
    return tmp_path


def test_one_reading_has_the_device_the_process_and_the_energy(machine):
    meter = NvmlMeter(FakeNvml(card(processes=[(7, 300 * MIB), (9, 20 * MIB)])), "cuda", None, machine)
    assert meter.read(7) == {"used_bytes": 500 * MIB, "process_bytes": 300 * MIB, "energy_mj": 7000}
    assert meter.read() == {"used_bytes": 500 * MIB, "process_bytes": None, "energy_mj": 7000}


def test_a_process_that_the_driver_does_not_show_is_unknown_and_not_zero(machine):
    for processes in ([], [(9, MIB)], [(7, None)], [(7, 0)], None):
        assert NvmlMeter(FakeNvml(card(processes=processes)), "cuda", None, machine).read(7)["process_bytes"] is None


def test_in_a_container_a_strangers_number_is_not_taken_for_ours(proc):
    read = lambda processes: NvmlMeter(FakeNvml(card(processes=processes)), "cuda", None, proc).read(42)["process_bytes"]  # noqa: E731
    assert read([(42, MIB), (4711, MIB)]) is None
    assert read([(42, MIB), (41, MIB)]) == MIB  # a driver that translates shows only what we see


def test_namespaces_are_told_apart(proc, tmp_path_factory):
    assert not is_our_namespace([4711], proc) and is_our_namespace([41], proc)
    assert is_our_namespace([4711], tmp_path_factory.mktemp("no-proc"))


def test_energy_that_is_not_counted_is_unknown(machine):
    assert NvmlMeter(FakeNvml(card(energy=None)), "cuda", None, machine).read()["energy_mj"] is None


def test_the_description_tells_what_a_reader_needs(machine):
    said = NvmlMeter(FakeNvml(card(processes=[(os.getpid(), MIB), (9, MIB)])), "cuda", None, machine).describe()
    assert said == {
        "name": "Card", "uuid": GPU_A, "driver": "580.65", "cuda": "13.1", "memory_bytes": 80 << 30, "ecc": True, "others_running": 1, "meter": "nvml",
        "clocks": {"sm_mhz": 1980, "sm_most_mhz": 1980, "memory_mhz": 1980},
    }  # fmt: skip


def test_a_part_of_a_divided_gpu_is_read_as_itself(machine):
    whole = card(parts=[card(MIG_A, used=3 * MIB, total=10 << 30, energy=None, clock=None, ecc=None)])
    meter = NvmlMeter(FakeNvml(whole, card(GPU_B)), "cuda:0", None, machine)
    said = meter.describe()
    assert (meter.uuid, meter.read()["used_bytes"], said["memory_bytes"], said["ecc"], said["clocks"]["sm_mhz"]) == (MIG_A, 3 * MIB, 10 << 30, None, None)
    assert meter.environment() == {"CUDA_VISIBLE_DEVICES": MIG_A, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_a_driver_that_does_not_answer_is_named():
    with pytest.raises(MissingError, match="does not answer: Driver/library version mismatch"):
        NvmlMeter(FakeNvml(fails="Driver/library version mismatch"), "cuda")
    with pytest.raises(MissingError, match="0 GPUs"):
        NvmlMeter(FakeNvml(), "cuda")
    with pytest.raises(UsageError):
        NvmlMeter(FakeNvml(card()), "rocm")


def test_a_device_that_is_lost_is_an_error(machine):
    meter = NvmlMeter(FakeNvml(card(used=None)), "cuda", None, machine)
    with pytest.raises(MissingError, match="GPU is lost"):
        meter.read()
    assert meter.describe()["memory_bytes"] is None


def test_every_name_of_the_package_that_is_used_exists():
    pynvml = pytest.importorskip("pynvml")
    used = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML_"))]
    assert len(used) > 14 and [name for name in used if not hasattr(pynvml, name)] == [] and issubclass(pynvml.NVMLError, Exception)
