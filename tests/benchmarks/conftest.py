"""The scripts of ``benchmarks/`` are not a package: they are imported by their own names, with results of their own to read and write."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder that the scripts take for theirs."""
    import claims
    import cuda_matrix
    import measured
    import side_by_side

    for module in (claims, cuda_matrix, measured, side_by_side):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path
