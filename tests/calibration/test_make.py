"""The text that comes with the package is what its sources make, mixes its kinds throughout, and says its digest."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make():
    sys.path.insert(0, str(ROOT / "calibration"))
    try:
        yield importlib.import_module("make")
    finally:
        sys.path.remove(str(ROOT / "calibration"))
        for name in ("make", "dealing", "programs", "records", "sentences"):
            sys.modules.pop(name, None)


def test_the_packaged_text_is_what_the_sources_make_and_the_readme_knows_it(make):
    packaged = (ROOT / "qlora_tools/calibrate/builtin.txt").read_bytes()
    assert packaged == make.builtin_text().encode()
    assert hashlib.sha256(packaged).hexdigest() in (ROOT / "calibration/README.md").read_text()


def test_every_fifteen_kilobytes_hold_programs_records_and_other_languages(make):
    text = make.builtin_text()
    assert 60_000 < len(text) < 150_000
    for start in range(0, len(text) - 15_000, 15_000):
        piece = text[start : start + 15_000]
        assert re.search(r"^ *def ", piece, re.MULTILINE) and '"id": ' in piece and "Español: " in piece and "| item |" in piece and " = " in piece


def test_sums_programs_and_records_are_right(make):
    from dealing import Dealer
    from programs import python
    from records import json_lines, sums

    deal = Dealer(1)
    for _ in range(60):
        compile(python(deal), "program", "exec")
        for line in sums(deal).splitlines():
            left, _, right = line.partition(" = ")
            for word, sign in ((" x ", "*"), ("^", "**"), (" mod ", "%")):
                left = left.replace(word, sign)
            assert eval(left, {}) == int(right), line
        piece = json_lines(deal)
        assert json.loads(piece) if piece.startswith("[") else [json.loads(line) for line in piece.splitlines()]


def test_dealing_is_even_enough(make):
    from dealing import Dealer

    deal = Dealer(3)
    dealt = [deal.below(7) for _ in range(7000)]
    assert {900 < dealt.count(value) < 1100 for value in range(7)} == {True}
    assert sorted(deal.shuffled(range(50))) == list(range(50))
