from __future__ import annotations

import hashlib
import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "calibration"


def test_readme_states_the_size_and_digest_of_the_text():
    content, readme = (FOLDER / "mixed.txt").read_bytes(), (FOLDER / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(content).hexdigest() in readme
    assert f"{len(content):,} bytes" in readme
    assert len(content) < 200_000


def test_all_five_kinds_of_text_are_in_every_twenty_kilobytes():
    text = (FOLDER / "mixed.txt").read_text(encoding="utf-8")
    for start in range(0, len(text) - 20_000, 20_000):
        piece = text[start : start + 20_000]
        assert "a,b,sum" in piece and '{"id": ' in piece and re.search(r"^ *def ", piece, re.MULTILINE)
