"""The page in a real browser without a window: what a reader sees and can do. Skipped where there is no Chromium (``QLT_BROWSER`` names one elsewhere)."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from page_records import make_swept

from qlora_tools.bench.page import bench_page

BROWSER = os.environ.get("QLT_BROWSER") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = "</script><i onclick=alert()>bf16"
WATCH = """<script>window.findings = {errors: [], violations: []};
window.addEventListener("error", function (event) { findings.errors.push(event.message); });
document.addEventListener("securitypolicyviolation", function (event) { findings.violations.push(event.violatedDirective); });
["error", "warn"].forEach(function (kind) { console[kind] = function (said) { findings.errors.push(String(said)); }; });</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH, and QLT_BROWSER is not set")


def hostile_record():
    record = make_swept()
    return replace(record, settings=tuple(replace(item, label=HOSTILE) if item.id == "torch-bf16" else item for item in record.settings))


def visit(folder, page, size):
    """The findings of the probe in a window of ``size``."""
    probe = Path(__file__).with_name("page_probe.js").read_text()
    watched = page.replace('<meta name="viewport"', f'{WATCH}<meta name="viewport"', 1).replace("</body>", f"<script>{probe}</script></body>")
    assert watched.count("window.findings") == 2
    (folder / "page.html").write_text(watched, encoding="utf-8")
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={size}", "--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    left = re.search(r'<pre id="findings">(.*?)</pre>', done.stdout, re.S)
    assert left, f"the browser left no findings: {done.stderr[-2000:]}"
    return {**json.loads(html.unescape(left[1])), "console": [line for line in done.stderr.splitlines() if ":CONSOLE" in line]}


@pytest.fixture(scope="module")
def page():
    return bench_page(hostile_record())


@pytest.fixture(scope="module")
def seen(page, tmp_path_factory):
    return visit(tmp_path_factory.mktemp("wide"), page, "1400,1000")


def static_marks(page):
    """Per plot of the page as it is sent: tag, text, class, x, y of every text and mark."""
    plots = []
    for drawing in re.findall(r'<figure class="pareto".*?(<svg.*?</svg>)', page, re.S):
        texts = [("text", html.unescape(text), tag) for tag, text in re.findall(r"<text ([^>]*)>([^<]*)</text>", drawing)]
        marks = [("circle", "", tag) for tag in re.findall(r"<circle ([^>]*)>", drawing)]
        plots.append(sorted((kind, text, *read_mark(tag)) for kind, text, tag in texts + marks))
    return plots


def read_mark(tag):
    values = dict(re.findall(r'([\w-]+)="([^"]*)"', tag))
    return values["class"], float(values.get("x", values.get("cx", 0))), float(values.get("y", values.get("cy", 0)))


def test_nothing_goes_wrong_and_nothing_is_fetched(seen):
    assert (seen["errors"], seen["violations"], seen["console"], seen["requests"], seen["broken"]) == ([], [], [], [], "undefined")


def test_the_script_draws_what_the_page_shows_without_one(seen, page):
    static = static_marks(page)
    assert len(static) == len(seen["drawn"]) == 3
    for before, after in zip(static, seen["drawn"], strict=True):
        after = sorted(tuple(item) for item in after)
        assert [item[:3] for item in after] == [item[:3] for item in before]
        assert [item[3:] for item in after] == [pytest.approx(item[3:], abs=0.02) for item in before]


def test_a_heading_sorts_both_ways_and_what_has_no_figure_stays_last(seen):
    for key, direction, reverse in (("up", "ascending", False), ("down", "descending", True)):
        order, values = seen[key]
        known = [float(value) for value in values if value]
        assert order == direction
        assert known == sorted(known, reverse=reverse)
        assert values[len(known) :] == [""]
    assert seen["groups"] == 8


def test_axes_can_be_chosen(seen):
    assert seen["costs"] == ["file", "weights", "rss", "vram", "decode", "prefill", "energy"]
    assert seen["losses"] == ["kl", "ppl", "top1", "lost"]
    assert seen["first"]["title"] == "File size against KL to the reference"
    assert seen["second"]["title"] == "VRAM as deployed against perplexity"
    assert seen["second"]["titles"] == ["VRAM as deployed (MB)", "perplexity"]
    assert (seen["first"]["caseOff"], seen["second"]["caseOff"]) == (True, False)


def test_a_case_where_a_setting_failed_shows_the_others(seen):
    assert HOSTILE in seen["first"]["names"]
    assert set(seen["first"]["names"]) - set(seen["largest"]["names"]) == {HOSTILE}


def test_a_setting_taken_out_leaves_its_place_on_the_frontier_to_another(seen):
    assert seen["first"]["front"] == ["ONNX fp16", "ONNX int8", "ONNX nf4, searched"]
    assert seen["without"]["front"] == ["ONNX fp16", "ONNX nf4, searched", "ONNX w8a8"]
    assert "ONNX int8" not in seen["without"]["names"]
    assert seen["without"]["lines"] == 12  # its line in every sweep
    assert seen["alone"] == "fewer than two settings have both figures"
    assert (seen["again"]["names"], seen["again"]["off"]) == (seen["first"]["names"], 0)


def test_marks_speak_to_the_pointer_and_to_the_keyboard(seen, page):
    assert seen["hover"][0] == html.unescape(re.search(r"<circle [^>]*><title>([^<]*)</title>", page)[1])
    assert seen["hover"][1] == "visible"
    assert seen["left"] == ["", "hidden"]
    assert set(seen["stops"]) == {"0"}
    one, two, back, away = seen["keys"]
    assert one != two and one == back != "" and away == ""


def test_texts_of_drawings_do_not_lie_on_each_other(seen):
    assert {name: said for name, said in seen["crowded"] if said} == {}


def test_a_narrow_window_scrolls_the_table_and_not_the_page(page, tmp_path):
    found = visit(tmp_path, page, "500,900")
    assert found["width"][0] <= found["width"][1]
    assert found["errors"] == []
