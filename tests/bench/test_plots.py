from dataclasses import replace

from bench_records import make_record

from qlora_tools.bench.plots import write_plots

NAMES = ["size-kl.png", "latency-kl.png", "decode.png", "prefill.png", "memory.png", "singular-values.png"]


def test_every_plot_is_a_png_and_the_same_record_gives_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    written = write_plots(make_record(), tmp_path / "a", dpi=60)
    assert [path.name for path in written] == NAMES
    write_plots(make_record(), tmp_path / "b", dpi=60)
    for name in NAMES:
        content = (tmp_path / "a" / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content == (tmp_path / "b" / name).read_bytes()


def test_plots_without_data_are_not_written(tmp_path):
    record = make_record()
    assert write_plots(replace(record, rows=record.rows[3:], settings=record.settings[3:], quality=(), layers=()), tmp_path) == []
