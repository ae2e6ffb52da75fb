"""A record from a stranger is held against what drawing and comparing take for granted."""

import pytest
from bench_records import changed, make_record
from page_records import make_forward, make_swept

from qlora_tools.bench.record_file import parse_record
from qlora_tools.errors import CorruptError


def of_first(name, **figures):
    """A change of the part ``name`` of the first attempt, or of the first quality's figures."""
    return lambda v: (v["quality"][0]["figures"] if name == "figures" else v["rows"][0]["attempts"][0][name]).update(figures)


def compared(**fields):
    return lambda v: v["comparisons"][0].update(fields)


@pytest.mark.parametrize("make", [make_record, make_swept, make_forward])
def test_what_a_benchmark_writes_passes(make):
    assert parse_record(make().to_json()).to_json() == make().to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(settings=[], rows=[], quality=[], comparisons=[]), "`settings` is empty"),
        (lambda v: v["settings"][1].update(id="fp32"), "lists 'fp32' twice"),
        (lambda v: v["rows"][1].update(setting="else"), r"rows\[1\]` is of 'else'"),
        (lambda v: v["rows"][1]["case"].update(batch=7), r"rows\[1\]` is of 'int8' at 7 x 128 \+ 65"),
        (lambda v: v["rows"].append(v["rows"][1]), "holds 'int8' at 1 x 128 \\+ 65 twice"),
        (lambda v: v["rows"].pop(1), "lacks 'int8'"),
        (lambda v: v["quality"][0].update(setting="else"), r"quality\[0\].setting` is 'else'"),
        (compared(a="else"), r"comparisons\[0\].a` is 'else'"),
        (compared(b=3), r"comparisons\[0\].b` is '3', expected text"),
        (compared(case=[9, 9, 9]), "which `workload.cases` does not list"),
        (compared(effect="x"), "comparisons.*effect.*expected a number"),
        (compared(ci95=[1]), "has 1 values, expected 2"),
        (lambda v: v["machine"].update(ram_bytes="8"), "machine.ram_bytes` is '8', expected a number"),
        (lambda v: v["machine"].update(gpus=[3]), r"machine.gpus\[0\]` is '3', expected an object"),
        (of_first("memory", loaded=True), "memory.loaded` is 'True', expected an object"),
        (of_first("memory", steady={"peak_bytes": "8"}), "steady.peak_bytes` is '8', expected a whole number"),
        (of_first("memory", steady={"peak_bytes": -8}), "holds -8 bytes"),
        (lambda v: v["rows"][0]["attempts"][0].update(prefill_s=[-1.0]), r"attempts\[0\]` took -1.0 s"),
        (lambda v: v["rows"][0]["attempts"][0].update(decode_s=[[1e-300]]), r"took 1e-300 s"),
        (of_first("figures", kl_mean="x"), r"quality\[0\].figures.kl_mean` is 'x', expected a number"),
        (of_first("figures", accuracy=True), "accuracy` is 'True', expected a number"),
        (of_first("figures", ci95=[1, 2]), "ci95` is .* expected an object"),
        (of_first("figures", ci95={"kl_mean": [1, 2, 3]}), "kl_mean` has 3 values, expected 2"),
        (of_first("figures", corpus="text"), "corpus` is 'text', expected an object"),
        (of_first("figures", windows={"kl": [1], "tokens": [1, 2]}), "columns of different lengths"),
        (of_first("figures", inputs={"kl": ["x"]}), r"inputs.kl\[0\]` is 'x'"),
    ],
)
def test_what_no_benchmark_writes_is_refused_with_its_place(change, message):
    with pytest.raises(CorruptError, match=message):
        parse_record(changed(change))


def test_sums_and_bounds_that_were_infinite_are_read_again():
    found = parse_record(changed(of_first("figures", windows={"kl": [None], "tokens": [4]}, ci95={"ppl_ratio": [1.0, None]})))
    assert found.quality[0].figures["windows"]["kl"] == [None]
