import json

import pytest
from bench_records import changed, make_record

from qlora_tools.bench.record import Quality, at_most, same
from qlora_tools.bench.record_file import parse_record, read_record
from qlora_tools.errors import CorruptError, MissingError


def test_a_record_survives_json_byte_for_byte():
    record = make_record()
    content = record.to_json()
    again = parse_record(content)
    assert again.to_json() == content
    assert again.rows[0].attempts[0].decode_s == record.rows[0].attempts[0].decode_s
    assert again.workload == record.workload


def test_every_raw_sample_is_stored():
    stored = json.loads(make_record().to_json())
    assert sum(len(run) for attempt in stored["rows"][0]["attempts"] for run in attempt["decode_s"]) == 3 * 5 * 64


def test_unknown_is_null_never_zero():
    row = json.loads(make_record().to_json())["rows"][3]
    assert (row["status"], row["load"], row["memory"], row["file_bytes"]) == ("oom", None, None, None)


def test_a_number_that_is_not_finite_becomes_null():
    stored = json.loads(make_record(quality=(Quality("fp32", "fp32", "ok", None, {"kl_max": float("inf")}),)).to_json())
    assert stored["quality"][0]["figures"]["kl_max"] is None


def test_keys_of_a_later_version_are_passed_over():
    value = json.loads(make_record().to_json())
    value["novelty"] = value["rows"][0]["novelty"] = 1
    assert parse_record(json.dumps(value).encode()) == parse_record(make_record().to_json())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "schema is 'list'"),
        (changed(lambda v: v.update(schema="qlt.bench/9")), "schema is 'qlt.bench/9'"),
        (changed(lambda v: v["rows"][1].update(status="fine")), r"rows\[1\].status"),
        (changed(lambda v: v.update(rounds="3")), "`rounds` is str"),
        (changed(lambda v: v["rows"][0]["attempts"][0].pop("wall_s")), "wall_s"),
        (changed(lambda v: v["workload"]["cases"][0].update(batch=0)), "batch is 0"),
        (changed(lambda v: v["rows"][0]["prefill"].update(p50_s=float("nan"))), "NaN is no number"),
        (changed(lambda v: v["rows"][0].update(energy_j="FIGURE")).replace(b'"FIGURE"', b"1e400"), "1e400 is no number"),
        (changed(lambda v: v["rows"][0].update(file_bytes="FIGURE")).replace(b'"FIGURE"', b"9" * 5000), "999 is no number"),
        (b'{"schema":' + b"[" * 100_000, "64 levels deep"),
        (changed(lambda v: v["machine"].update(cpu="FIGURE")).replace(b'"FIGURE"', b"[" * 500 + b"]" * 500), "64 levels deep"),
        (changed(lambda v: v["rows"][0]["unknown"].update(load=3)), r"rows\[0\].unknown.load` is int"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(content, message):
    with pytest.raises(CorruptError, match=message):
        parse_record(content)


def test_a_folder_stands_for_its_bench_json(tmp_path):
    with pytest.raises(MissingError, match="qlt bench"):
        try:
            read_record(tmp_path)
        except MissingError as error:
            raise MissingError(f"{error} {error.hint}") from None
    (tmp_path / "bench.json").write_bytes(make_record().to_json())
    assert read_record(tmp_path).title == "A <title>"


def test_an_identity_holds_breaks_or_is_not_known():
    assert [at_most("x", left, 100).held for left in (99, 100, 101, None)] == [True, True, False, None]
    assert [at_most("x", left, 100, 0.02).held for left in (102, 103)] == [True, False]
    assert [same("x", left, 100, 0.05).held for left in (95, 94, 105, 106, None)] == [True, False, True, False, None]
    assert (at_most("x", 1, 2).within, same("x", 1, 2, 0.05).within) == (None, 0.05)
