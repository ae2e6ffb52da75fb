from dataclasses import replace

import pytest
from bench_records import make_record

from qlora_tools.bench.table import Cell, Column, bench_table, failures, leaders, to_markdown, to_text, write_kl


def test_a_cell_shows_the_median_and_explains_its_interval():
    cell = bench_table(make_record()).column("decode_p50")[0]
    assert cell.text == "4.003"
    assert cell.note.startswith("median of 960; 95 % interval 4.00")


def test_a_failed_setting_keeps_its_line():
    table = bench_table(make_record())
    assert [cell.text for cell in table.column("setting")] == ["ONNX fp32", "int8 <fast> & |small|", "slow", "big"]
    assert table.column("load")[3].text == "oom"
    assert table.column("load")[3].value is None
    assert table.column("load")[3].note == "MemoryError: no room"
    assert failures(make_record()) == ["big: oom: MemoryError: no room"]


def test_too_few_samples_read_not_available_with_the_count():
    record = make_record()
    row = record.rows[0]
    decode = replace(row.decode, p95_s=None, unknown={"p95_s": "20 samples, 59 needed"})
    table = bench_table(replace(record, rows=(replace(row, decode=decode), *record.rows[1:])))
    assert (table.column("decode_p95")[0].text, table.column("decode_p95")[0].note) == ("n/a", "20 samples, 59 needed")


def test_columns_that_nobody_fills_are_left_out():
    keys = [column.key for column in bench_table(make_record(quality=())).columns]
    assert "kl" not in keys
    assert "retention" not in keys
    assert "peak" in keys


def test_markdown_is_one_table_with_escaped_names_and_the_method():
    text = to_markdown(make_record())
    lines = text.splitlines()
    assert lines[0].startswith("| Setting | File (MB) | Weights (MB) | Load (s) | Prefill 128 (ms) |")
    assert "int8 <fast> & \\|small\\|" in lines[3]
    assert "- int8 <fast> & |small| and slow tie in KL" in lines
    assert "- big: oom: MemoryError: no room" in lines
    assert lines[-1].endswith("intervals are 95 %, from a paired bootstrap over windows.")


def test_plain_text_is_aligned_and_deterministic():
    text = to_text(make_record())
    lines = text.splitlines()
    at = lines[0].index("File (MB)") + len("File (MB)")
    assert all(line[at - 4 : at].strip() for line in lines[1:4])
    assert text == to_text(make_record())


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (7e-5, "7.0e-5"), (0.0312, "0.0312"), (1.5, "1.5000"), (2e-12, "2.0e-12")])
def test_a_small_divergence_does_not_read_as_none(value, text):
    assert write_kl(value) == text


def test_settings_that_cannot_be_told_from_the_best_share_its_place():
    cells = [Cell("", 5.0, "", (4.0, 6.0)), Cell("", 3.0, "", (2.5, 3.5)), Cell("", 3.2, "", (3.1, 3.9)), Cell("oom"), Cell("", 9.0, "", (8.0, 9.9))]
    assert leaders(Column("x", "X", "", "low"), cells) == [1, 2]
    assert leaders(Column("x", "X", "", "high"), cells) == [4]
    assert leaders(Column("x", "X"), cells) == []


def test_without_an_interval_nobody_leads():
    assert leaders(Column("x", "X", "", "low"), [Cell("", 1.0), Cell("", 2.0, "", (2.0, 2.0))]) == []
    assert leaders(Column("x", "X", "", "low"), [Cell("", 1.0, "", (1.0, 1.0)), Cell("", 2.0)]) == [0, 1]


def test_a_peak_may_be_what_any_round_saw():
    assert bench_table(make_record()).column("peak")[0].interval == (60.0, 60.0)
