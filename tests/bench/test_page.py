import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from bench_records import make_record
from page_records import CASES, make_forward, make_swept

from qlora_tools.bench.page import bench_page, embedded
from qlora_tools.bench.record_file import parse_record

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collects what a page would fetch, whether its elements close, and the table's texts."""

    def __init__(self):
        super().__init__()
        self.references, self.open, self.cells, self.svgs, self.tips = [], [], [], 0, 0

    def handle_starttag(self, tag, attributes):
        self.references += [
            (tag, name, value) for name, value in attributes if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster", "background")
        ]
        if tag not in VOID:
            self.open.append(tag)
        self.svgs += tag == "svg"
        self.tips += tag == "title"
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_refers_to_nothing_outside_itself():
    page = bench_page(make_record())
    assert read(page).references == []
    assert re.findall(r"https?:|//[a-z]|url\(|@import", page) == []
    assert "default-src 'none'" in page


def test_every_setting_is_in_the_table_the_failed_one_too():
    cells = read(bench_page(make_record())).cells
    assert "ONNX fp32reference" in cells
    assert "int8 <fast> & |small|" in cells
    assert {"big", "oom"} <= set(cells)


def test_all_drawings_are_there_with_tooltips():
    reader = read(bench_page(make_record()))
    assert reader.svgs == 9
    assert reader.tips > 20


def test_names_from_the_record_cannot_become_markup():
    page = bench_page(make_record(title="<script>alert(1)</script>", notes=('<img src="x">',)))
    assert "<script>alert" not in page
    assert "<img" not in page


def numbers_in(page):
    return json.loads(re.search(r'<script type="application/json" id="bench-data">(.*?)</script>', page)[1])


def test_a_name_cannot_end_the_element_that_holds_the_numbers():
    record = make_swept()
    name = "</script><script>alert(1)</script><!-- & \u2028"
    page = bench_page(replace(record, settings=(replace(record.settings[0], label=name), *record.settings[1:])))
    read(page)
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert numbers_in(page)["shown"][0] == name
    assert embedded({"a": "</Script>"}) == '{"a":"\\u003c/Script\\u003e"}'


def test_the_numbers_hold_every_choice_and_nothing_for_what_is_not_known():
    numbers = numbers_in(bench_page(make_swept()))
    assert numbers["cases"] == [case.name for case in CASES]
    found = {setting["name"]: setting for setting in numbers["settings"]}
    assert found["ONNX int4"]["losses"]["kl"] == [0.055, pytest.approx(0.0495), pytest.approx(0.0605)]
    assert found["ONNX int4"]["losses"]["top1"] == [pytest.approx(9.0), None, None]
    assert found["torch bf16"]["costs"]["decode"][-1] is None
    assert found["torch nf4 (bitsandbytes)"]["costs"]["energy"][0] is None
    assert len(found["ONNX fp16"]["costs"]["vram"]) == len(CASES)


@pytest.mark.parametrize("make", [make_record, make_swept, make_forward])
def test_the_same_record_gives_the_same_bytes_also_through_json(make):
    record = make()
    assert bench_page(record) == bench_page(parse_record(record.to_json()))


def test_a_sweep_draws_all_it_can_and_marks_where_a_case_begins():
    page = bench_page(make_swept())
    reader = read(page)
    assert reader.svgs == 3 + 5 + 12 + 4
    assert page.count('class="first"') == len(CASES) - 1
    assert 'class="scroll tall"' in page
    assert "By batch and length" in page
    assert "Memory of the device" in page
    assert '<li class="failure">ONNX int8 at 1 x 128 + 65: does not hold: process at most deployed' in page
    assert "An accelerator, driver 1.2, memory 80.0 GiB" not in page  # facts stand in the order of their names
    assert "driver 1.2, memory 80.0 GiB, An accelerator" in page


def test_all_devices_are_named_with_their_clocks():
    record = make_swept()
    cards = [{"name": "One", "clocks": {"sm_mhz": 1980, "memory_mhz": None}, "ecc": True}, {"name": "Two"}]
    page = bench_page(replace(record, machine={**record.machine, "gpu": cards[0], "gpus": cards}))
    assert " · One · Two · " in page
    assert "<dd>clocks sm mhz 1980, ecc True, One</dd>" in page
    assert "<dd>Two</dd>" in page


def test_of_each_case_the_best_is_marked():
    page = bench_page(make_swept())
    best = re.findall(r'<td class="best"[^>]*data-value="[^"]*">(4\.231|7\.365|12\.821)</td>', page)
    assert best == ["4.231", "7.365", "12.821"]


def test_a_model_that_looks_once_has_a_forward_and_no_decoding():
    page = bench_page(make_forward())
    reader = read(page)
    assert "Forward of 128 tokens" in page
    assert "Forward, median against relative error of the outputs" in page
    assert "Decode" not in "".join(reader.cells)
    assert "fastest forward: 10.02 ms" in page


@pytest.mark.parametrize("changes", [{"quality": ()}, {"layers": ()}, {"quality": (), "layers": (), "comparisons": (), "notes": ()}])
def test_sections_without_data_are_left_out(changes):
    page = bench_page(make_record(**changes))
    read(page)
    assert ("<h2>Layers</h2>" in page) == ("layers" not in changes)
    assert ("File size against KL to the reference" in page) == ("quality" not in changes)


def test_a_benchmark_where_all_failed_still_makes_a_page():
    record = make_record()
    record = replace(record, settings=record.settings[3:], rows=record.rows[3:], quality=record.quality[3:], layers=())
    page = bench_page(record)
    assert "MemoryError: no room" in page
    assert read(page).svgs == 0
