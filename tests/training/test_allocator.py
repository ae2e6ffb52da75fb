"""Memory of the process, measured and given back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from qlora_tools.training import allocator
from qlora_tools.training.allocator import available_bytes, container_bytes, peak_bytes, resident_bytes, return_freed_blocks

HAS_MALLOPT = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_the_peak_stays_when_the_memory_is_gone() -> None:
    before = resident_bytes()
    held = torch.ones(16 << 20)  # 64 MB
    during = resident_bytes()
    assert during - before > 60 << 20
    del held
    assert peak_bytes("cpu") > during - (4 << 20)  # the kernel counts in batches
    assert during > before > 50 << 20


def test_peak_and_free_memory_are_of_the_size_of_a_process_and_a_machine() -> None:
    assert 50 << 20 < peak_bytes("cpu") < 1 << 40
    assert 1 << 20 < available_bytes("cpu") < 1 << 50


def test_without_proc_the_system_is_asked_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = peak_bytes("cpu")
    monkeypatch.setattr(allocator, "_kilobytes", lambda path, field: None)
    assert resident_bytes() == 0
    assert available_bytes("cpu") > 1 << 20
    if sys.platform != "win32":
        assert peak_bytes("cpu") == pytest.approx(usual, rel=0.5)


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from qlora_tools.training.allocator import resident_bytes, return_freed_blocks

if sys.argv[1] == "yes":
    assert return_freed_blocks()
block = 8 << 20
np.ones(31 << 20, dtype=np.uint8)  # freed: glibc now keeps blocks up to this size
before = resident_bytes()
blocks = [np.ones(block, dtype=np.uint8) for _ in range(24)]
pins = blocks[1::2]
blocks = None  # every other block: holes between those that stay
print(resident_bytes() - before - len(pins) * block)
"""


@pytest.mark.skipif(not HAS_MALLOPT, reason="another allocator than glibc's")
def test_freed_blocks_leave_no_holes() -> None:
    def kept(choice: str) -> int:
        done = subprocess.run([sys.executable, "-c", SCRIPT, choice], capture_output=True, text=True, check=True, timeout=120)
        return int(done.stdout)

    assert kept("yes") < 8 << 20 < kept("no")


@pytest.mark.skipif(HAS_MALLOPT, reason="glibc is here")
def test_another_allocator_is_left_alone() -> None:
    assert return_freed_blocks() is False


@pytest.mark.gpu
def test_a_gpu_is_asked_for_its_own_memory() -> None:
    held = torch.ones(16 << 20, device="cuda")
    assert peak_bytes("cuda") >= held.numel() * 4
    assert 0 < available_bytes("cuda") < torch.cuda.get_device_properties(0).total_memory


def test_a_containers_limit_counts_and_cached_files_are_free(tmp_path):
    assert container_bytes(tmp_path) == 1 << 62
    for name, text in (("memory.max", "1000\n"), ("memory.current", "700\n"), ("memory.stat", "anon 500\ninactive_file 150\nactive_file 50\n")):
        (tmp_path / name).write_text(text)
    assert container_bytes(tmp_path) == 1000 - 700 + 200
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) == 1 << 62
