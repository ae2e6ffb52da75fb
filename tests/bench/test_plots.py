from dataclasses import replace

from bench_records import make_record
from page_records import make_forward, make_swept

from qlora_tools.bench.plots import write_plots

NAMES = ["size-kl.png", "latency-kl.png", "decode.png", "prefill.png", "memory.png", "layer-energy.png", "singular-values.png"]
MORE = ["vram-kl.png", "device-memory.png", "by-batch.png", "by-prompt.png", "layer-change.png"]


def test_every_plot_is_a_png_and_the_same_record_gives_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    written = write_plots(make_swept(), tmp_path / "a", dpi=30)
    assert sorted(path.name for path in written) == sorted(NAMES + MORE)
    write_plots(make_swept(), tmp_path / "b", dpi=30)
    for path in written:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content == (tmp_path / "b" / path.name).read_bytes()


def test_one_case_and_no_accelerator_have_no_sweeps_and_no_memory_of_a_device(tmp_path):
    assert [path.name for path in write_plots(make_record(), tmp_path, dpi=30)] == NAMES


def test_a_model_that_looks_once_is_drawn_by_its_forward(tmp_path):
    names = [path.name for path in write_plots(make_forward(), tmp_path, dpi=30)]
    assert names == ["size-error.png", "latency-error.png", "forward.png", "memory.png"]


def test_plots_without_data_are_not_written(tmp_path):
    record = make_record()
    assert write_plots(replace(record, rows=record.rows[3:], settings=record.settings[3:], quality=(), layers=()), tmp_path) == []
