"""The README says what the code does: its tables come from the results, its exit codes and verbs from the command."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from qlora_tools import errors
from qlora_tools.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_the_committed_results_give():
    assert tables().generated(README) == README, "run: python benchmarks/tables.py"


def test_no_table_is_empty():
    assert "not measured\n<!--" not in README and not re.search(r"<!-- (\w+) -->\n\n?<!-- /\1 -->", README)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_described(verb):
    assert f"qlt {verb}" in README


def test_exit_codes_are_those_of_the_error_classes():
    listed = {int(number) for cell in re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE) for number in cell.split(",")}
    assert {kind.exit_code for kind in errors.QltError.__subclasses__()} <= listed


def test_the_test_command_is_what_ci_runs():
    assert "make test" in README and "make test" in (ROOT / ".ci/run").read_text()


def test_nothing_names_a_machine_or_a_registry():
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.txt"),
        ROOT / "Makefile",
        *(ROOT / "benchmarks").rglob("*.json"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(?:root|home|tmp)/|file://|https?://(?!docs\.python\.org)", text), path
