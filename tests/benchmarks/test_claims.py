"""What is held, open or missed, and that nothing is claimed which no result holds."""

from __future__ import annotations

import json

import claims
import pytest
from judging import NOT_MEASURED, judge, tally


@pytest.mark.parametrize(
    ("value", "ci95", "half_width", "expected"),
    [
        (1.2, (1.1, 1.3), 0.0, "held"),
        (1.2, (0.9, 1.3), 0.0, "open"),
        (1.2, (1.1, 1.3), 0.15, "open"),  # the tool strays as far from itself
        (0.8, (0.7, 0.9), 0.0, "missed"),
        (0.98, (0.9, 1.2), 0.0, "open"),
        (1.0, None, 0.0, "held"),
    ],
)
def test_a_bar_is_held_only_by_the_whole_interval(value, ci95, half_width, expected):
    assert judge(value, 1.0, least=True, ci95=ci95, half_width=half_width) == expected
    inverse = None if ci95 is None else [1 / end for end in reversed(ci95)]
    assert judge(1 / value, 1.0, least=False, ci95=inverse, half_width=half_width) == expected


def test_without_results_nothing_is_held(results):
    found = claims.everything()
    assert {claim.verdict for claim in found} == {NOT_MEASURED}
    assert any("Olive" in claim.theirs for claim in found) and any("mergekit" in claim.theirs for claim in found)
    assert {what.split(":")[0] for what in (claim.what for claim in found) if what.startswith("CUDA")} == {
        f"CUDA, {shape} shape, {ours} against {rival}" for shape in ("1 B", "8 B") for ours, rivals in claims.ON_CUDA.items() for rival in rivals
    }


def test_cuda_cells_are_filled_one_by_one(results):
    item = {"ours": "int4", "theirs": "torch nf4", "batch": 1, "figure": "decode", "times_better": 3.0, "ci95": None}
    (results / "cuda.json").write_text(json.dumps({"parts": {"1b 4 bits": {"ratios": [item, {**item, "figure": "prefill", "times_better": 0.5}]}}}))
    found = {claim.what: claim for claim in claims.on_cuda()}
    assert found["CUDA, 1 B shape, int4 against torch nf4: decode step"].verdict == "held"
    assert found["CUDA, 1 B shape, int4 against torch nf4: prefill"].verdict == "missed"
    assert found["CUDA, 1 B shape, int4 against torch nf4: device memory"].verdict == NOT_MEASURED
    assert found["CUDA, 8 B shape, int4 against torch nf4: prefill, decode step, device memory"].verdict == NOT_MEASURED


def memory_row(verb, peak_bytes, returncode=0):
    return {"verb": verb, "layers": 28, "peak_bytes": peak_bytes, "returncode": returncode}


def test_a_builder_that_died_of_memory_counts_with_what_it_had_reached(results):
    rows = [memory_row("export --int4", 1_500_000_000), memory_row("genai builder int4", 20_000_000_000, 1)]
    (results / "memory.json").write_text(json.dumps({"shape": "3b", "rows": rows}))
    alone, beside = claims.builder_memory()
    assert (alone.verdict, beside.verdict) == ("held", "held") and "it failed" in beside.theirs
    rows[1]["peak_bytes"] = 4_000_000_000
    (results / "memory.json").write_text(json.dumps({"shape": "3b", "rows": rows}))
    assert [claim.verdict for claim in claims.builder_memory()] == ["held", "missed"]


def test_tally_counts_every_verdict(results):
    assert tally(claims.everything()).startswith("0 held, 0 open, 0 missed, ")
