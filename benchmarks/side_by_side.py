"""All comparisons with other tools: measure what is not measured with this code, then print every ratio with its interval and whether its bar is held.

    python benchmarks/side_by_side.py                    # only the table, from the results there are
    python benchmarks/side_by_side.py --run [--model DIR] [--force] [--only WORDS] [--PEER-python PATH ...]

``--run`` makes the other tools' environments (``peers.py``) and calls the scripts in turn, one at a time. A script is left out if its result was measured
with exactly this code and these arguments (the ``code`` in its JSON), unless ``--force`` is given or FORCE=1 is set: a run that was cut short goes on where
it stopped. A script that fails is named at the end and costs the others nothing. Without ``--model``, a real decoder with its tokenizer, only random models
are compared, and what needs text is left out. Then the tables of both READMEs are made anew.

About two and a half hours on two cores, on a machine that does nothing else; ``--dry-run`` says what would run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from claims import everything
from judging import HEADS, Claim, tally
from measured import RESULTS, code_version
from peers import PACKAGES

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """One script. ``peer``: whose Python it takes as ``option``. ``model``: it takes ``--model``; ``"needed"``: and cannot do without one."""

    script: str
    arguments: tuple[str, ...] = ()
    minutes: int = 5
    result: str = ""
    peer: str = ""
    option: str = "--peers-python"
    model: str = ""

    @property
    def name(self) -> str:
        return self.result or self.script.removesuffix(".py")


STEPS = (
    Step("quantize_speed.py", ("--pairs", "15"), 3),
    Step("extract_vs_mergekit.py", ("--pairs", "5"), 6, peer="mergekit"),
    Step("train_vs_peft.py", ("--shape", "110m", "--steps", "7", "--pairs", "3"), 8),
    Step("gptq_speed.py", ("--pairs", "3"), 15),
    Step("export_vs_genai.py", ("--shapes", "350m,110m", "--pairs", "5"), 15, peer="genai", model="optional"),
    Step("export_vs_optimum.py", ("--shapes", "350m,110m"), 20, peer="optimum", model="optional"),
    Step("export_vs_olive.py", ("--shapes", "110m"), 15, peer="olive", model="optional"),
    Step("adapters_kept.py", (), 6, peer="genai"),
    Step("open_elsewhere.py", (), 8, peer="genai", option="--genai-python", model="optional"),
    Step("memory.py", ("--builder",), 25, peer="genai"),
    Step("repeatability.py", (), 5),
    Step("nf4_search.py", (), 3, model="needed"),
    Step("export_calibrated.py", ("--calib", "builtin", "--calib", "self"), 10, peer="genai", model="needed"),
)


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="measure first")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run")
    parser.add_argument("--force", action="store_true", default=os.environ.get("FORCE", "") not in ("", "0"), help="measure again what has a result")
    parser.add_argument("--model", type=Path, help="a real decoder with its tokenizer")
    parser.add_argument("--only", default="", help="scripts whose name holds this")
    for peer in PACKAGES:
        parser.add_argument(f"--{peer}-python", type=Path, help=f"python of an environment that holds {peer}")
    return parser


def main(arguments: list[str] | None = None) -> None:
    options = parser_of().parse_args(arguments)
    failed = run_all(options) if options.run or options.dry_run else []
    if options.run and not options.dry_run and "QLT_RESULTS" not in os.environ:  # a trial's figures are not for the READMEs
        subprocess.run([sys.executable, HERE / "tables.py"], check=True)
    if not options.dry_run:
        show(everything())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def run_all(options: argparse.Namespace) -> list[str]:
    """Call what is stale; the names of the scripts that failed."""
    failed = []
    for step in (step for step in STEPS if options.only in step.script):
        words = arguments_of(step, options)
        if words is None:
            print(f"{step.script}: left out, it needs --model")
        elif is_fresh(step, words) and not options.force:
            print(f"{step.script}: measured with this code already")
        elif options.dry_run:
            print(f"{step.script}: would run with {' '.join(words) or 'no arguments'}, about {step.minutes} minutes")
        else:
            print(f"{step.script} {' '.join(words)}: about {step.minutes} minutes", flush=True)
            if subprocess.run([sys.executable, HERE / step.script, *words], check=False).returncode:
                failed.append(step.script)
    return failed


def arguments_of(step: Step, options: argparse.Namespace) -> list[str] | None:
    """What a script is called with; ``None`` if it lacks a model."""
    if step.model == "needed" and options.model is None:
        return None
    words = list(step.arguments)
    if step.model and options.model is not None:
        words += ["--model", str(options.model)]
    python = getattr(options, f"{step.peer}_python") if step.peer else None
    return words + ([step.option, str(python)] if python else [])


def is_fresh(step: Step, words: list[str]) -> bool:
    """True if the result on disk was measured with this code and these arguments."""
    path = RESULTS / f"{step.name}.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("code") == code_version(Path(step.script), words)


def show(claims: list[Claim]) -> None:
    """The table, aligned, losing rows as they are."""
    rows = [HEADS, *(claim.cells for claim in claims)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(tally(claims))


if __name__ == "__main__":
    main()
