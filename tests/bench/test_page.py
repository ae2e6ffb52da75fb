import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from bench_records import make_record

from qlora_tools.bench.page import bench_page
from qlora_tools.bench.record import parse_record

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
    assert re.findall(r"https?:|//[a-z]|url\(|@import", page.replace("// Sorts", "")) == []
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


def test_the_same_record_gives_the_same_bytes_also_through_json():
    record = make_record()
    assert bench_page(record) == bench_page(parse_record(record.to_json()))


@pytest.mark.parametrize("changes", [{"quality": ()}, {"layers": ()}, {"quality": (), "layers": (), "comparisons": (), "notes": ()}])
def test_sections_without_data_are_left_out(changes):
    page = bench_page(make_record(**changes))
    read(page)
    assert ("Extracted layers" in page) == ("layers" not in changes)
    assert ("Size against divergence" in page) == ("quality" not in changes)


def test_a_benchmark_where_all_failed_still_makes_a_page():
    record = make_record()
    record = replace(record, settings=record.settings[3:], rows=record.rows[3:], quality=record.quality[3:], layers=())
    page = bench_page(record)
    assert "MemoryError: no room" in page
    assert read(page).svgs == 0
