from dataclasses import replace

from bench_records import make_record
from page_records import CASES, make_swept

from qlora_tools.bench.charts_sweep import sweep_chart, sweeps, swept, thinned
from qlora_tools.bench.record import Case, Workload
from qlora_tools.bench.svg import Scale


def test_only_cases_that_differ_in_one_thing_are_a_sweep():
    record = make_swept()
    assert [case.batch for case in swept(record, "batch")] == [1, 4, 16]
    assert {(case.prompt_tokens, case.new_tokens) for case in swept(record, "batch")} == {(128, 65)}
    mixed = replace(record, workload=Workload((Case(128, 65, 1), Case(512, 65, 4))))
    assert swept(mixed, "batch") == swept(mixed, "prompt_tokens") == []
    assert sweeps(make_record()) == []


def test_the_largest_group_is_drawn():
    record = replace(make_swept(), workload=Workload((Case(64, 65, 1), Case(64, 65, 4), *CASES)))
    assert {case.prompt_tokens for case in swept(record, "batch")} == {128}


def test_each_axis_has_times_speeds_and_memory():
    found = {sweep.key: sweep for sweep in sweeps(make_swept())}
    kinds = ["prefill", "prefill-speed", "decode", "decode-speed", "memory", "device-memory"]
    assert list(found) == [f"{kind}-by-{axis}" for axis in ("batch", "prompt") for kind in kinds]
    assert found["decode-by-batch"].fixed == "prompt of 128, 65 new"
    assert found["decode-by-prompt"].fixed == "batch 1, 65 new"
    assert (found["decode-by-batch"].is_time, found["memory-by-batch"].is_time) == (True, False)


def test_a_case_where_a_setting_failed_ends_its_line_earlier():
    record = make_swept()
    cases = tuple(case for case in CASES if case.prompt_tokens == 2048)
    found = next(sweep for sweep in sweeps(replace(record, workload=Workload(cases))) if sweep.key == "decode-by-batch")
    lengths = {line.setting: len(line.at) for line in found.series}
    assert lengths.pop("torch bf16") == 2
    assert set(lengths.values()) == {3}


def test_a_drawing_names_every_line_and_every_mark():
    found = sweeps(make_swept())[0]
    drawn = sweep_chart(found)
    assert drawn.count("<title>") == 21
    assert "ONNX w8a8: 6.864 ms at batch 1</title>" in drawn
    assert drawn.count("data-setting=") == 7


def test_a_ninth_setting_does_not_look_like_the_first():
    found = sweeps(make_swept())[0]
    series = tuple(replace(found.series[0], setting=f"s{i}", style=i) for i in range(9))
    drawn = sweep_chart(replace(found, series=series))
    assert 'class="line s0"' in drawn
    assert 'class="line s0 again"' in drawn


def test_close_places_share_no_label():
    assert thinned([1.0, 2.0, 3.0, 64.0], Scale(1, 64, 0, 400)) == [1.0, 64.0]
    assert thinned([1.0, 8.0, 64.0], Scale(1, 64, 0, 400, is_log=True)) == [1.0, 8.0, 64.0]
