"""The calibration text mixes all five kinds throughout, and is the same on every run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("calibration_make", Path(__file__).parents[2] / "calibration/make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_five_kinds_of_text_are_in_every_twenty_kilobytes(make):
    text = make.mixed_text()
    assert 60_000 < len(text) < 200_000
    for start in range(0, len(text) - 20_000, 20_000):
        piece = text[start : start + 20_000]
        assert "a,b,sum" in piece and '{"id": ' in piece and re.search(r"^ *def ", piece, re.MULTILINE)


def test_two_runs_give_the_same_text(make):
    assert make.mixed_text() == make.mixed_text()
