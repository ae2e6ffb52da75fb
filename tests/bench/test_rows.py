from dataclasses import replace

import pytest
from bench_records import attempt

from qlora_tools.bench.record import Case, Setting
from qlora_tools.bench.rows import counted, identities_of, summarise_row

SETTING = Setting("a", "x:y")


def test_of_two_attempts_of_a_round_the_calmer_counts_and_both_are_kept():
    busy, calm = replace(attempt(0, 9e-3), cpu_stall=0.5), replace(attempt(0, 1e-3), cpu_stall=0.2)
    row = summarise_row(SETTING, Case(), [busy, attempt(1, 1e-3), calm])
    assert len(row.attempts) == 3
    assert (row.decode.n_runs, row.cpu_stall, row.reason) == (2, 0.2, None)
    assert row.decode.p50_s == pytest.approx(1e-3, rel=0.01)
    assert counted([calm, busy]) == counted([busy, calm]) == [calm]


def test_energy_of_the_busier_attempt_is_not_lost():
    busy = replace(attempt(0, 1e-3), cpu_stall=0.5, energy_j=3.0, device={"during": {}})
    calm = replace(attempt(0, 1e-3), cpu_stall=0.2, device={"energy_reason": "too short"})
    assert summarise_row(SETTING, Case(), [busy, calm]).energy_j == 3.0
    assert summarise_row(SETTING, Case(), [calm]).unknown["energy_j"] == "too short"


def test_a_second_attempt_that_failed_takes_nothing_from_the_first():
    failed = replace(attempt(0, 1e-3), status="timeout", reason="late", cpu_stall=0.0)
    row = summarise_row(SETTING, Case(), [replace(attempt(0, 1e-3), cpu_stall=0.5), failed])
    assert (row.status, row.reason, row.decode.n_runs) == ("ok", None, 1)


def test_rounds_without_a_good_attempt_are_counted_as_rounds():
    failed = replace(attempt(1, 1e-3), status="timeout", reason="late")
    assert summarise_row(SETTING, Case(), [attempt(0, 1e-3), failed, failed]).reason == "1 of 2 rounds failed: late"


def test_readings_that_agree_hold_and_those_that_cannot_be_are_named():
    good = summarise_row(SETTING, Case(), [attempt(0, 1e-3)])
    assert {found.held for found in identities_of(good)} == {True}
    reading = {"peak_bytes": 50, "rss_bytes": 60, "anon_bytes": 30, "file_bytes": 10, "pss_bytes": None}
    bad = replace(attempt(1, 1e-3), memory={"imported": reading, "loaded": reading, "steady": reading, "peak_was_reset": True})
    held = {found.name: found.held for found in identities_of(summarise_row(SETTING, Case(), [attempt(0, 1e-3), bad]))}
    assert held["resident after running <= peak of running"] is False
    assert held["anonymous and file-backed <= resident"] is True
    assert held["proportional <= resident"] is True  # one of the two processes told


def test_a_peak_that_was_not_reset_is_not_held_against_loading():
    kept = attempt(0, 1e-3)
    row = summarise_row(SETTING, Case(), [replace(kept, memory={**kept.memory, "peak_was_reset": False})])
    assert "resident after loading <= peak of running" not in {found.name for found in row.memory.identities}


def test_a_model_that_looks_once_has_no_decoding_and_says_so():
    once = replace(attempt(0, 1e-3), decode_s=((),) * 5, info={"work": "forward", "weights_bytes": 1, "prompt": "ignored"})
    row = summarise_row(SETTING, Case(128, 1, 4), [once])
    assert (row.decode, row.tpot_s, row.prefill_tokens_per_s) == (None, None, None)
    assert row.prefill.n == 5
    assert row.unknown["decode"] == row.unknown["tpot_s"] == "this model looks once"
    assert row.unknown["prefill_tokens_per_s"] == "this model reads no tokens"
    reads = summarise_row(SETTING, Case(128, 1, 4), [replace(once, info={"work": "forward"})])
    assert reads.prefill_tokens_per_s == pytest.approx(4 * 128 / reads.prefill.p50_s)


def test_the_interval_of_decoding_is_of_processes_and_its_quantiles_of_all_steps():
    times = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3]
    decode = summarise_row(SETTING, Case(), [attempt(number, step_s) for number, step_s in enumerate(times)]).decode
    assert decode.ci95_p50_s == pytest.approx((times[0], times[-1]), rel=0.01)  # the runs of a process, alike as they are, would narrow it
    assert (decode.n, decode.n_runs) == (6 * 5 * 64, 6) and decode.p99_s == pytest.approx(times[-1], rel=0.01)
    few = summarise_row(SETTING, Case(), [attempt(number, 1e-3) for number in range(5)]).decode
    assert (few.ci95_p50_s, few.unknown["ci95_p50_s"]) == (None, "5 processes, 6 needed") and few.p99_s is not None
