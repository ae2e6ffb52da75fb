import re

from bench_records import make_record
from page_records import CASES, device_memory, make_swept

from qlora_tools.bench.charts import device_chart, device_pieces, timing_chart
from qlora_tools.bench.charts_layers import energy_chart, map_places, retention_chart
from qlora_tools.bench.record import DeviceMemory


def test_the_parts_of_the_device_add_up_to_what_is_deployed():
    memory = device_memory(900, CASES[0])
    pieces = device_pieces(memory)
    assert [piece.what for piece in pieces] == ["weights", "rest of the arena", "context", "rest of the process", "more as deployed"]
    assert sum(piece.amount_bytes for piece in pieces) == memory.as_deployed_peak_bytes
    assert pieces[2].amount_bytes == memory.context_bytes


def test_a_part_that_is_not_known_is_named_with_the_next():
    pieces = device_pieces(DeviceMemory(weights_bytes=10, arena_peak_bytes=12, as_deployed_peak_bytes=30))
    assert [(piece.what, piece.amount_bytes) for piece in pieces] == [
        ("weights", 10),
        ("rest of the arena", 2),
        ("context and rest of the process and more as deployed", 18),
    ]
    assert device_pieces(DeviceMemory()) == []


def test_figures_that_contradict_each_other_give_no_negative_part():
    pieces = device_pieces(DeviceMemory(weights_bytes=10, arena_peak_bytes=8, context_bytes=1, process_peak_bytes=20))
    assert [(piece.what, piece.amount_bytes) for piece in pieces] == [("weights", 10), ("rest of the process", 10)]


def test_bars_show_the_first_case():
    record = make_swept()
    drawn = timing_chart(record, "decode", "ms")
    assert drawn.count("<rect") == sum(row.status == "ok" for row in record.rows_at(CASES[0])) < sum(row.status == "ok" for row in record.rows)
    assert "ONNX int4: 4.231 ms" in drawn
    assert device_chart(make_record()) is None


def test_the_least_limit_is_a_mark_on_the_devices_bar():
    assert device_chart(make_swept()).count('class="peak"') == 7


def test_layers_stand_by_kind_and_number():
    rows, columns, places = map_places(["model.layers.0.a", "model.layers.3.a", "model.layers.3.b", "head"])
    assert (rows, columns, places) == (["a", "b", "head"], [0, 3], [(0, 0), (0, 1), (1, 1), (2, 0)])


def test_change_kept_is_drawn_only_where_it_is_known():
    assert retention_chart(make_record().layers) is None
    drawn = retention_chart(make_swept().layers)
    assert len(re.findall("<title>", drawn)) == 48
    assert "model.layers.0.self_attn.q_proj [8, 8]: 90.00 % of the change kept" in drawn
    assert "70.00 % kept at rank 4, at most 97.00 %" in energy_chart(make_swept().layers)
