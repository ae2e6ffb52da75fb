from dataclasses import replace

import pytest
from bench_records import make_record
from page_records import CASES, make_forward, make_swept

from qlora_tools.bench.cells import Cell, Column, write_kl
from qlora_tools.bench.table import bench_table, broken_identities, failures, leaders, remarks, to_markdown


def test_a_cell_shows_the_median_and_explains_its_interval():
    cell = bench_table(make_swept()).column("decode_p50")[0]
    assert cell.text == "9.388"
    assert cell.note == "median of 1920; 95 % interval 9.388 to 9.388"
    few = bench_table(make_record()).column("decode_p50")[0]
    assert (few.text, few.note) == ("4.003", "median of 960; no interval: 3 processes, 6 needed")


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


def cells_of(record, key, setting, case=CASES[0]):
    table = bench_table(record)
    return next(cell for cell, row in zip(table.column(key), table.sources, strict=True) if (row.setting, row.case) == (setting, case))


def test_rows_stand_case_by_case_and_what_varies_has_a_column():
    table = bench_table(make_swept())
    assert [column.title for column in table.columns[:4]] == ["Setting", "Batch", "Prompt", "File"]
    assert "Prefill" in [column.title for column in table.columns]
    assert [row.case for row in table.sources] == [case for case in CASES for _ in range(7)]
    assert [cell.text for cell in table.column("prompt_tokens")[::21]] == ["128", "512", "2,048"]


def test_the_device_has_five_numbers_and_the_least_limit():
    table = bench_table(make_swept())
    keys = [column.key for column in table.columns]
    assert [key for key in keys if key in ("arena_peak", "context", "process_peak", "as_deployed_peak", "smallest_limit")] == keys[-9:-4]
    assert [cells_of(make_swept(), key, "nf4").text for key in keys[-9:-4]] == ["921.6", "310.0", "1,341.6", "1,894.5", "940.0"]
    assert "not given back" in cells_of(make_swept(), "as_deployed_peak", "nf4").note
    assert "arena_peak" not in [column.key for column in bench_table(make_record()).columns]


def test_a_reading_that_is_not_known_says_why_in_the_cell_and_below_the_table():
    record = make_swept()
    cell = cells_of(record, "process_peak", "torch-nf4")
    assert (cell.text, cell.value, cell.note) == ("n/a", None, "contended: another process took memory meanwhile")
    assert "process not known for torch nf4 (bitsandbytes): contended: another process took memory meanwhile" in remarks(record)
    assert "energy not known for torch nf4 (bitsandbytes): the driver does not count energy" in remarks(record)


def test_a_limit_that_nobody_asked_for_is_not_missed():
    reason = "it was not asked for"
    lost = {"device_memory.smallest_limit_bytes": reason}
    rows = [replace(row, device_memory=row.device_memory and replace(row.device_memory, smallest_limit_bytes=None), unknown=lost) for row in make_swept().rows]
    assert [said for said in remarks(make_swept(rows=tuple(rows))) if reason in said] == []
    rows[0] = make_swept().rows[0]
    assert len([said for said in remarks(make_swept(rows=tuple(rows))) if said.endswith(reason)]) == 1


def test_figures_that_contradict_each_other_are_named():
    assert broken_identities(make_swept()) == ["ONNX int8 at 1 x 128 + 65: does not hold: process at most deployed (4,000.0 MB against 3,000.0 MB)"]
    assert broken_identities(make_record()) == []


def test_a_failure_names_its_case_unless_all_failed_alike():
    record = make_swept()
    assert failures(record) == ["torch bf16: oom: CUDA out of memory at 16 x 2048 + 65"]
    rows = tuple(replace(row, status="oom", reason="no room") if row.setting == "int4" else row for row in record.rows)
    assert failures(replace(record, rows=rows))[0] == "ONNX int4: oom: no room"


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [("fp16", "", None), ("w8a8", "x1.75 faster [1.67, 1.84]", 1.75), ("torch-bf16", "x2.42 slower [2.30, 2.54]", 1 / 2.4176)],
)
def test_speed_is_told_against_the_first_setting(setting, text, value):
    cell = cells_of(make_swept(), "decode_vs", setting)
    assert cell.text == text
    assert cell.value is None if value is None else cell.value == pytest.approx(value, rel=1e-3)


def test_speeds_that_cannot_be_told_apart_are_a_tie_and_too_few_rounds_are_said():
    record = make_swept()
    cell = cells_of(record, "prefill_vs", "w8a8")
    assert (cell.text, cell.note) == ("tie", "x1.01 [0.98, 1.03]; 5 pairs of rounds")
    short = {"ci95": None, "verdict": "tie", "reason": "a verdict takes 5 rounds, there are 3"}
    some = replace(record, comparisons=tuple({**found, **short} if found["a"] == "nf4" else found for found in record.comparisons))
    assert cells_of(some, "decode_vs", "nf4").text == "not sure"
    assert remarks(some).count("who is faster is not sure: a verdict takes 5 rounds, there are 3") == 1
    assert not [said for said in remarks(some) if " tie in " in said]
    nothing = replace(record, comparisons=tuple({**found, **short} for found in record.comparisons))
    assert "decode_vs" not in [column.key for column in bench_table(nothing).columns]
    assert remarks(nothing).count("who is faster is not sure: a verdict takes 5 rounds, there are 3") == 1


def test_the_ratio_is_turned_where_the_first_setting_is_a():
    record = make_swept()
    turned = {"a": "fp16", "b": "int4", "metric": "decode", "case": [1, 128, 65], "effect": 2.0, "ci95": [1.9, 2.2], "n_pairs": 5, "verdict": "b"}
    assert cells_of(replace(record, comparisons=(turned,)), "decode_vs", "int4").text == "x2.00 faster [1.90, 2.20]"
    turned["effect"], turned["ci95"], turned["verdict"] = 0.5, [0.4, 0.8], "a"
    assert cells_of(replace(record, comparisons=(turned,)), "decode_vs", "int4").text == "x2.00 slower [1.25, 2.50]"


def test_a_model_that_looks_once_has_a_forward_column_and_says_so():
    record = make_forward()
    titles = [column.heading for column in bench_table(record).columns]
    assert "Forward 128 (ms)" in titles
    assert not [title for title in titles if title.startswith(("Prefill", "Decode", "KL"))]
    assert [title for title in titles if title in ("Accuracy (%)", "Output error (%)", "Cosine")] == ["Accuracy (%)", "Output error (%)", "Cosine"]
    text = to_markdown(record)
    assert "Latency: 8 x 128 (inputs x length)" in text
    assert "16 drawn inputs, seeded inputs; intervals are 95 %, from a paired bootstrap over 16 inputs." in text


def test_a_model_that_reads_no_length_is_not_told_one():
    record = make_forward()
    seen = {"work": "forward", "prompt": "ignored"}
    rows = tuple(replace(row, attempts=tuple(replace(found, info=seen) for found in row.attempts)) for row in record.rows)
    record = replace(record, rows=rows)
    assert "Forward (ms)" in [column.heading for column in bench_table(record).columns]
    assert "Latency: 8 (inputs), 1 thread" in to_markdown(record)


def test_the_cosine_of_a_language_model_is_not_shown_beside_its_divergence():
    record = make_record()
    quality = tuple(replace(item, figures={**item.figures, "cosine_mean": 0.9}) for item in record.quality)
    assert "cosine" not in [column.key for column in bench_table(replace(record, quality=quality)).columns]


def test_a_wide_table_is_cut_into_parts_that_fit_with_the_names_in_each():
    table = bench_table(make_swept())
    parts = table.parts(140)
    assert [part.columns[0].key for part in parts] == ["setting"] * len(parts)
    assert [column.key for column in parts[0].columns[:5]] == ["setting", "batch", "prompt_tokens", "file", "weights"]
    shown = [column.key for part in parts for column in part.columns if column.key not in ("setting", "batch", "prompt_tokens")]
    assert shown == [column.key for column in table.columns][3:]
    assert {column.key for column in parts[-1].columns} >= {"kl", "top1", "retention"}
    for part in parts:
        widths = [max(len(cell.text) for cell in part.column(column.key)) + 3 for column in part.columns]
        assert sum(widths) <= 140
    assert [len(part.columns) for part in bench_table(make_record()).parts(200)] == [len(bench_table(make_record()).columns)]
    assert len(table.parts(20)) == len(table.columns) - 3  # too narrow for anything: one figure a part
