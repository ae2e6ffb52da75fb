"""What ``benchmarks/`` holds and what is said of it agree: scripts, results, tables, and the one command that makes them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
#: Modules that scripts share, and parts of ``cuda.py``.
PARTS = {"claims", "cuda_child", "cuda_matrix", "graphs", "judging", "measured", "peers", "synthetic", "tables"}
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))


def test_tables_of_both_pages_are_what_the_committed_results_give():
    done = subprocess.run([sys.executable, BENCHMARKS / "tables.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run: python benchmarks/tables.py\n{done.stderr}"


@pytest.mark.parametrize("script", sorted({path.stem for path in BENCHMARKS.glob("*.py")} - PARTS))
def test_every_script_is_described(script):
    assert f"| `{script}.py` |" in README


def test_every_script_described_is_there():
    for name in re.findall(r"`(\w+\.py)`", README):
        assert (BENCHMARKS / name).is_file(), name


def test_every_result_is_shown_or_says_why_not():
    assert "**nowhere**" not in README, "name the file in tables.SHOWN"
    for path in RESULTS:
        assert f"| `{path.stem}` |" in README, path.name


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_says_how_and_where_it_was_made(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["command"].startswith("python benchmarks/") and content["versions"] and content["machine"]["cpu"]


def test_losing_and_unmeasured_rows_are_printed():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    said = re.search(r"(\d+) held, (\d+) open, (\d+) missed, (\d+) not measured\.", README)
    assert said
    for verdict, count in zip(("held", "open", "missed", "not measured"), said.groups(), strict=True):
        assert sum(row.endswith(f"| {verdict} |") for row in rows) == int(count)


def test_the_one_command_runs_the_side_by_side():
    done = subprocess.run(["make", "-n", "bench-peers", "MODEL=some/model", "FORCE=1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "benchmarks/side_by_side.py --run --model some/model --force" in done.stdout, done.stderr
