"""The meter over nvidia-smi, from recorded answers."""

import subprocess

import pytest

from qlora_tools.bench.device import smi
from qlora_tools.bench.device.smi import SmiMeter
from qlora_tools.errors import MissingError
from tests.bench.device.fake_nvml import GPU_A, GPU_B, MIB

LISTED = f"{GPU_A}, NVIDIA H100 80GB HBM3, Disabled\n{GPU_B}, NVIDIA A10, [N/A]\n"
DESCRIBED = "NVIDIA H100 80GB HBM3, 580.65.06, 81559, 1980, 1980, 2619, Enabled\n"


class Answers:
    def __init__(self, listed=LISTED, used="1234", apps="7, 900\n9, [N/A]\n", described=DESCRIBED):
        self.asked, self.listed, self.used, self.apps, self.described = [], listed, used, apps, described

    def __call__(self, arguments):
        self.asked.append(list(arguments))
        query = arguments[0]
        if query == "-q":
            return "\n    Driver Version                        : 580.65.06\n    CUDA Version                          : 13.0\n"
        if "compute-apps" in query:
            return self.apps
        return self.used if "memory.used" in query else self.listed if "mig" in query else self.described


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "self" / "ns").mkdir(parents=True)
    (tmp_path / "self" / "ns" / "pid").symlink_to("pid:[4026531836]")
    return tmp_path


def test_mebibytes_become_bytes_and_the_device_is_asked_by_uuid(machine):
    answers = Answers()
    meter = SmiMeter("cuda:1", None, answers, machine)
    assert meter.uuid == GPU_B
    assert meter.read(7) == {"used_bytes": 1234 * MIB, "process_bytes": 900 * MIB, "energy_mj": None}
    assert all(arguments[-2:] == ["-i", GPU_B] for arguments in answers.asked[1:])


def test_what_is_not_told_is_unknown(machine):
    for pid in (8, 9):
        assert SmiMeter("cuda", None, Answers(), machine).read(pid)["process_bytes"] is None
    with pytest.raises(MissingError, match="does not tell its memory"):
        SmiMeter("cuda", None, Answers(used="[N/A]"), machine).read()


def test_the_description_has_the_same_names_as_nvml(machine):
    assert SmiMeter("cuda", None, Answers(), machine).describe() == {
        "name": "NVIDIA H100 80GB HBM3", "uuid": GPU_A, "driver": "580.65.06", "cuda": "13.0", "memory_bytes": 81559 * MIB, "ecc": True, "others_running": 2,
        "clocks": {"sm_mhz": 1980, "sm_most_mhz": 1980, "memory_mhz": 2619}, "meter": "nvidia-smi",
    }  # fmt: skip


def test_a_divided_gpu_needs_the_package():
    with pytest.raises(MissingError, match="divided") as caught:
        SmiMeter("cuda", None, Answers(listed=f"{GPU_A}, A100, Enabled\n"))
    assert "nvidia-ml-py" in caught.value.hint


@pytest.mark.parametrize("listed", ["", "No devices were found\n", "a, b\n"])
def test_an_answer_of_another_form_is_named(listed):
    with pytest.raises(MissingError, match="expected 3 words"):
        SmiMeter("cuda", None, Answers(listed=listed))


def test_a_program_that_fails_is_named_with_its_first_line(monkeypatch):
    failed = subprocess.CompletedProcess([], 9, "", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\nmore\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MissingError, match=r"couldn't communicate with the NVIDIA driver\.$"):
        smi.ask(["-L"])


def test_a_program_that_hangs_is_named(monkeypatch):
    def hangs(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(subprocess, "run", hangs)
    with pytest.raises(MissingError, match="does not run"):
        smi.ask(["-L"])
