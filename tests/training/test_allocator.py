"""Memory of the process, measured and given back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from qlora_tools.training import allocator
from qlora_tools.training.allocator import Heap, available_bytes, container_bytes, peak_bytes, resident_bytes

HAS_GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")


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
    monkeypatch.setattr(allocator, "counters", lambda path: {})
    assert resident_bytes() == 0
    assert available_bytes("cpu") > 1 << 20
    if sys.platform != "win32":
        assert peak_bytes("cpu") == pytest.approx(usual, rel=0.5)


SCRIPT = """
import numpy as np
from qlora_tools.training.allocator import Heap, resident_bytes

block = 8 << 20
np.ones(31 << 20, dtype=np.uint8)  # freed: glibc now keeps blocks up to this size
before = resident_bytes()
blocks = [np.ones(block, dtype=np.uint8) for _ in range(24)]
pins = blocks[1::2]
blocks = None  # every other block: holes between those that stay
left = resident_bytes() - before - len(pins) * block
assert Heap("cpu").give_back()
print(left, resident_bytes() - before - len(pins) * block)
"""


@pytest.mark.skipif(not HAS_GLIBC, reason="another allocator than glibc's")
def test_holes_between_blocks_that_stay_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert after < 8 << 20 < before


@pytest.mark.skipif(not HAS_GLIBC, reason="another allocator than glibc's")
def test_a_heap_is_not_visited_twice_in_a_moment_and_not_at_all_on_cuda() -> None:
    heap = Heap("cpu")
    assert heap.give_back() and not heap.give_back()
    assert not Heap("cuda:0").give_back()


@pytest.mark.skipif(HAS_GLIBC, reason="glibc is here")
def test_another_allocator_is_left_alone() -> None:
    assert not Heap("cpu").give_back()


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
