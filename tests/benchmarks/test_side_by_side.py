"""``side_by_side.py`` measures what has no result of this code, once, and goes on after a failure."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import side_by_side
from measured import against_itself, code_version
from side_by_side import STEPS, arguments_of, is_fresh, parser_of

HERE = Path(side_by_side.__file__).parent


@pytest.fixture
def calls(results, monkeypatch):
    """Scripts that were called; each leaves a result unless its name is in ``failing``."""
    found = SimpleNamespace(scripts=[], failing=set())

    def run(command, check=False):
        script = Path(command[1]).name
        found.scripts.append(script)
        step = next((step for step in STEPS if step.script == script), None)
        if step is not None and script not in found.failing:
            (results / f"{step.name}.json").write_text(json.dumps({"code": code_version(Path(script), command[2:]), "command": ""}))
        return subprocess.CompletedProcess(command, int(script in found.failing))

    monkeypatch.setattr(side_by_side.subprocess, "run", run)
    monkeypatch.setattr(side_by_side, "everything", list)
    return found


def test_what_was_measured_with_this_code_is_not_measured_again(calls):
    side_by_side.main(["--run"])
    first, calls.scripts = calls.scripts, []
    side_by_side.main(["--run"])
    assert first == [*(step.script for step in STEPS if step.model != "needed"), "tables.py"] and calls.scripts == ["tables.py"]


def test_force_and_other_arguments_measure_again(calls, monkeypatch):
    side_by_side.main(["--run", "--only", "adapters_kept"])
    side_by_side.main(["--run", "--only", "adapters_kept", "--genai-python", "other/python"])
    monkeypatch.setenv("FORCE", "1")
    side_by_side.main(["--run", "--only", "adapters_kept", "--genai-python", "other/python"])
    assert calls.scripts.count("adapters_kept.py") == 3


def test_a_failing_script_is_named_and_costs_the_others_nothing(calls):
    calls.failing = {"extract_vs_mergekit.py"}
    with pytest.raises(SystemExit, match="failed: extract_vs_mergekit.py"):
        side_by_side.main(["--run"])
    assert "memory.py" in calls.scripts
    calls.scripts, calls.failing = [], set()
    side_by_side.main(["--run"])
    assert calls.scripts == ["extract_vs_mergekit.py", "tables.py"]


def test_dry_run_runs_nothing(calls, capsys):
    side_by_side.main(["--dry-run"])
    assert not calls.scripts and "would run" in capsys.readouterr().out


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.script)
def test_every_step_is_a_script_that_takes_its_arguments(step):
    options = parser_of().parse_args(["--model", "M", *(f"--{peer}-python=P" for peer in ("mergekit", "genai", "optimum", "olive"))])
    text = (HERE / step.script).read_text(encoding="utf-8")
    for word in arguments_of(step, options):
        assert not word.startswith("--") or f'"{word}"' in text, f"{step.script} does not take {word}"


def test_a_result_of_other_code_is_stale(results):
    step = STEPS[0]
    (results / f"{step.name}.json").write_text(json.dumps({"code": "0" * 16}))
    assert not is_fresh(step, list(step.arguments))


def test_a_tool_beside_itself_is_one_and_says_how_far_it_strays():
    assert against_itself([1.0] * 5) is None
    still = against_itself([1.0] * 8)
    assert still["median"] == 1 and still["half_width"] == 0 and still["pairs"] == 4
    shaken = against_itself([1.0, 1.1, 1.1, 1.0] * 5)
    assert shaken["half_width"] == pytest.approx(0.1, abs=0.02)
