"""Opening a meter: which source, and what is said where there is none."""

import subprocess
import sys

import pytest

from qlora_tools.bench.device import nvml, open_meter, smi
from qlora_tools.bench.device.energy import energy_j
from qlora_tools.errors import MissingError
from tests.bench.device.fake_nvml import GPU_B, FakeNvml, card


def test_the_cpu_has_no_meter():
    assert open_meter("cpu") is None


def test_the_package_is_preferred_and_what_is_visible_is_obeyed(monkeypatch):
    monkeypatch.setattr(nvml, "find", lambda: FakeNvml(card(), card(GPU_B)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert open_meter("cuda").uuid == GPU_B
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert open_meter("cuda:1").uuid == GPU_B


def test_a_worker_confined_to_a_device_opens_the_same_one(monkeypatch):
    monkeypatch.setattr(nvml, "find", lambda: FakeNvml(card(), card(GPU_B)))
    for name, value in open_meter("cuda:1").environment().items():
        monkeypatch.setenv(name, value)
    assert open_meter("cuda").uuid == GPU_B


def test_without_the_package_the_drivers_program_is_asked(monkeypatch):
    monkeypatch.setattr(nvml, "find", lambda: None)
    monkeypatch.setattr(smi, "find", lambda: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(smi, "SmiMeter", lambda device, visible: (device, visible))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert open_meter("cuda:1") == ("cuda:1", None)


def test_without_either_the_hint_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvml, "find", lambda: None)
    monkeypatch.setattr(smi, "find", lambda: None)
    with pytest.raises(MissingError, match="neither the package nvidia-ml-py nor the program nvidia-smi") as caught:
        open_meter("cuda")
    assert "pip install nvidia-ml-py" in caught.value.hint


def test_a_package_that_is_not_installed_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ModuleNotFoundError):
        import pynvml  # noqa: F401
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.setattr("builtins.__import__", _without(__import__, "pynvml"))
    assert nvml.find() is None


def _without(real, missing):
    def importing(name, *rest):
        if name == missing:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *rest)

    return importing


def test_the_parent_of_measurements_imports_nothing_heavy():
    code = "import sys, qlora_tools.bench.device as d; d.open_meter('cpu'); print([n for n in ('torch', 'onnxruntime', 'numpy', 'pynvml') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_energy_is_a_difference_over_enough_work():
    before, after = {"energy_mj": 5_000}, {"energy_mj": 9_500}
    assert energy_j(before, after, seconds=12) == (4.5, None)
    assert energy_j(before, after, seconds=3)[0] is None and "3.0 s" in energy_j(before, after, seconds=3)[1]
    assert energy_j({"energy_mj": None}, after, seconds=12) == (None, "the driver does not count this device's energy")
    assert "began anew" in energy_j(after, before, seconds=12)[1]
