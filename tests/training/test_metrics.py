"""The log of a run: canonical lines, read back as the same records, and a resumed file that equals the straight one."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tools.errors import CorruptError, MissingError, StorageError
from qlora_tools.training.events import Evaluation, Event, Sample, Saved, Started, Step
from qlora_tools.training.metrics import TIMED_FIELDS, MetricsLog, read_metrics

START = Started(
    steps=8, resumed_at=0, trainable_parameters=10, total_parameters=1000, rows=64, tokens_per_epoch=640, epochs=1.0, base_bytes=2000, checkpointing=False
)


def step(number: int, loss: float = 2.5) -> Step:
    return Step(
        step=number,
        steps=8,
        epoch=number / 8,
        loss=loss / number,
        lr=1e-4,
        grad_norm=0.5,
        tokens=80,
        trained_tokens=40,
        tokens_per_s=123.4,
        peak_bytes=1 << 20,
        seconds=0.1 * number,
    )


def events(first: int, last: int) -> list[Event]:
    """A run's events from step ``first`` to ``last``, with an evaluation, a sample and a checkpoint at every second step."""
    told: list[Event] = []
    for number in range(first, last + 1):
        told.append(step(number))
        if number % 2 == 0:
            told += [Evaluation(step=number, loss=2.0, best=True), Sample(step=number, prompt="a", text="b\nc"), Saved(step=number, name=f"step-{number}")]
    return told


def write(path, told, resumed_at=0):
    log = MetricsLog(path, resumed_at)
    for event in told:
        log(event)
    log.close()


def untimed(path):
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED_FIELDS} for line in path.read_text().splitlines()]


def test_events_come_back_as_they_were_and_checkpoints_leave_no_line(tmp_path):
    told = [START, *events(1, 4)]
    write(tmp_path / "m.jsonl", told)
    assert read_metrics(tmp_path / "m.jsonl") == [event for event in told if not isinstance(event, Saved)]


def test_lines_are_canonical(tmp_path):
    write(tmp_path / "m.jsonl", [Sample(step=1, prompt="é", text="\n")])
    assert (tmp_path / "m.jsonl").read_bytes() == b'{"event":"sample","prompt":"\\u00e9","step":1,"text":"\\n"}\n'


def test_a_line_is_on_disk_before_the_next_event(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log(START)
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
    log.close()


@pytest.mark.parametrize("went_on_to", [4, 5, 7])
def test_a_resumed_file_equals_the_straight_one_in_all_but_times(tmp_path, went_on_to):
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    write(straight, [START, *events(1, 8)])
    write(resumed, [START, *events(1, went_on_to), Saved(step=went_on_to, name="interrupted")])
    later = [replace(event, seconds=9.0, tokens_per_s=1.0) if isinstance(event, Step) else event for event in events(5, 8)]
    write(resumed, [replace(START, resumed_at=4, probe_bytes=3), *later], resumed_at=4)
    assert untimed(resumed) == untimed(straight)
    assert resumed.read_bytes() != straight.read_bytes()


def test_a_torn_last_line_is_passed_over_and_dropped_on_resume(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [START, step(1)])
    with path.open("a") as file:
        file.write('{"event":"step","st')
    assert len(read_metrics(path)) == 2
    write(path, [step(2)], resumed_at=1)
    assert [event.kind for event in read_metrics(path)] == ["started", "step", "step"]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    write(tmp_path / "m.jsonl", [START, step(1)])
    write(tmp_path / "m.jsonl", [START])
    assert read_metrics(tmp_path / "m.jsonl") == [START]


def test_resuming_without_the_file_starts_one(tmp_path):
    write(tmp_path / "m.jsonl", [replace(START, resumed_at=3), step(4)], resumed_at=3)
    assert [event.kind for event in read_metrics(tmp_path / "m.jsonl")] == ["started", "step"]


def test_values_that_are_not_finite_stay_json_and_read_as_nan(tmp_path):
    write(tmp_path / "m.jsonl", [replace(step(1), loss=math.nan, grad_norm=math.inf)])
    assert json.loads((tmp_path / "m.jsonl").read_text())["loss"] is None
    (found,) = read_metrics(tmp_path / "m.jsonl")
    assert isinstance(found, Step) and math.isnan(found.loss) and math.isnan(found.grad_norm)


def test_an_optional_field_may_be_null(tmp_path):
    write(tmp_path / "m.jsonl", [Evaluation(step=1, loss=1.0, best=False)])
    assert read_metrics(tmp_path / "m.jsonl") == [Evaluation(step=1, loss=1.0, best=False, accuracy=None)]


def test_kinds_and_fields_of_a_later_version_are_passed_over_and_kept_on_resume(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"event":"weather","sky":"blue"}\n{"event":"sample","prompt":"a","step":1,"text":"b","mood":3}\n')
    assert read_metrics(path) == [Sample(step=1, prompt="a", text="b")]
    write(path, [], resumed_at=1)
    assert "weather" in path.read_text()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "an object"),
        ('"step"', "an object"),
        ('{"step":1}', "an object"),
        ('{"event":7}', "an object"),
        ('{"event":"sample","step":1,"prompt":"a"}', "sample without `text`"),
        ('{"event":"sample","step":true,"prompt":"a","text":"b"}', "`step` is 'True', expected int"),
        ('{"event":"sample","step":1.5,"prompt":"a","text":"b"}', "expected int"),
        ('{"event":"sample","step":null,"prompt":"a","text":"b"}', "expected int"),
        ('{"event":"evaluation","step":1,"loss":"low","best":true}', "expected float"),
        ('{"event":"evaluation","step":1,"loss":NaN,"best":true}', "NaN is no JSON number"),
        ('{"event":"evaluation","step":1,"loss":1,"best":1}', "expected bool"),
        ("[" * 100_000, "not JSON"),
        ('{"event":"sample","step":' + "9" * 5000 + "}", "not JSON"),
        ("x" * (5 << 20), "more than an event has"),
    ],
)
def test_damaged_lines_are_refused_by_number(tmp_path, line, complaint):
    path = tmp_path / "m.jsonl"
    path.write_text('{"event":"weather"}\n' + line + "\n")
    with pytest.raises(CorruptError, match=complaint) as caught:
        read_metrics(path)
    assert "line 2" in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(CorruptError):
        MetricsLog(path, resumed_at=1)
    assert path.read_text().count("\n") == 2, "a refused file stays as it was"


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(CorruptError, match="UTF-8"):
        read_metrics(tmp_path / "m.jsonl")


def test_a_number_beyond_floats_reads_as_infinity(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"event":"evaluation","step":1,"loss":' + "9" * 400 + ',"best":false}\n')
    assert read_metrics(tmp_path / "m.jsonl")[0].loss == math.inf


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path):
    with pytest.raises(MissingError, match="nowhere"):
        read_metrics(tmp_path / "nowhere.jsonl")
    with pytest.raises(StorageError, match="nowhere"):
        MetricsLog(tmp_path / "nowhere" / "m.jsonl")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "m.jsonl"
    path.write_bytes(content + b"\n")
    with contextlib.suppress(CorruptError):
        read_metrics(path)
