import sys

import pytest

from qlora_tools.process_memory import read_memory, reset_peak

STATUS = "Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nRssAnon:\t     600 kB\nRssFile:\t     424 kB\nThreads:\t1\n"


def test_kernel_kilobytes_become_bytes(tmp_path):
    (tmp_path / "status").write_text(STATUS)
    (tmp_path / "smaps_rollup").write_text("0-1 ---p 00 00:00 0 [rollup]\nRss: 1024 kB\nPss:      700 kB\n")
    found = read_memory(tmp_path)
    assert (found.peak_bytes, found.rss_bytes, found.anon_bytes, found.file_bytes, found.pss_bytes) == (2 << 20, 1 << 20, 600 << 10, 424 << 10, 700 << 10)


def test_a_system_without_proc_knows_nothing_and_says_so(tmp_path):
    assert set(read_memory(tmp_path / "none").record().values()) == {None}
    assert reset_peak(tmp_path / "none") is False


def test_a_reset_that_does_nothing_is_noticed(tmp_path):
    (tmp_path / "status").write_text(STATUS.replace("2048", "9048"))
    assert reset_peak(tmp_path) is False
    assert (tmp_path / "clear_refs").read_text() == "5"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_process_has_a_size():
    found = read_memory()
    assert found.peak_bytes >= found.rss_bytes > 1 << 20
